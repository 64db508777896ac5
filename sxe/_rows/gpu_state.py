"""The state kernel for NVIDIA GPUs: the state (m, r) of rows of logits, from one read of them.

XLA reads the logits twice, for the maximum and for the sums. Here each of the four warps of a
warpgroup has a row, or a part of its classes, and each lane keeps a state of its own for every
logit of a vector, which the next vector is merged into. A warpgroup is a program of the grid. It
keeps four loads of a lane in flight, and several programs share a multiprocessor, so that memory is
read at all times. Nothing here needs rows to be aligned.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl

from sxe._backend import Backend
from sxe._rows.gpu_choice import LANES, VECTOR_BYTES, has_state_kernel
from sxe._rows.gpu_lanes import (
    WARPS,
    add_logits,
    fragment_layout,
    merge_lanes,
    nan_where_infinite,
    plgpu,
    run,
    store,
)
from sxe._rows.normalizer import Normalizer, merge_parts
from sxe._rows.normalizer import normalize_tile as plain_twin

UNROLL = 4  # loads of a lane that are in flight together
PER_CORE = 8  # programs for each multiprocessor, of which six or more run at a time


def normalize_tile(x: Array, backend: Backend) -> Normalizer:
    """The state of rows of logits, [..., K] to [...].

    Rows of fewer classes than a warp has lanes are left to XLA.
    """
    if x.size == 0 or not has_state_kernel(x.shape[-1]):
        return plain_twin(x, backend)

    @custom_vmap
    def of_rows(x: Array) -> tuple[Array, ...]:
        found = state(
            x.reshape(-1, x.shape[-1]), cores=backend.cores, interpret=backend.interprets_kernels
        )
        return tuple(a.reshape(x.shape[:-1]) for a in found)

    @of_rows.def_vmap
    def of_examples(size: int, is_mapped: list[bool], x: Array) -> tuple[tuple[Array, ...], Any]:
        """Rows of all examples are rows of one call, in which no warp is without one."""
        return tuple(normalize_tile(x, backend)), (True, True)

    return Normalizer(*of_rows(x))


def state(x: Array, *, cores: int, interpret: bool = False) -> Normalizer:
    """(m, r) [N] of logits [N, K], bfloat16, float16 or float32, of 32 classes or more."""
    N, K = x.shape
    # With fewer rows than a warpgroup has warps, rows of zeros are added. The copy is small.
    x = jnp.pad(x, ((0, max(0, WARPS - N)), (0, 0)))
    rows = len(x)
    widest = VECTOR_BYTES // x.dtype.itemsize
    # A vector may not cross the end of a row, so that its length divides K.
    vector = next(n for n in (8, 4, 2, 1) if n <= widest and K % n == 0 and LANES * n <= K)
    teams = -(-rows // WARPS)
    steps = -(-K // (LANES * vector))  # of a row
    parts = max(1, min(-(-PER_CORE * cores // teams), steps // (4 * UNROLL)))
    of_parts = jax.ShapeDtypeStruct((parts, rows), jnp.float32)
    m, r = run(
        functools.partial(_rows, (rows, K), vector, -(-steps // parts)),
        [x],
        results=[of_parts, of_parts],
        grid={"part": parts, "team": teams},
        interpret=interpret,
    )
    return merge_parts(Normalizer(m[:, :N], r[:, :N]))


def _rows(
    shape: tuple[int, int], vector: int, steps_of_part: int, x_ref: Any, m_ref: Any, r_ref: Any
) -> None:
    """The state of a part of four rows."""
    N, K = shape
    part, team = lax.axis_index("part"), lax.axis_index("team")
    # The last team may have rows of the one before it, and then writes the same.
    rows = pl.ds(jnp.minimum(team * WARPS, N - WARPS), WARPS)
    size = LANES * vector
    first = part * steps_of_part
    layout = fragment_layout(vector)

    def full(value: float) -> Array:
        return plgpu.layout_cast(jnp.full((WARPS, size), value, jnp.float32), layout)

    def read(start: Array) -> Array:
        x = plgpu.load(x_ref.at[rows, pl.ds(start, size)], layout=layout, optimized=False)
        return x.astype(jnp.float32)

    def step(i: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
        start = (first + i * UNROLL) * size
        for x in [read(start + j * size) for j in range(UNROLL)]:
            lanes = add_logits(x, lanes)
        return lanes

    def masked_step(i: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
        """One step. The last one of a row ends with it, and leaves out what others have."""
        begin = (first + i) * size
        start = jnp.minimum(begin, K - size)
        k = start + plgpu.broadcasted_iota(jnp.int32, (WARPS, size), 1, layout=layout)
        return add_logits(jnp.where(k >= begin, read(start), -jnp.inf), lanes)

    def at_most(steps: int) -> Array:
        return jnp.clip(steps - first, 0, steps_of_part)

    whole = at_most(K // size) // UNROLL
    lanes = lax.fori_loop(0, whole, step, (full(-jnp.inf), full(-1.0)))
    lanes = lax.fori_loop(whole * UNROLL, at_most(-(-K // size)), masked_step, lanes)
    m, r = merge_lanes(*lanes)
    # A part of -inf alone is the identity of merge.
    r = jnp.where(m == -jnp.inf, -1.0, nan_where_infinite(m, r))
    store(m_ref.at[part, rows], m)
    store(r_ref.at[part, rows], r)
