"""The state kernel for NVIDIA GPUs: the state (m, r) of rows, from a single read of the logits.

XLA reads the logits twice: for the maximum and for the sums. In this kernel, each of the four warps
of a warpgroup processes one row, or a part of its classes. A lane loads vectors of logits. For each
position of the vector it keeps a state, and merges every new vector into these states.

Each program of the grid is one warpgroup. A lane has four loads in flight, and several programs
share a multiprocessor, so that memory is always being read. Rows need not be aligned.
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

UNROLL = 4  # loads of a lane in flight at the same time
PER_CORE = 8  # programs per multiprocessor, of which six or more run at the same time


def normalize_tile(x: Array, backend: Backend) -> Normalizer:
    """The state of rows of logits, [..., K] to [...].

    XLA computes rows that have fewer classes than a warp has lanes.
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
        """Computes the rows of all examples in a single call, so that no warp is idle."""
        return tuple(normalize_tile(x, backend)), (True, True)

    return Normalizer(*of_rows(x))


def state(x: Array, *, cores: int, interpret: bool = False) -> Normalizer:
    """(m, r) [N] of logits [N, K] in bfloat16, float16 or float32, with K >= 32."""
    N, K = x.shape
    # If there are fewer rows than warps in a warpgroup, add rows of zeros. The copy is small.
    x = jnp.pad(x, ((0, max(0, WARPS - N)), (0, 0)))
    rows = len(x)
    widest = VECTOR_BYTES // x.dtype.itemsize
    # The length of a vector has to divide K, because a vector may not cross the end of a row.
    vector = next(n for n in (8, 4, 2, 1) if n <= widest and K % n == 0 and LANES * n <= K)
    teams = -(-rows // WARPS)
    steps = -(-K // (LANES * vector))  # steps of a row
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
    # The last team may share rows with the team before it. Both write the same values.
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
        """A masked step. The last step ends with the row, and masks logits of earlier steps."""
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
    # A part with only -inf is the identity of merge.
    r = jnp.where(m == -jnp.inf, -1.0, nan_where_infinite(m, r))
    store(m_ref.at[part, rows], m)
    store(r_ref.at[part, rows], r)
