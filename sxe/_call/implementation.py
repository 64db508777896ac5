"""Which implementation computes the functions of rows of a call: XLA, or the kernels for GPUs."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from sxe._arrays import are_known
from sxe._backend import Backend
from sxe._call.options import Implementation, Rule
from sxe._errors import ArgumentValueError


def choose(
    implementation: Implementation,
    backend: Backend,
    *,
    dtype: DTypeLike,
    shape: tuple[int, ...],
    rule: Rule = "vjp",
) -> Backend:
    """The backend with that choice, for logits of this shape [..., K] and dtype.

    None is XLA, until more of what the kernels do has been measured.
    """
    if implementation != "mosaic_gpu":
        return backend
    needed = backend.needs_for_row_kernels
    if needed is None and dtype == jnp.float64:
        needed = "bfloat16, float16 or float32, got float64"
    if needed is None and not are_known(*shape):
        needed = f"sizes that are known, got shape {shape}"
    if needed is None and rule != "vjp":
        needed = f"rule 'vjp', got {rule!r}"
    if needed is not None:
        raise ArgumentValueError("implementation", f"expected for 'mosaic_gpu' {needed}")
    return dataclasses.replace(backend, uses_row_kernels=True)
