"""Prints the versions of Python and of the packages that sxe computes with, in one line."""

import platform
from importlib.metadata import version

packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
print(f"Python {platform.python_version()}, {packages}")
