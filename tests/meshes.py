"""Meshes of the virtual devices that the tests see."""

import contextlib

import jax
from jax.sharding import AxisType

KINDS = ["auto", "auto, set_mesh", "explicit"]


def make_mesh(*shape, names=("data", "model"), kind=AxisType.Auto):
    """A mesh of this shape. All axes have the same kind."""
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def use_mesh(kind):
    """A 2 x 4 mesh of one of KINDS, and the context for the call.

    An Auto mesh also works without jax.set_mesh.
    """
    mesh = make_mesh(2, 4, kind=AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    return mesh, contextlib.nullcontext() if kind == "auto" else jax.set_mesh(mesh)
