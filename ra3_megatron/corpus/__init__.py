"""From sources of expert text to packed batches: sources, cleaning, splits, indexed data sets, sampling order."""
