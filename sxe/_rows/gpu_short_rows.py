"""The gradient kernel's short rows: each warp has one, with all of its exponentials in registers.

Four rows at a time go through a slot of the ring. They are read there as often as it takes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from sxe._rows.gpu_choice import LANES
from sxe._rows.gpu_lanes import (
    WARPS,
    exp_difference,
    log1p,
    nan_where_infinite,
    plgpu,
    store,
)
from sxe._rows.gpu_terms import (
    Bytes,
    Given,
    Launch,
    add_target,
    dense_gap,
    gradient,
    merge_targets,
    scratch,
    uniform_gap,
)

SLOTS_BYTES = 200 * 1024  # of a multiprocessor's shared memory


def short_launch(rows: int, classes: int, vector: int, *, cores: int, of: Bytes) -> Launch:
    width = LANES * vector
    fours = -(-rows // WARPS)
    slot = -(-classes // width), WARPS, width
    most = SLOTS_BYTES // (slot[0] * WARPS * width * (of.x + of.dense))
    # With an array of targets, a thread takes up to 168 registers for logits of 32 bits, else 128.
    groups = 3 if of.dense and of.x == 4 else 4
    slots = min(3, most // groups)
    programs = min(-(-fours // groups), cores)
    return Launch(rows, classes, vector, programs, groups, slots, slot)


def short_scratch(launch: Launch, dtype: DTypeLike, dense: DTypeLike | None) -> tuple[Any, ...]:
    # A slot is filled by a copy for each fragment.
    return scratch(launch, (dtype, dense), launch.slot[0])


def short_rows(launch: Launch, given: Given, scratch: tuple[Any, ...]) -> None:
    x_ref, dense_ref, terms, found = given
    filled, ring, *rings = scratch
    group = lax.axis_index("group")
    slots, (fragments, _, width) = launch.slots, launch.slot
    fragment, layout = launch.fragment, launch.layout
    team = lax.axis_index("program") * launch.groups + group
    teams = launch.programs * launch.groups
    steps = (-(-launch.rows // WARPS) - team + teams - 1) // teams
    shares_targets = dense_ref is not None and dense_ref.shape[0] == WARPS < launch.rows

    def rows_of(i: Array) -> Any:
        return pl.ds((team + i * teams) * WARPS, WARPS)

    def columns(j: int) -> Any:
        # A slice of a number that JAX knows may not reach past the end. The copies stop there.
        return pl.ds(j * width + 0 * team, width)

    def slot_of(i: Array) -> Array:
        return group * slots + lax.rem(i, slots)

    def load(i: Array) -> None:
        @pl.when(i < steps)
        def start() -> None:
            slot = slot_of(i)
            for j in range(fragments):
                source = x_ref.at[rows_of(i), columns(j)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, j], filled.at[slot])
                for dense_ring in rings:
                    rows = pl.ds(0 * team, WARPS) if shares_targets else rows_of(i)
                    source = dense_ref.at[rows, columns(j)]
                    plgpu.copy_gmem_to_smem(source, dense_ring.at[slot, j], filled.at[slot])

    def of_rows(ref: Any, i: Array) -> Array:
        """[4] of an array of rows."""
        return plgpu.load(ref.at[rows_of(i)], layout=layout.reduce(1), optimized=False)

    def wide(a: Array) -> Array:
        return lax.broadcast_in_dim(a, fragment, (0,))

    def total(of_lanes: Array) -> Array:
        return jnp.sum(of_lanes, axis=1)

    def step(i: Array, _: Any) -> None:
        slot = slot_of(i)
        label, has_gradient, g, g_lse, label_target, uniform = jax.tree.map(
            lambda ref: wide(of_rows(ref, i)), terms
        )
        plgpu.barrier_wait(filled.at[slot])
        k = plgpu.broadcasted_iota(jnp.int32, fragment, 1, layout=layout)
        zero = plgpu.layout_cast(jnp.zeros(fragment, jnp.float32), layout)

        def inside(j: int, a: Array, outside: float) -> Array:
            is_whole = (j + 1) * width <= launch.classes
            return a if is_whole else jnp.where(k < launch.classes - j * width, a, outside)

        def read(ring: Any, j: int, outside: float) -> Array:
            a = plgpu.load(ring.at[slot, j], layout=layout, optimized=False)
            return inside(j, a.astype(jnp.float32), outside)

        logits = functools.partial(read, ring, outside=-jnp.inf)
        top = jnp.max(functools.reduce(jnp.maximum, map(logits, range(fragments))), axis=1)
        m = wide(top)
        rest, count, x_label, es = zero, zero, zero, []
        for j in range(fragments):
            x = logits(j)
            e = exp_difference(x, m)
            # As in the plain twin: of what is near the maximum, 1 is counted, the rest is summed.
            near = jnp.where(x >= m - 0.25, 1.0, 0.0)
            rest, count = rest + (e - near), count + near
            x_label = x_label + jnp.where(k == label - j * width, x, 0.0)
            es.append(e)
        r_of_row = nan_where_infinite(top, total(rest) + (total(count) - 1))
        r, log1p_r = wide(r_of_row), wide(log1p(r_of_row))
        if rings:
            lanes = zero, zero
            for j in range(fragments):
                lanes = add_target(read(rings[0], j, 0.0), lanes)
            largest, others = merge_targets(*lanes)
            store(found.total.at[rows_of(i)], largest + others)
            largest, others = wide(largest), wide(others)
        scales, gap = (g / (1 + r), g_lse * (m + log1p_r) / (1 + r)), zero
        for j, e in enumerate(es):
            is_label = k == label - j * width
            if label_target is None:
                d = jnp.where(is_label, (e - 1) - r, e) * scales[0] + e * scales[1]  # D7, times T
            else:
                x = logits(j)
                if rings:
                    t = read(rings[0], j, 0.0)
                    gap = gap + dense_gap(x, t, m)
                    others_of = others + (largest - t)
                else:
                    t, others_of = uniform, (launch.classes - 1) * uniform
                    gap = gap + inside(j, uniform_gap(x, uniform, m, log1p_r), 0.0)
                others_of = jnp.where(is_label, others_of, others_of + label_target)
                t = jnp.where(is_label, t + label_target, t)
                d = gradient(e, (t, others_of), r, scales)
            ring[slot, j] = jnp.where(has_gradient != 0, d, 0.0).astype(found.d.dtype)
        plgpu.commit_smem()
        for j in range(fragments):
            plgpu.copy_smem_to_gmem(
                ring.at[slot, j],
                found.d.at[rows_of(i), columns(j)],
                commit_group=j == fragments - 1,
            )
        store(found.state.m.at[rows_of(i)], top)
        store(found.state.r.at[rows_of(i)], r_of_row)
        store(found.x_label.at[rows_of(i)], total(x_label))
        if label_target is not None:
            store(found.gap.at[rows_of(i)], total(gap))
        # All copies but these have left the ring, so that the slot before is free.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

        @pl.when(i > 0)
        def load_freed() -> None:
            load(i - 1 + slots)

    lax.fori_loop(0, slots, lambda i, _: load(i), None)
    lax.fori_loop(0, steps, step, None)
    plgpu.wait_smem_to_gmem(0)
