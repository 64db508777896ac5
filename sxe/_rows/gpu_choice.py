"""Which rows the kernels for GPUs take. Nothing here imports Pallas, which takes a while."""

import jax.numpy as jnp
from jax.typing import DTypeLike

VECTOR_BYTES = 16  # the widest load of a lane, and what bulk copies are aligned to
LANES = 32  # of a warp
SHORT_CLASSES = 1024  # of rows whose exponentials stay in registers


def has_gradient_kernel(
    classes: int, dtype: DTypeLike, d_dtype: DTypeLike, dense_dtype: DTypeLike | None = None
) -> bool:
    """Whether the kernel takes rows of so many classes, with logits and gradient in these dtypes.

    ``dense_dtype`` is that of an array of targets of the classes, if there is one.
    """
    dtypes = [jnp.dtype(of) for of in (dtype, d_dtype, dense_dtype) if of is not None]
    if classes <= SHORT_CLASSES and dtypes[0] != dtypes[1]:
        return False  # the gradient of a short row takes the place of its logits
    return all(classes * of.itemsize % VECTOR_BYTES == 0 for of in dtypes)


def has_state_kernel(classes: int) -> bool:
    """Whether the state kernel takes rows of so many classes: one for each lane of a warp."""
    return classes >= LANES
