"""``python -m sxe check``, ``plan`` and ``bench``. No other module of sxe imports from here."""
