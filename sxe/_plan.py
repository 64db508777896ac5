"""What a call of the head would do: its path, chunks, FLOPs and memory, from its sizes alone."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sxe import _options, _tiles
from sxe._linear_softmax_cross_entropy import gradient_dtype
from sxe._softmax_cross_entropy import RULES

MIB = 2**20
VALUE = "value alone"
FORWARD = "gradients in the forward pass"
RECOMPUTE = "logits again in the backward pass"
INPUTS = ("hidden", "kernel")
TILE_OPTIONS = ("where", "bias", "logit_scale", "softcap", "label_smoothing")


class Plan(NamedTuple):
    """What a call of ``sxe.linear_softmax_cross_entropy`` does, and its gradient.

    Attributes:
      path: "value alone"; "gradients in the forward pass", nothing computed twice; or "logits again
        in the backward pass".
      chunk_size: the rows of a chunk.
      chunks: how many there are.
      padding: the rows that are added to make them of one size.
      gradient_dtype: in which the gradient of the logits is multiplied with hidden and kernel.
      flops: of the matrix products, of all chunks.
      temporary_bytes: estimated, what XLA allocates beside arguments and results.
      peak_bytes: estimated, with arguments and results.
      logits_bytes: what the [N, K] logits would take in the dtype in which they are computed.
      logits_peak_bytes: what a program that makes them needs at least: arguments, results, logits.
    """

    path: str
    chunk_size: int
    chunks: int
    padding: int
    gradient_dtype: str
    flops: int
    temporary_bytes: int
    peak_bytes: int
    logits_bytes: int
    logits_peak_bytes: int


def plan(
    rows: int,
    hidden: int,
    classes: int,
    dtype: DTypeLike = "float32",
    *,
    differentiate: Sequence[str] = INPUTS,
    reduction: Literal["mean", "sum", "none"] = "mean",
    rule: Literal["vjp", "jvp", "autodiff"] = "vjp",
    chunk_size: int | None = None,
    options: Sequence[str] = (),
) -> Plan:
    """What ``linear_softmax_cross_entropy`` would do for inputs of that size on this backend.

    Nothing is compiled. On a single CPU device, and for rule "vjp", the estimates of memory are
    within about 15 % of ``compiled.memory_analysis()``. Elsewhere they are what the parts take that
    the work is divided into, and XLA may need more.

    Args:
      rows, hidden, classes: N, D and K: on this device, inside ``jax.shard_map``.
      dtype: of hidden and kernel.
      differentiate: those of "hidden" and "kernel" for which there is a gradient.
      reduction, rule, chunk_size: as for the call.
      options: the names of those options in use that make XLA write out more: "where" (or weights,
        or ignore_index), "bias", "logit_scale", "softcap", "label_smoothing" (or dense targets).

    Raises:
      TypeError, ValueError: for a size below 1 (rows: 0), and names that are none of the above.

    Example:
      >>> import sxe
      >>> p = sxe.plan(rows=8192, hidden=4096, classes=128256, dtype="bfloat16")
      >>> p.path
      'gradients in the forward pass'
      >>> p.flops == 6 * 8192 * 4096 * 128256
      True
      >>> p.temporary_bytes < p.logits_bytes
      True
    """
    for name, size, least in (("rows", rows, 0), ("hidden", hidden, 1), ("classes", classes, 1)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    _options.one_of("reduction", reduction, _options.REDUCTIONS)
    _options.one_of("rule", rule, tuple(RULES))
    for argument, names, known in (
        ("differentiate", differentiate, INPUTS),
        ("options", options, TILE_OPTIONS),
    ):
        if isinstance(names, str):
            raise TypeError(f"{argument}: expected several names, got {names!r}")
        for name in names:
            _options.one_of(argument, name, known)
    dtype = _options.check_dtype("dtype", jnp.dtype(dtype))

    backend = jax.default_backend()
    given = _options.parse_chunk_size(chunk_size)
    size = given or _tiles.rows_per_chunk(rows, classes, dtype, backend)
    chunks = _tiles.number_of_chunks(rows, size)
    size = max(1, -(-rows // chunks))
    wanted = [name in differentiate for name in INPUTS]
    if not any(wanted):
        path = VALUE
    else:
        path = FORWARD if rule == "vjp" and reduction != "none" else RECOMPUTE
    # Of a single chunk XLA sees that both passes compute the same logits, and keeps them.
    products = 1 + sum(wanted) + (path == RECOMPUTE and chunks > 1)

    itemsize, wide = dtype.itemsize, 8 if dtype == jnp.float64 else 4
    logits = rows * classes * wide
    arguments = (rows * hidden + hidden * classes) * itemsize + rows * 4
    results = itemsize * (wanted[0] * rows * hidden + wanted[1] * hidden * classes) + wide
    if reduction == "none":
        results += rows * wide
    temporary = _temporary_bytes(
        rows, hidden, classes, dtype, size, chunks, path, wanted[0], wanted[1], options
    )
    return Plan(
        path=path,
        chunk_size=size,
        chunks=chunks,
        padding=size * chunks - rows,
        gradient_dtype=str(gradient_dtype(dtype, backend)),
        flops=2 * products * size * chunks * hidden * classes,
        temporary_bytes=temporary,
        peak_bytes=arguments + results + temporary,
        logits_bytes=logits,
        logits_peak_bytes=arguments + results + logits,
    )


def _temporary_bytes(
    rows: int,
    hidden: int,
    classes: int,
    dtype: jnp.dtype,
    size: int,
    chunks: int,
    path: str,
    want_hidden: bool,
    want_kernel: bool,
    options: Sequence[str],
) -> int:
    """What XLA allocates at the time when it needs most, as far as that follows from the sizes."""
    backend = jax.default_backend()
    wide = 8 if dtype == jnp.float64 else 4
    narrow = dtype.itemsize < wide
    old = backend == "cpu" and jax.__version_info__ < (0, 11)
    tile = size * classes * wide
    all_hidden = rows * hidden * wide
    chunk_hidden = size * hidden * wide
    padded = size * chunks != rows
    kernel = hidden * classes * wide

    # The row rule's temporaries are as large as the rows it takes at a time, or the classes.
    row_block = _tiles.rows_per_block(size, classes, backend) * classes * wide
    block = _tiles.classes_per_block(hidden, classes, backend)
    writes = len({*options, *(("where",) if padded else ())})
    if path == VALUE:
        work = row_block * (1 + writes)
    else:
        work = row_block * (2 + writes)
        if block < classes and (want_kernel or gradient_dtype(dtype, backend) != dtype):
            work = max(work, (size + hidden) * block * wide)
    work += chunk_hidden if chunks > 1 else 0
    stacked = want_hidden  # the gradients of chunks, before they are in the rows' order
    if old and not padded:
        # There they may be where they are returned; but narrow hidden states are widened.
        stacked = narrow or (want_hidden and want_kernel and all_hidden < tile)
    copies = all_hidden * (padded + stacked)
    copies = copies if chunks > 1 else 0

    # A gradient in a narrow dtype is rounded from a wide one when all is done: until then its own
    # memory is free for something else.
    buffers = [tile]
    if old and path == FORWARD and not writes:
        rows_at_once = _tiles.rows_per_block(size, classes, backend)
        if rows_at_once < size and (size % rows_at_once or rows_at_once == 1):
            buffers.append(tile)  # its rows are not replaced in place
    if old and narrow and want_hidden:
        buffers.append(kernel // 2)  # as integers
    if narrow and want_kernel:
        fits = [b for b in buffers if b <= kernel // 2]
        if fits:
            buffers.remove(max(fits))
        buffers.append(kernel)
    return sum(buffers) + work + copies
