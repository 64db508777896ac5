"""The gradient kernel for NVIDIA GPUs of the Hopper generation: state and gradient of rows at once.

For logits x [N, K], targets t [N, K] and weights w [N], one launch computes of each row

    (m, r)              the state of ``normalizer``
    w (T q_l - t_l)     the gradient, line D7, and with a z-loss the whole of it

and what else the loss needs: of a label its logit, and of targets of other classes the sum of what
they cost. Where only a label has a target, it reads no targets.

A row that fits on the chip is read from memory once, and its gradient is written once. Of a row
that does not fit there, each warpgroup reads its first blocks again, soon enough that they are
still in the L2 cache: of bfloat16 rows of 131,072 classes, 64 of 256 KiB on each of 132
multiprocessors, together 8 MiB. Of float32 rows they are 320 of 512 KiB, or 336 where the gradient
is narrower, together 41 or 43 MiB. That cache holds about as much.

Targets of classes are read with the logits, and take their part of the chip. Of bfloat16 rows with
float32 targets, up to 32,768 classes are read once. Of 50,264 classes, 144 of 295 KiB are read
again, together 19 MiB. Of 131,072 classes they would be 576 of 768 KiB, together 74 MiB, so that a
part comes from memory twice; with bfloat16 targets they are 320 of 512 KiB, together 41 MiB.

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
from sxe._rows.gpu_terms import Bytes, Found, Given, RowTerms
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
    """State and gradient of rows for which ``has_gradient_kernel`` is true.

    Args:
      x: the logits [N, K], bfloat16, float16 or float32.
      dense: a target for each class, [N, K] or [1, K], in one of these dtypes, or None.
      terms: what else is known of rows.
      d_dtype: of the gradient.
      cores: how many multiprocessors the GPU has.
      interpret: on a CPU, for tests.
    """
    N, K = x.shape
    is_short, d = K <= SHORT_CLASSES, jax.ShapeDtypeStruct(x.shape, d_dtype)
    sizes = N, K, VECTOR_BYTES // x.dtype.itemsize
    dense_dtype = None if dense is None else dense.dtype
    of = Bytes(x.dtype.itemsize, d.dtype.itemsize, dense_dtype.itemsize if dense_dtype else 0)
    is_label_alone, pad = terms.label_target is None, 0
    if is_short:
        launch = short_launch(*sizes, cores=cores, of=of)
        scratch = short_scratch(launch, x.dtype, dense_dtype)
        # Short rows come four at a time, so that the arrays of rows are padded to a multiple of it.
        pad = -N % WARPS
        if dense is not None and len(dense) < N:
            dense = jnp.broadcast_to(dense, (WARPS, K))
    else:
        launch = long_launch(*sizes, cores=cores, of=of, is_label_alone=is_label_alone)
        scratch = long_scratch(launch, x.dtype, dense_dtype, d.dtype)
    terms = terms._replace(has_gradient=terms.has_gradient.astype(jnp.int32))
    terms = jax.tree.map(lambda a: jnp.pad(a, (0, pad)), terms)
    each: Any = jax.ShapeDtypeStruct((N + pad,), jnp.float32)
    gap = total = None
    if not is_label_alone:
        # Of a long row, each warp has a part of the sum.
        gap = each if is_short else jax.ShapeDtypeStruct((N, WARPS * launch.groups), jnp.float32)
        total = None if dense is None else each
    outputs = Found(Normalizer(each, each), each, d, gap, total)
    arrays, structure = jax.tree.flatten(Given(x, dense, terms, outputs))

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(structure, refs[: len(arrays)])
        if is_short:
            short_rows(launch, given, refs[len(arrays) :])
        else:
            long_rows(launch, given, refs[len(arrays) :], interpret=interpret)

    results = run(
        body,
        jax.tree.leaves((x, dense, terms)),
        results=jax.tree.leaves(outputs),
        grid={"program": launch.programs},
        groups=launch.groups,
        scratch=scratch,
        interpret=interpret,
    )
    found = jax.tree.unflatten(jax.tree.structure(outputs), results)
    if gap is not None and not is_short:
        found = found._replace(gap=jnp.sum(found.gap, axis=1))
    return jax.tree.map(lambda a: a[:N], found)
