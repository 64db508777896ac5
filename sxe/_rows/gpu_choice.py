"""Which rows the kernels for GPUs take. Nothing here imports Pallas, which takes a while."""

import jax.numpy as jnp
from jax.typing import DTypeLike

VECTOR_BYTES = 16  # the widest load of a lane, and what bulk copies are aligned to
LANES = 32  # of a warp
SHORT_CLASSES = 1024  # of rows whose exponentials stay in registers


def has_gradient_kernel(
    classes: int, dtype: DTypeLike, d_dtype: DTypeLike, *, has_uniform_targets: bool
) -> bool:
    """Whether the kernel takes rows of so many classes, with logits and gradient in these dtypes.

    Their targets are a label's, and, if they are uniform, the same for all classes beside it.
    """
    dtypes = {jnp.dtype(dtype), jnp.dtype(d_dtype)}
    aligned = all(classes * of.itemsize % VECTOR_BYTES == 0 for of in dtypes)
    if classes <= SHORT_CLASSES:
        return aligned and len(dtypes) == 1
    return aligned and not has_uniform_targets


def has_state_kernel(classes: int) -> bool:
    """Whether the state kernel takes rows of so many classes: one for each lane of a warp."""
    return classes >= LANES
