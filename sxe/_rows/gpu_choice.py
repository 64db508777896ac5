"""Which rows the GPU kernels support. Nothing here imports Pallas, because that import is slow."""

import jax.numpy as jnp
from jax.typing import DTypeLike

VECTOR_BYTES = 16  # the widest load of a lane, and the alignment of bulk copies
LANES = 32  # lanes of a warp
SHORT_CLASSES = 1024  # the most classes of a row whose exponentials stay in registers


def has_gradient_kernel(
    classes: int, dtype: DTypeLike, d_dtype: DTypeLike, dense_dtype: DTypeLike | None = None
) -> bool:
    """Whether the gradient kernel supports this number of classes and these dtypes.

    ``dtype`` is the dtype of the logits, ``d_dtype`` that of their gradient, and ``dense_dtype``
    that of an array of dense targets, or None without one.
    """
    dtypes = [jnp.dtype(of) for of in (dtype, d_dtype, dense_dtype) if of is not None]
    if classes <= SHORT_CLASSES and dtypes[0] != dtypes[1]:
        return False  # the gradient of a short row overwrites its logits
    return all(classes * of.itemsize % VECTOR_BYTES == 0 for of in dtypes)


def has_state_kernel(classes: int) -> bool:
    """Whether the state kernel supports this number of classes: at least one per lane of a warp."""
    return classes >= LANES
