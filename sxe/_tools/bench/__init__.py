"""``python -m sxe bench``: speed and memory, beside the peers that are installed."""
