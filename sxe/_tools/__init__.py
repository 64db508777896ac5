"""The commands ``python -m sxe check``, ``plan`` and ``bench``.

No module of sxe outside this folder imports from it, apart from ``sxe.__main__``.
"""
