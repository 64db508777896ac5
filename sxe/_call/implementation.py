"""The implementation of a call's row functions: XLA, or the row kernels for GPUs."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from sxe._arrays import are_known
from sxe._backend import Backend
from sxe._call.options import Implementation
from sxe._errors import unserved


def choose(
    implementation: Implementation,
    backend: Backend,
    *,
    dtype: DTypeLike,
    shape: tuple[int, ...],
) -> Backend:
    """The backend with the chosen implementation, for logits of this shape [..., K] and dtype.

    None chooses XLA. This may change when the kernels have been measured in more cases.
    """
    if implementation != "mosaic_gpu":
        return backend
    needed = backend.needs_for_row_kernels
    if needed is None and dtype == jnp.float64:
        needed = "bfloat16, float16 or float32, got float64"
    if needed is None and not are_known(*shape):
        needed = f"sizes that are known at trace time, got shape {shape}"
    if needed is not None:
        raise unserved(needed)
    return dataclasses.replace(backend, uses_row_kernels=True)


def check_rule(rule: str, backend: Backend) -> None:
    """Raises if a head would use the kernels with another rule than "vjp"."""
    if backend.uses_row_kernels and rule != "vjp":
        raise unserved(f"rule 'vjp' in the head, got {rule!r}")
