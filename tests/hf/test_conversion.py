"""Conversions as files: what they write, that they are whole or absent, resume, and use several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from hf_models import command, contents, load, make
from safetensors.torch import load_file, save_file

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf import conversion, exporting, importing
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.importing import import_hf
from ra3_megatron.mcore import checkpoint, checkpoint_files
from ra3_megatron.mcore.checkpoint_contents import read_contents
from ra3_megatron.mcore.checkpoint_record import read_record
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.tokenizer import HFTokenizer
from ra3_megatron.verbs.convert import parse_size
from tests.processes import python_path

# isort: split
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).parents[2]
SINGLE = ParallelConfig(threads=1)
SMALL = 50_000
"""Bytes of a unit or a shard: several of each."""


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "UNIT_BYTES", SMALL)


# -- what is written --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_megatron_writes(hf: Path, tmp_path: Path, runtime: Runtime) -> None:
    """Its tensors, shards and records are those of `checkpoint.save`; extra states, which hold nothing, are absent."""
    import_hf(hf, tmp_path / "converted")
    network = load(tmp_path / "converted", hf, SINGLE, runtime)
    checkpoint.save(tmp_path / "saved", network, runtime, {})

    def described(folder: Path) -> dict[str, Any]:
        index = FileSystemReader(folder).read_metadata()
        return {
            name: (entry.size, entry.properties, sorted((c.offsets, c.sizes) for c in entry.chunks))
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    assert described(tmp_path / "converted") == described(tmp_path / "saved")
    mine, theirs = (read_record(tmp_path / name) for name in ("converted", "saved"))
    for key in ("version", "layout", "architecture", "precision", "optimizer"):
        assert mine[key] == theirs[key]
    assert mine["hf"] == {"family": "qwen3_moe", "dtype": "fp32"} and mine["weight_version"] == mine["step"] == 0
    assert mine["tokenizer"] == HFTokenizer.load(hf, 300).fingerprint
    assert (tmp_path / "converted" / "metadata.json").read_text() == (tmp_path / "saved" / "metadata.json").read_text()
    common = [torch.load(tmp_path / name / "common.pt", weights_only=True) for name in ("converted", "saved")]
    assert common[0] == common[1]


def test_small_files_are_kept_on_the_way_and_back(hf: Path, tmp_path: Path) -> None:
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    names = {path.name for path in hf.iterdir()} - {path.name for path in hf.glob("model*")}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    for name in names:
        assert (tmp_path / "checkpoint" / "hf" / name).read_bytes() == (hf / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    # a folder that the user names wins
    other = shutil.copytree(hf, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    export_hf(tmp_path / "checkpoint", tmp_path / "again", template=other)
    assert (tmp_path / "again" / "generation_config.json").read_text() == "{}"


def test_shards_of_a_size(hf: Path, tmp_path: Path) -> None:
    """Files hold at most that, an index names them all; transformers reads the folder."""
    import_hf(hf, tmp_path / "checkpoint")
    options = ("--out", tmp_path / "b", "--max-shard-size", "50KB")
    command("megatron-to-hf", "--checkpoint", tmp_path / "checkpoint", *options)
    files = {path.name: load_file(path) for path in (tmp_path / "b").glob("*.safetensors")}
    original = {name: tensor for path in hf.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert sorted(files)[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 5
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    for tensors in files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 50_000
        assert all(torch.equal(tensor, original[name]) for name, tensor in tensors.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(model.model.norm.weight, original["model.norm.weight"])


@pytest.mark.parametrize("mixed", [False, True])
def test_fp16_and_mixtures_become_fp32(mixed: bool, tmp_path: Path) -> None:
    """fp32 holds both exactly; as bf16 when asked to."""
    make("llama", tmp_path / "hf", torch.bfloat16 if mixed else torch.float16)
    original = load_file(tmp_path / "hf" / "model.safetensors")
    if mixed:
        original["model.norm.weight"] = original["model.norm.weight"].float() + 1e-5
        save_file(original, tmp_path / "hf" / "model.safetensors")
    for dtype, kind in ((None, torch.float32), ("bf16", torch.bfloat16)):
        import_hf(tmp_path / "hf", tmp_path / f"checkpoint-{dtype}", dtype)
        export_hf(tmp_path / f"checkpoint-{dtype}", tmp_path / f"back-{dtype}")
        found = load_file(tmp_path / f"back-{dtype}" / "model.safetensors")
        assert all(torch.equal(found[name], original[name].to(kind)) for name in original)
        assert {tensor.dtype for tensor in found.values()} == {kind}
        config = json.loads((tmp_path / f"back-{dtype}" / "config.json").read_text())
        assert config["dtype"] == str(kind).removeprefix("torch.")


def test_sizes() -> None:
    found = [parse_size(text) for text in ("5GB", "200MB", "1.5 KB", "2GiB", "1kib")]
    assert found == [5 * 10**9, 200 * 10**6, 1500, 2 * 2**30, 1024]
    for text in ("5", "GB", "-1GB", "0MB", "5 apples"):
        with pytest.raises(UserError, match="must be a size such as 5GB"):
            parse_size(text)


def test_the_vocabulary_is_padded_with_zeros(hf: Path, tmp_path: Path, runtime: Runtime) -> None:
    import_hf(hf, tmp_path / "checkpoint")
    found = read_contents(tmp_path / "checkpoint")
    assert {t.name: t.shape for t in found.tensors}["embedding.word_embeddings.weight"] == (384, 64)
    parameters = dict(load(tmp_path / "checkpoint", hf, SINGLE, runtime).named_parameters())
    for name in ("0.embedding.word_embeddings.weight", "0.output_layer.weight"):
        assert bool((parameters[name][:300] != 0).any(-1).all()) and not bool(parameters[name][300:].any())


# -- whole or absent --------------------------------------------------------------------------------------------------

KILLED = """
import signal, sys
from pathlib import Path
import ra3_megatron.mcore
from ra3_megatron.hf import exporting, importing
importing.UNIT_BYTES = {small}
kind, (source, out) = sys.argv[1], map(Path, sys.argv[2:])
job = importing._Import if kind == "import" else exporting._Export
run = job.run
def stop_at_the_third(self, unit, folder, on_bytes):
    if unit < 2:
        return run(self, unit, folder, on_bytes)
    run(self, unit, folder, on_bytes)  # its file is there, the journal does not have it
    print("here", flush=True)
    signal.pause()
job.run = stop_at_the_third
if kind == "import":
    importing.import_hf(source, out)
else:
    exporting.export_hf(source, out, max_shard_bytes={small})
"""


def killed(kind: str, source: Path, out: Path) -> None:
    """A conversion that is killed in its third unit."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(small=SMALL), kind, str(source), str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_killed_conversion_goes_on(
    kind: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    source = hf
    if kind == "export":
        source = tmp_path / "checkpoint"
        import_hf(hf, source)
    job: Any = importing._Import if kind == "import" else exporting._Export
    ran: list[int] = []
    run = job.run
    monkeypatch.setattr(job, "run", lambda self, unit, *rest: (ran.append(unit), run(self, unit, *rest))[1])

    def convert(out: Path) -> bool:
        if kind == "import":
            return import_hf(source, out)
        return export_hf(source, out, max_shard_bytes=SMALL)

    out = tmp_path / "out"
    killed(kind, source, out)
    partial = tmp_path / "out.partial"
    assert not out.exists() and partial.is_dir()
    assert not (partial / "checkpoint.json").exists() and not (partial / "config.json").exists()
    with pytest.raises(UserError, match="is no complete checkpoint"):
        read_record(partial)
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"unit": 2, "resu')  # a torn line
    killed_once = contents(partial)

    assert convert(out)
    assert min(ran) == 2 and not partial.exists()
    number = len(ran) + 2
    ran.clear()
    assert convert(tmp_path / "whole") and sorted(ran) == list(range(number))
    assert contents(out) == contents(tmp_path / "whole")

    # the same command once more finds it done; another is refused, and neither changes anything
    ran.clear()
    assert not convert(out)
    with pytest.raises(UserError, match="exists already"):
        (import_hf if kind == "import" else export_hf)(source, out, "bf16")
    assert contents(out) == contents(tmp_path / "whole") and not ran

    # other options, or another source, begin anew; a file that is not whole is written again
    for changed in ("file", "dtype", "source"):
        shutil.rmtree(out, ignore_errors=True)
        for name, content in killed_once.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        ran.clear()
        if changed == "file":
            torn = json.loads((partial / "journal.jsonl").read_text().splitlines()[1])["result"]["file"]
            os.truncate(partial / torn, 100)
            assert convert(out) and min(ran) == 1 and contents(out) == contents(tmp_path / "whole")
            continue
        if changed == "dtype":
            (import_hf if kind == "import" else export_hf)(source, out, "bf16")
        elif kind == "import":
            other = Path(shutil.copytree(hf, tmp_path / "other"))
            os.utime(next(other.glob("*.safetensors")), (1, 1))
            import_hf(other, out)
        else:
            record = json.loads((source / "checkpoint.json").read_text())
            (source / "checkpoint.json").write_text(json.dumps({**record, "step": 7}))
            export_hf(source, out, max_shard_bytes=SMALL)
        assert min(ran) == 0


@pytest.mark.multiprocess
def test_several_processes_write_the_same(hf: Path, tmp_path: Path, small_units: None) -> None:
    import_hf(hf, tmp_path / "one")
    seen: list[int] = []

    def progress(total: int) -> conversion.OnBytes:
        seen.append(-total)
        return seen.append

    import_hf(hf, tmp_path / "two", workers=2, progress=progress)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and sum(seen) == 0 and len(seen) > 10
    export_hf(tmp_path / "one", tmp_path / "hf-one", max_shard_bytes=SMALL)
    export_hf(tmp_path / "one", tmp_path / "hf-two", max_shard_bytes=SMALL, workers=2)
    assert contents(tmp_path / "hf-one") == contents(tmp_path / "hf-two")


ORPHANS = """
import signal, sys
from pathlib import Path
import ra3_megatron.mcore
from ra3_megatron.hf import importing
importing.UNIT_BYTES = {small}
def progress(total):
    def stop(count):
        print("here", flush=True)
        signal.pause()
    return stop
if __name__ == "__main__":
    importing.import_hf(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, progress=progress)
"""


@pytest.mark.multiprocess
def test_processes_end_when_the_conversion_is_killed(hf: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS.format(small=SMALL))
    process = subprocess.Popen(
        [sys.executable, str(script), str(hf), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert not (tmp_path / "out").exists()


FULL = """
import os, sys
from pathlib import Path
import ra3_megatron.mcore
from ra3_megatron.hf import conversion, importing
importing.UNIT_BYTES = {small}
fsync, lines, units = os.fsync, 0, 0
def full(handle):
    global lines
    fsync(handle)
    if os.readlink(f"/proc/self/fd/{{handle}}").endswith("journal.jsonl"):
        lines += 1
        if lines == units:
            raise OSError(28, "No space left on device")
def sizes(job, found=importing._Import.sizes):
    global units
    units = len(found(job))
    return found(job)
if __name__ == "__main__":
    os.fsync, importing._Import.sizes = full, sizes
    importing.import_hf(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


@pytest.mark.multiprocess
def test_an_error_behind_the_last_unit_ends_all_processes(hf: Path, tmp_path: Path) -> None:
    """The disk is full when the journal gets its last line, while the workers wait for a next unit."""
    script = tmp_path / "script.py"
    script.write_text(FULL.format(small=SMALL))
    words = [sys.executable, str(script), str(hf), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert "No space left on device): make room and run the same command again" in ended.stderr
    assert ended.returncode == 1 and (tmp_path / "out.partial" / "journal.jsonl").exists()


def test_targets_that_are_taken(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        error = command("hf-to-megatron", "--hf", hf, "--out", tmp_path / name, code=2)
        assert f"{tmp_path / name}: exists already" in error
    assert (tmp_path / "folder" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "folder").rename(tmp_path / "other.partial")
    error = command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "other", code=2)
    assert f"{tmp_path / 'other.partial'}: exists and is no unfinished conversion" in error
    assert (tmp_path / "other.partial" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "empty")
    again = command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "empty")
    assert again == f"{tmp_path / 'empty'} (complete since an earlier run)\n"


@pytest.mark.parametrize("moment", ["first", "last"])
def test_two_conversions_to_one_place(moment: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is at work, another is refused, and disturbs nothing: before the first unit, and before the rename."""
    started = []

    def another() -> None:
        code = (
            "import sys; from ra3_megatron.cli import main; "
            "sys.argv = ['ra3', 'convert', 'hf-to-megatron', '--hf', sys.argv[1], '--out', sys.argv[2]]; main()"
        )
        environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
        words = [sys.executable, "-c", code, str(hf), str(tmp_path / "out")]
        started.append(subprocess.run(words, env=environment, capture_output=True, text=True))

    def progress(total: int) -> conversion.OnBytes:
        if moment == "first":
            another()
        return lambda count: None

    def force_to_disk(folder: Path, recursive: bool = True) -> None:
        checkpoint_files.force_to_disk(folder, recursive)
        if moment == "last" and recursive:
            another()

    monkeypatch.setattr(conversion, "force_to_disk", force_to_disk)
    assert import_hf(hf, tmp_path / "out", progress=progress)
    assert len(started) == 1
    assert started[0].returncode == 2 and "another process is writing there" in started[0].stderr
    read_record(tmp_path / "out")


def test_a_conversion_that_another_one_ended(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one held the folder until this one got its lock: its result counts, and nothing is left beside it."""
    real = conversion.lock_file

    def behind_another(path: Path) -> Any:
        monkeypatch.undo()
        assert import_hf(hf, tmp_path / "out")
        path.parent.mkdir()
        return real(path)

    monkeypatch.setattr(conversion, "lock_file", behind_another)
    assert not import_hf(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path != hf) == ["out"]


def test_a_folder_with_a_journal_is_not_complete(hf: Path, tmp_path: Path) -> None:
    import_hf(hf, tmp_path / "out")
    (tmp_path / "out" / "journal.jsonl").touch()
    error = command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", code=2)
    assert f"{tmp_path / 'out'}: holds an unfinished conversion (journal.jsonl)" in error


def test_a_full_disk_keeps_what_is_complete(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    run = importing._Import.run

    def full(self: Any, unit: int, *rest: Any) -> Any:
        if unit == 2:
            raise OSError(28, "No space left on device", str(tmp_path))
        return run(self, unit, *rest)

    monkeypatch.setattr(importing._Import, "run", full)
    error = command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out", code=2)
    assert "No space left on device): make room and run the same command again: it goes on where it was" in error
    assert len((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()) == 2
    monkeypatch.undo()
    command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "out")


MEMORY = """
import sys
from pathlib import Path
import ra3_megatron.mcore
from ra3_megatron.hf import exporting, importing
importing.UNIT_BYTES = 2**25
hf, work = map(Path, sys.argv[1:])
importing.import_hf(hf, work / "checkpoint")
exporting.export_hf(work / "checkpoint", work / "back", max_shard_bytes=2**26)
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


@pytest.mark.multiprocess
def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    """160 MB of weights, of which the largest tensor has 16 MB, need little more than weights of 1 MB do."""
    make("llama", tmp_path / "large" / "hf", hidden_size=1024, intermediate_size=2048, num_hidden_layers=6)
    make("llama", tmp_path / "small" / "hf")
    assert (tmp_path / "large" / "hf" / "model.safetensors").stat().st_size > 150 * 2**20

    def peak(work: Path) -> int:
        words = [sys.executable, "-c", MEMORY, str(work / "hf"), str(work)]
        environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
        return 1024 * int(subprocess.run(words, env=environment, capture_output=True, check=True).stdout)

    # a whole model would be 160 MB; allocators keep a few tensors more or less
    assert peak(tmp_path / "large") - peak(tmp_path / "small") < 96 * 2**20
