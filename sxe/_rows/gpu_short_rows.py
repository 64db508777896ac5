"""The gradient kernel for short rows: one row per warp, with all of its exponentials in registers.

Each slot of the ring holds four rows at a time. The kernel may read a slot several times.
"""

import functools
import math
from typing import Any, NamedTuple

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
    ItemSizes,
    Launch,
    Refs,
    RowTerms,
    add_target,
    dense_cost,
    gradient,
    merge_targets,
    rings_and_barrier,
    uniform_gap,
)

RINGS_BYTES = 200 * 1024  # of the 227 KiB of shared memory that a program may use


def short_launch(
    rows: int, classes: int, vector: int, *, cores: int, itemsizes: ItemSizes
) -> Launch:
    width = LANES * vector
    fours = -(-rows // WARPS)
    slot = -(-classes // width), WARPS, width
    slots = RINGS_BYTES // (math.prod(slot) * (itemsizes.x + itemsizes.dense))
    # A thread uses up to 128 of 65,536 registers. With an array of targets and 32-bit logits, it
    # uses up to 168.
    groups = 3 if itemsizes.dense and itemsizes.x == 4 else 4
    programs = min(-(-fours // groups), cores)
    return Launch(rows, classes, vector, programs, groups, min(3, slots // groups), slot)


class _Scratch(NamedTuple):
    """The shared memory of a program: a barrier for each slot, and the slots.

    ``dense``, the slots for targets, may be None.
    """

    filled: Any
    x: Any
    dense: Any


def short_scratch(launch: Launch, dtype: DTypeLike, dense: DTypeLike | None) -> _Scratch:
    # One copy for each fragment.
    return _Scratch(*rings_and_barrier(launch, (dtype, dense), copies=launch.slot[0]))


class _Team(NamedTuple):
    """A warpgroup and the rows that it processes, four in each step."""

    launch: Launch
    refs: Refs
    scratch: _Scratch
    number: Array  # the index of this warpgroup among all warpgroups
    group: Array

    @property
    def teams(self) -> int:
        return self.launch.programs * self.launch.groups

    @property
    def steps(self) -> Array:
        fours = -(-self.launch.rows // WARPS)
        return (fours - self.number + self.teams - 1) // self.teams

    @property
    def fragments(self) -> range:
        return range(self.launch.slot[0])

    @property
    def width(self) -> int:
        return self.launch.slot[2]

    def rows(self, step: Array) -> Any:
        return pl.ds((self.number + step * self.teams) * WARPS, WARPS)

    def columns(self, j: int) -> Any:
        # The slice may exceed the row, and the copy stops at the end. JAX rejects such a slice if
        # its start is a constant, so add a traced 0.
        return pl.ds(j * self.width + 0 * self.number, self.width)

    def slot(self, step: Array) -> Array:
        return self.group * self.launch.slots + lax.rem(step, self.launch.slots)

    def start_load(self, step: Array) -> None:
        @pl.when(step < self.steps)
        def start() -> None:
            (x, dense, _, _), scratch, slot = self.refs, self.scratch, self.slot(step)
            rows = rows_of_dense = self.rows(step)
            if dense is not None and dense.shape[0] < self.launch.rows:
                rows_of_dense = pl.ds(0 * self.number, WARPS)  # all rows share their targets
            for j in self.fragments:
                source = x.at[rows, self.columns(j)]
                plgpu.copy_gmem_to_smem(source, scratch.x.at[slot, j], scratch.filled.at[slot])
                if dense is not None:
                    source = dense.at[rows_of_dense, self.columns(j)]
                    to = scratch.dense.at[slot, j]
                    plgpu.copy_gmem_to_smem(source, to, scratch.filled.at[slot])

    def wide(self, a: Array) -> Array:
        """Broadcasts an array [4] to the shape of a fragment in registers."""
        return lax.broadcast_in_dim(a, self.launch.fragment, (0,))

    def terms(self, step: Array) -> RowTerms:
        def of_rows(ref: Any) -> Array:
            layout = self.launch.layout.reduce(1)
            return self.wide(plgpu.load(ref.at[self.rows(step)], layout=layout, optimized=False))

        terms: RowTerms = jax.tree.map(of_rows, self.refs.terms)
        return terms

    def iota(self) -> Array:
        fragment, layout = self.launch.fragment, self.launch.layout
        return plgpu.broadcasted_iota(jnp.int32, fragment, 1, layout=layout)

    def inside(self, j: int, a: Array, outside: float) -> Array:
        """a, with ``outside`` past the end of the row."""
        if (j + 1) * self.width <= self.launch.classes:
            return a
        return jnp.where(self.iota() < self.launch.classes - j * self.width, a, outside)

    def read(self, slots: Any, slot: Array, j: int, *, outside: float) -> Array:
        a = plgpu.load(slots.at[slot, j], layout=self.launch.layout, optimized=False)
        return self.inside(j, a.astype(jnp.float32), outside)

    def x(self, slot: Array, j: int) -> Array:
        return self.read(self.scratch.x, slot, j, outside=-jnp.inf)

    def dense(self, slot: Array, j: int) -> Array:
        return self.read(self.scratch.dense, slot, j, outside=0.0)

    def zero(self) -> Array:
        array = jnp.zeros(self.launch.fragment, jnp.float32)
        return plgpu.layout_cast(array, self.launch.layout)

    def store(self, ref: Any, step: Array, of_rows: Array) -> None:
        store(ref.at[self.rows(step)], of_rows)


def short_rows(launch: Launch, refs: Refs, scratch: _Scratch) -> None:
    """The body of the kernel."""
    group = lax.axis_index("group")
    number = lax.axis_index("program") * launch.groups + group
    team = _Team(launch, refs, scratch, number, group)

    def process(step: Array, _: Any) -> None:
        terms = team.terms(step)
        plgpu.barrier_wait(team.scratch.filled.at[team.slot(step)])
        state, es = _state(team, step, terms.label)
        # The previous gradient was copied from its slot while these exponentials were computed.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(step > 0)
        def load_freed() -> None:
            team.start_load(step - 1 + launch.slots)

        _write_gradient(team, step, terms, (state, es))

    lax.fori_loop(0, launch.slots, lambda step, _: team.start_load(step), None)
    lax.fori_loop(0, team.steps, process, None)
    plgpu.wait_smem_to_gmem(0)


def _total(of_lanes: Array) -> Array:
    return jnp.sum(of_lanes, axis=1)


def _state(team: _Team, step: Array, label: Array) -> tuple[tuple[Array, Array], list[Array]]:
    """(m, r) of each row, broadcast, and the exponentials of each fragment. Stores the results."""
    slot, found, k = team.slot(step), team.refs.found, team.iota()
    xs = [team.x(slot, j) for j in team.fragments]
    top = jnp.max(functools.reduce(jnp.maximum, xs), axis=1)
    m, es = team.wide(top), []
    rest = count = x_label = team.zero()
    for j in team.fragments:
        x = team.x(slot, j)
        e = exp_difference(x, m)
        # As in ``normalizer``: near the maximum, add 1 to a count and e - 1 to a sum.
        near = jnp.where(x >= m - 0.25, 1.0, 0.0)
        rest, count = rest + (e - near), count + near
        x_label = x_label + jnp.where(k == label - j * team.width, x, 0.0)
        es.append(e)
    r = nan_where_infinite(top, _total(rest) + (_total(count) - 1))
    team.store(found.state.m, step, top)
    team.store(found.state.r, step, r)
    team.store(found.x_label, step, _total(x_label))
    return (m, team.wide(r)), es


def _targets(team: _Team, step: Array) -> tuple[Array, Array]:
    """(largest, rest) of the dense targets, broadcast. Stores the sum of the targets."""
    lanes = team.zero(), team.zero()
    for j in team.fragments:
        lanes = add_target(team.dense(team.slot(step), j), lanes)
    largest, rest = merge_targets(*lanes)
    team.store(team.refs.found.total, step, largest + rest)
    return team.wide(largest), team.wide(rest)


def _write_gradient(
    team: _Team, step: Array, terms: RowTerms, state_and_es: tuple[tuple[Array, Array], list[Array]]
) -> None:
    """Writes the gradient. Stores the cost of the targets of classes, if there are any."""
    ((m, r), es), slots, found = state_and_es, team.scratch, team.refs.found
    slot, k = team.slot(step), team.iota()
    label, has_gradient, g, g_lse, label_target, uniform = terms
    log1p_r, gap = log1p(r), team.zero()
    largest = rest = None
    if slots.dense is not None:
        largest, rest = _targets(team, step)
        g = g + 0 * (largest + rest)  # NaN where the sum of targets is not finite
    scales = g / (1 + r), g_lse * (m + log1p_r) / (1 + r)
    for j, e in enumerate(es):
        is_label = k == label - j * team.width
        if label_target is None:
            d = jnp.where(is_label, (e - 1) - r, e) * scales[0] + e * scales[1]  # D7 with T = 1
        else:
            x = team.x(slot, j)
            if largest is not None and rest is not None:
                t = team.dense(slot, j)
                cost, others = dense_cost(x, t, m), rest + (largest - t)
            else:
                assert uniform is not None
                t, others = uniform, (team.launch.classes - 1) * uniform
                cost = team.inside(j, uniform_gap(x, uniform, m, log1p_r), 0.0)
            gap = gap + cost
            others = jnp.where(is_label, others, others + label_target)
            t = jnp.where(is_label, t + label_target, t)
            d = gradient(e, (t, others), r, scales)
        slots.x[slot, j] = jnp.where(has_gradient != 0, d, 0.0).astype(found.d.dtype)
    plgpu.commit_smem()
    for j in team.fragments:
        plgpu.copy_smem_to_gmem(
            slots.x.at[slot, j],
            found.d.at[team.rows(step), team.columns(j)],
            commit_group=j == len(team.fragments) - 1,
        )
    if label_target is not None:
        team.store(found.gap, step, _total(gap))
