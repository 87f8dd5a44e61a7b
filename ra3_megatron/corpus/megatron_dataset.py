"""Megatron-Core's indexed data set, imported the one way that works on every machine."""

import warnings

import ra3_megatron.mcore  # noqa: F401  (prepares Megatron-Core; must come before any megatron.core import)

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

__all__ = ["IndexedDataset", "IndexedDatasetBuilder"]
