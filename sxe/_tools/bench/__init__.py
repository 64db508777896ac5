"""``python -m sxe bench``: speed and memory, compared with the installed libraries."""
