"""The gradient kernel for NVIDIA Hopper GPUs: state and gradient of rows in one launch.

For logits x [N, K], targets t [N, K] and weights w [N], it computes for each row

    (m, r)              the state of ``normalizer``
    w (T q_l - t_l)     the gradient, line D7, plus the gradient of the z-loss, if there is one

It also returns the label's logit and, if other classes have targets, the sum of their costs. If
only the label has a target, the kernel reads no array of targets.

A row that fits on the chip is read from memory once, and its gradient is written once. If a row
does not fit, each warpgroup reads its first blocks a second time. It does so soon enough that they
should still be in the L2 cache (50 MiB). This table lists the part of a row that is read again, and
the total for 132 multiprocessors:

    131,072 classes, bfloat16                           64 of 256 KiB are read again,     8 MiB
    131,072 classes, float32                           320 of 512 KiB                    41 MiB
    131,072 classes, float32, bfloat16 gradient        336 of 512 KiB                    43 MiB
     50,264 classes, bfloat16, float32 targets         144 of 295 KiB                    19 MiB
    131,072 classes, bfloat16, bfloat16 targets        320 of 512 KiB                    41 MiB
    131,072 classes, bfloat16, float32 targets         576 of 768 KiB                    74 MiB

The rows of the last line exceed the L2 cache, so a part of them is read from memory twice. Shorter
rows of each kind are read once. For bfloat16 with float32 targets, these are rows of up to 32,768
classes.

A program of the grid is a CUDA block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sxe._rows.gpu_choice import SHORT_CLASSES, VECTOR_BYTES
from sxe._rows.gpu_lanes import WARPS, run
from sxe._rows.gpu_long_rows import long_launch, long_rows, long_scratch
from sxe._rows.gpu_short_rows import short_launch, short_rows, short_scratch
from sxe._rows.gpu_terms import Found, ItemSizes, Refs, RowTerms
from sxe._rows.normalizer import Normalizer


def state_and_gradient(
    x: Array,
    dense: Array | None,
    terms: RowTerms,
    *,
    d_dtype: DTypeLike,
    cores: int,
    interpret: bool = False,
) -> Found:
    """The state and gradient of rows for which ``has_gradient_kernel`` is True.

    Args:
      x: the logits [N, K], bfloat16, float16 or float32.
      dense: a target for each class, [N, K] or [1, K], in one of these dtypes, or None.
      terms: the other inputs of rows.
      d_dtype: the dtype of the gradient.
      cores: the number of multiprocessors of the GPU.
      interpret: whether to interpret the kernel on a CPU, for tests.
    """
    N, K = x.shape
    is_short, d = K <= SHORT_CLASSES, jax.ShapeDtypeStruct(x.shape, d_dtype)
    sizes = N, K, VECTOR_BYTES // x.dtype.itemsize
    dense_dtype = None if dense is None else dense.dtype
    of_dense = 0 if dense_dtype is None else dense_dtype.itemsize
    itemsizes = ItemSizes(x.dtype.itemsize, d.dtype.itemsize, of_dense)
    is_label_alone, pad = terms.label_target is None, 0
    if is_short:
        launch = short_launch(*sizes, cores=cores, itemsizes=itemsizes)
        of_program: Any = short_scratch(launch, x.dtype, dense_dtype)
        # Short rows are processed four at a time, so pad the arrays of rows to a multiple of four.
        pad = -N % WARPS
        if dense is not None and len(dense) < N:
            dense = jnp.broadcast_to(dense, (WARPS, K))
    else:
        launch = long_launch(
            *sizes, cores=cores, itemsizes=itemsizes, is_label_alone=is_label_alone
        )
        of_program = long_scratch(launch, x.dtype, dense_dtype, d.dtype)
    terms = terms._replace(has_gradient=terms.has_gradient.astype(jnp.int32))
    terms = jax.tree.map(lambda a: jnp.pad(a, (0, pad)), terms)
    each: Any = jax.ShapeDtypeStruct((N + pad,), jnp.float32)
    gap = total = None
    if not is_label_alone:
        # For a long row, each warp returns a part of the sum.
        gap = each if is_short else jax.ShapeDtypeStruct((N, WARPS * launch.groups), jnp.float32)
        total = None if dense is None else each
    outputs = Found(Normalizer(each, each), each, d, gap, total)
    arrays, structure = jax.tree.flatten(Refs(x, dense, terms, outputs))
    scratch, structure_of_scratch = jax.tree.flatten(of_program)

    def body(*refs: Any) -> None:
        in_memory = jax.tree.unflatten(structure, refs[: len(arrays)])
        shared = jax.tree.unflatten(structure_of_scratch, refs[len(arrays) :])
        if is_short:
            short_rows(launch, in_memory, shared)
        else:
            long_rows(launch, in_memory, shared, interpret=interpret)

    results = run(
        body,
        jax.tree.leaves((x, dense, terms)),
        results=jax.tree.leaves(outputs),
        grid={"program": launch.programs},
        groups=launch.groups,
        scratch=tuple(scratch),
        interpret=interpret,
    )
    found = jax.tree.unflatten(jax.tree.structure(outputs), results)
    if gap is not None and not is_short:
        found = found._replace(gap=jnp.sum(found.gap, axis=1))
    return jax.tree.map(lambda a: a[:N], found)
