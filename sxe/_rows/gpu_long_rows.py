"""The gradient kernel for long rows: all warpgroups of a program share one row.

A block is a range of classes of a row. Each warpgroup has a ring of slots in shared memory, and its
blocks go through these slots. A bulk copy fills a slot with a block. The kernel reads the block
twice and overwrites it with the gradient. Another bulk copy writes the gradient to memory, and the
slot takes the next block at once, possibly of the next row. So memory is always being read and
written. If a row has more blocks than slots, the first blocks are read once, give their slots to
others, and are loaded again later.

If the gradient is narrower than the logits, it has slots of its own. Dense targets have slots of
their own too, filled at the same time as those of the logits.

Reductions across warps use shared memory: see ``gpu_lanes``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from sxe._rows.gpu_choice import LANES, VECTOR_BYTES
from sxe._rows.gpu_lanes import (
    WARPS,
    add_logits,
    exp_difference,
    log1p,
    merge_lanes,
    nan_where_infinite,
    plgpu,
    store,
)
from sxe._rows.gpu_terms import (
    ItemSizes,
    Launch,
    Refs,
    add_target,
    dense_cost,
    gradient,
    merge_targets,
    rings_and_barrier,
    uniform_gap,
)

BLOCK_BYTES = 8192  # the bytes of a block of logits, which is one bulk copy
TWO_ROWS_VECTORS = 4096  # a multiprocessor holds two rows of this size, and slots for the next ones
HALF_RING_BYTES = 32 * 1024  # of each of six warpgroups, from two programs on a multiprocessor
RING_BYTES = 55 * 1024  # of each of four warpgroups, whose program may use 227 KiB
MOST_SLOTS = 8  # slots of a ring: four rings then use the 32 barriers that Pallas allows
LOG2_E = 1.4426950408889634


def long_launch(
    rows: int,
    classes: int,
    vector: int,
    *,
    cores: int,
    itemsizes: ItemSizes,
    is_label_alone: bool,
) -> Launch:
    """The launch parameters for long rows.

    A multiprocessor has 65,536 registers for all threads. A thread uses 72 registers if only a
    label has a target, and up to 120 if other classes have targets.
    """
    narrows = itemsizes.d != itemsizes.x
    fits_twice = classes <= TWO_ROWS_VECTORS * vector
    per_core, groups, ring_bytes, block_bytes = 1, 4, RING_BYTES, BLOCK_BYTES
    # If a slot holds more arrays, use smaller blocks, so that each warpgroup has several slots.
    if itemsizes.dense:
        block_bytes = BLOCK_BYTES // 2
    elif narrows:
        block_bytes = 3 * BLOCK_BYTES // 4
    elif is_label_alone and fits_twice:
        # With two programs on a multiprocessor, one computes while the other waits.
        per_core, groups, ring_bytes = 2, 3, HALF_RING_BYTES
    size = WARPS * LANES * vector
    block = min(block_bytes * vector // VECTOR_BYTES, classes // size * size)
    if narrows:
        ring_bytes -= 2 * block * itemsizes.d
    slots = min(ring_bytes // (block * (itemsizes.x + itemsizes.dense)), MOST_SLOTS)
    programs = min(rows, per_core * cores)
    return Launch(rows, classes, vector, programs, groups, slots, (block,), narrows)


class _Scratch(NamedTuple):
    """The shared memory of a program.

    Attributes:
      parts: the statistics of a row from each warp, [2, number of statistics, warps]. Rows use the
        two halves in turn, so that the previous row's statistics can still be read.
      met: the barrier that opens when all warpgroups have written their parts.
      filled: a barrier for each slot.
      x, dense: the slots for logits, and the slots for targets or None.
      d: the slots for the gradient, or None if it overwrites the logits.
    """

    parts: Any
    met: Any
    filled: Any
    x: Any
    dense: Any
    d: Any


def long_scratch(
    launch: Launch, dtype: DTypeLike, dense: DTypeLike | None, d_dtype: DTypeLike
) -> _Scratch:
    statistics = 2 if dense is None else 4
    of_d = plgpu.SMEM((2 * launch.groups, *launch.slot), d_dtype) if launch.narrows else None
    return _Scratch(
        plgpu.SMEM((2, statistics, WARPS * launch.groups), jnp.float32),
        plgpu.Barrier(num_arrivals=launch.groups),
        *rings_and_barrier(launch, (dtype, dense), copies=1),
        of_d,
    )


class _Ring(NamedTuple):
    """The order in which the blocks of a warpgroup go through its slots.

    Loads are numbered consecutively over all rows of the program. Each row has ``loads`` loads: the
    warpgroup's own blocks, of which some may be past the end of the row, and then the first blocks
    again.
    """

    launch: Launch
    refs: Refs
    scratch: _Scratch
    program: Array
    group: Array
    interprets: bool

    @property
    def block(self) -> int:
        """The number of classes of a block."""
        return self.launch.slot[0]

    @property
    def size(self) -> int:
        """The number of classes of a fragment: the part of a block in a warpgroup's registers."""
        return WARPS * LANES * self.launch.vector

    @property
    def blocks(self) -> int:
        """The number of blocks of a row. The last block ends with the row."""
        return -(-self.launch.classes // self.block)

    @property
    def overlap(self) -> int:
        """The number of classes that the last block shares with the block before it."""
        return self.blocks * self.block - self.launch.classes

    @property
    def own(self) -> int:
        return -(-self.blocks // self.launch.groups)

    @property
    def again(self) -> int:
        """The number of blocks that are read a second time."""
        return max(0, self.own - self.launch.slots)

    @property
    def loads(self) -> int:
        return self.own + self.again

    @property
    def rows(self) -> Array:
        """The number of rows of this program."""
        launch = self.launch
        return (launch.rows - self.program + launch.programs - 1) // launch.programs

    def row(self, i: Array) -> Array:
        """The index of the program's row i."""
        return self.program + i * self.launch.programs

    def slot_of(self, load: Array) -> Array:
        return self.group * self.launch.slots + lax.rem(load, self.launch.slots)

    def slot_of_d(self, load: Array) -> Array:
        return self.group * 2 + lax.rem(load, 2) if self.launch.narrows else self.slot_of(load)

    def block_of(self, n: Array) -> Array:
        """The block that load n of a row brings."""
        return self.group * self.own + jnp.where(n < self.own, n, n - self.own)

    def start_of(self, block: Array) -> Array:
        start = block * self.block
        if self.overlap:
            start = jnp.minimum(start, self.launch.classes - self.block)
        return pl.multiple_of(start, self.launch.vector)

    def skipped(self, block: Array) -> Array:
        """The number of first classes of a block that the block before it also has."""
        return jnp.where(block == self.blocks - 1, self.overlap, 0)

    def if_in_row(
        self, block: Array, then: Callable[[Any], Any], otherwise: Callable[[Any], Any], carry: Any
    ) -> Any:
        """then(carry) if the block is in the row, or otherwise(carry) if it is past the end."""
        if self.own * self.launch.groups == self.blocks:
            return then(carry)
        return lax.cond(block < self.blocks, then, otherwise, carry)

    def start_load(self, load: Array) -> None:
        i = load // self.loads
        block = self.block_of(load - i * self.loads)

        @pl.when((load < self.rows * self.loads) & (block < self.blocks))
        def start() -> None:
            (x, dense, _, _), scratch = self.refs, self.scratch
            row, slot = self.row(i), self.slot_of(load)
            classes = pl.ds(self.start_of(block), self.block)
            self._copy(x.at[row, classes], scratch.x.at[slot], scratch.filled.at[slot])
            if dense is not None:
                source = dense.at[0 * row if dense.shape[0] == 1 else row, classes]
                self._copy(source, scratch.dense.at[slot], scratch.filled.at[slot])

    @staticmethod
    def _copy(source: Any, slot: Any, filled: Any) -> None:
        in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        plgpu.copy_gmem_to_smem(source, slot, filled, oob_mode=in_bounds)

    def wait_for(self, load: Array) -> None:
        plgpu.barrier_wait(self.scratch.filled.at[self.slot_of(load)])

    def read(self, slots: Any, slot: Array, fragment: int) -> Array:
        ref = slots.at[slot, pl.ds(fragment * self.size, self.size)]
        if self.interprets:  # the interpreter does not support reshaped references
            return ref[...].reshape(self.launch.fragment).astype(jnp.float32)
        ref = ref.reshape(*self.launch.fragment)
        return plgpu.load(ref, layout=self.launch.layout, optimized=False).astype(jnp.float32)

    def write(self, slots: Any, slot: Array, fragment: int, d: Array) -> None:
        ref = slots.at[slot, pl.ds(fragment * self.size, self.size)]
        if self.interprets:
            ref[...] = d.reshape(self.size)
        else:
            ref.reshape(*self.launch.fragment)[...] = d

    def is_new(self, skipped: Any, fragment: int) -> Array:
        """Whether each class of a fragment comes after the block's first ``skipped`` classes."""
        iota = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, self.launch.fragment, layout=self.launch.layout
        )
        return iota(0) * self.launch.fragment[1] + iota(1) + fragment * self.size >= skipped

    def full(self, value: Any, dtype: DTypeLike = jnp.float32) -> Array:
        array = jnp.full(self.launch.fragment, value, dtype)
        return plgpu.layout_cast(array, self.launch.layout)


def long_rows(launch: Launch, refs: Refs, scratch: _Scratch, *, interpret: bool) -> None:
    """The body of the kernel."""
    program, group = lax.axis_index("program"), lax.axis_index("group")
    ring = _Ring(launch, refs, scratch, program, group, interpret)

    def process(i: Array, _: Any) -> None:
        first_load = i * ring.loads
        lanes = _read_row(ring, first_load)
        state, targets = _meet(ring, lanes, lax.rem(i, 2))
        _write_row(ring, first_load, _row_of(ring, ring.row(i), state, targets))

    lax.fori_loop(0, launch.slots, lambda load, _: ring.start_load(load), None)
    lax.fori_loop(0, ring.rows, process, None)
    plgpu.wait_smem_to_gmem(0)


def _read_row(ring: _Ring, first_load: Array) -> tuple[Any, Any]:
    """The lanes' states, and (largest, rest) of their targets, from this warpgroup's blocks."""
    slots = ring.scratch

    def add_fragment(slot: Array, j: int, skipped: int, lanes: Any) -> Any:
        (state, of_targets), is_masked = lanes, j * ring.size < skipped

        def read(slots: Any, neutral: float) -> Array:
            a = ring.read(slots, slot, j)
            return jnp.where(ring.is_new(skipped, j), a, neutral) if is_masked else a

        state = add_logits(read(slots.x, -jnp.inf), state)
        if slots.dense is not None:
            of_targets = add_target(read(slots.dense, 0.0), of_targets)
        return state, of_targets

    def add_block(n: Array, lanes: Any) -> Any:
        block = ring.block_of(n)

        def add(lanes: Any) -> Any:
            ring.wait_for(first_load + n)

            def fragments(skipped: int, lanes: Any) -> Any:
                for j in range(skipped // ring.size, ring.block // ring.size):
                    lanes = add_fragment(ring.slot_of(first_load + n), j, skipped, lanes)
                return lanes

            whole = functools.partial(fragments, 0)
            if not ring.overlap:
                return whole(lanes)
            ragged = functools.partial(fragments, ring.overlap)
            return lax.cond(block == ring.blocks - 1, ragged, whole, lanes)

        lanes = ring.if_in_row(block, add, lambda lanes: lanes, lanes)
        if ring.again:

            @pl.when(n < ring.again)
            def load_next() -> None:
                plgpu.commit_smem()  # the next copy must not start before these reads finish
                ring.start_load(first_load + n + ring.launch.slots)

        return lanes

    zero = ring.full(0.0)
    of_targets = () if slots.dense is None else (zero, zero)
    start = (ring.full(-jnp.inf), ring.full(-1.0)), of_targets
    lanes: tuple[Any, Any] = lax.fori_loop(0, ring.own, add_block, start)
    return lanes


def _meet(
    ring: _Ring, lanes: tuple[Any, Any], turn: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """The row's state, and (largest, rest) of its targets, merged from all warps."""
    (state, of_targets), parts = lanes, ring.scratch.parts
    warps_here, warps = pl.ds(WARPS * ring.group, WARPS), WARPS * ring.launch.groups
    parts[turn, 0, warps_here], parts[turn, 1, warps_here] = merge_lanes(*state)
    if of_targets:
        parts[turn, 2, warps_here], parts[turn, 3, warps_here] = merge_targets(*of_targets)
    plgpu.barrier_arrive(ring.scratch.met)
    plgpu.barrier_wait(ring.scratch.met)
    m = functools.reduce(jnp.maximum, [parts[turn, 0, j] for j in range(warps)])
    rest, tops = jnp.float32(0), jnp.float32(-1)
    for j in range(warps):
        of_warp, r_of_warp = parts[turn, 0, j], parts[turn, 1, j]
        is_top = of_warp == m
        rest += jnp.where(is_top, r_of_warp, (1 + r_of_warp) * exp_difference(of_warp, m))
        tops += jnp.where(is_top, 1.0, 0.0)
    of_row = m, nan_where_infinite(m, rest + tops)
    if not of_targets:
        return of_row, None
    targets = parts[turn, 2, 0], parts[turn, 3, 0]
    for j in range(1, warps):
        largest, others = add_target(parts[turn, 2, j], targets)
        targets = largest, others + parts[turn, 3, j]
    return of_row, targets


class _Row(NamedTuple):
    """The scalars for the gradient of a row.

    Attributes:
      number: its index among all rows.
      m, r, log1p_r: its state.
      label, label_target, uniform: its targets, as in ``RowTerms``.
      largest, others: for a class with the target t, largest + others - t is the sum of the targets
        of all other classes, without the label's own target.
      scales: the cotangents of loss and lse, divided by 1 + r.
      has_gradient: int32.
    """

    number: Array
    m: Array
    r: Array
    log1p_r: Array
    label: Array
    label_target: Array
    uniform: Array
    largest: Array
    others: Array
    scales: tuple[Array, Array]
    has_gradient: Array


def _row_of(
    ring: _Ring, row: Array, state: tuple[Array, Array], targets: tuple[Array, Array] | None
) -> _Row:
    """Collects the scalars of a row, and stores its results. All warpgroups store the same."""
    (m, r), terms, found = state, ring.refs.terms, ring.refs.found
    found.state.m[row], found.state.r[row] = m, r
    label_target = jnp.float32(1) if terms.label_target is None else terms.label_target[row]
    uniform = jnp.float32(0) if terms.uniform is None else terms.uniform[row]
    largest, others = uniform, (ring.launch.classes - 1) * uniform
    if targets is not None:
        largest, others = targets
        found.total[row] = largest + others
    log1p_r = log1p(r)
    g, g_lse = terms.weight[row], terms.lse_weight[row] * (m + log1p_r)
    g += 0 * (largest + others)  # NaN where the sum of targets is not finite
    return _Row(
        row,
        *(m, r, log1p_r),
        *(terms.label[row], label_target, uniform),
        *(largest, others),
        (g / (1 + r), g_lse / (1 + r)),
        terms.has_gradient[row],
    )


def _exp(x: Array, m: Array) -> Array:
    """exp(x - m) in few instructions, with a relative error of about |x - m| 2^-23."""
    return jnp.exp2((x - m) * LOG2_E)


def _write_row(ring: _Ring, first_load: Array, row: _Row) -> None:
    """Writes the gradient of the blocks that are still in the ring, and then of those read again.

    Also stores each warp's part of the cost of the targets of classes.
    """
    gap_ref = ring.refs.found.gap

    def differentiate(i: Array, gap: Any) -> Any:
        n = ring.again + i
        block, load = ring.block_of(n), first_load + n

        def write_block(gap: Any) -> Any:
            if ring.again:

                @pl.when(n >= ring.own)
                def wait() -> None:
                    ring.wait_for(load)

            return _write_block(ring, load, block, (row, gap))

        def wait_for_last(gap: Any) -> Any:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return gap

        gap = ring.if_in_row(block, write_block, wait_for_last, gap)

        @pl.when(i > 0)
        def load_freed() -> None:
            ring.start_load(load - 1 + ring.launch.slots)

        return gap

    start = () if gap_ref is None else ring.full(0.0)
    gap = lax.fori_loop(0, ring.own, differentiate, start)
    if gap_ref is not None:
        warps_here = pl.ds(WARPS * ring.group, WARPS)
        store(gap_ref.at[row.number, warps_here], jnp.sum(gap, axis=1))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    ring.start_load(first_load + ring.loads - 1 + ring.launch.slots)


def _write_block(ring: _Ring, load: Array, block: Array, row_and_gap: tuple[_Row, Any]) -> Any:
    """Writes the gradient of one block, and adds its costs to the gap of the lanes."""
    (row, gap), slots, found = row_and_gap, ring.scratch, ring.refs.found
    slot, slot_of_d = ring.slot_of(load), ring.slot_of_d(load)
    out = slots.d if ring.launch.narrows else slots.x
    k = row.label - ring.start_of(block)
    has_label = (k >= 0) & (k < ring.block)  # two blocks may have it, because blocks may overlap
    k = jnp.where(has_label, k, 0)
    # All warps must read this before any warp writes. JAX puts a barrier before each store.
    x_label = slots.x[slot, k].astype(jnp.float32)
    t_label = row.uniform if slots.dense is None else slots.dense[slot, k].astype(jnp.float32)
    is_kept = ring.full(row.has_gradient, jnp.int32) != 0
    scale_alone = row.scales[0] + row.scales[1]

    for j in range(ring.block // ring.size):
        x = ring.read(slots.x, slot, j)
        e = _exp(x, row.m)
        if found.gap is None:
            d = e * scale_alone  # D7 for a class without a target, with T = 1
        else:
            if slots.dense is None:
                t, cost = row.uniform, uniform_gap(x, row.uniform, row.m, row.log1p_r)
            else:
                t = ring.read(slots.dense, slot, j)
                cost = dense_cost(x, t, row.m)
            if ring.overlap:
                cost = jnp.where(ring.is_new(ring.skipped(block), j), cost, 0.0)
            gap += cost
            others = row.others + (row.largest - t) + row.label_target
            d = gradient(e, (t, others), row.r, row.scales)
        d = jnp.where(is_kept, d, 0.0).astype(found.d.dtype)
        ring.write(out, slot_of_d, j, d)

    @pl.when(has_label)
    def put_label() -> None:
        found.x_label[row.number] = x_label
        t = t_label + row.label_target, row.others + (row.largest - t_label)
        d = gradient(jnp.exp(x_label - row.m), t, row.r, row.scales)
        d = jnp.where(row.has_gradient != 0, d, 0.0).astype(found.d.dtype)
        out[slot_of_d, k] = d

    plgpu.commit_smem()
    target = found.d.at[row.number, pl.ds(ring.start_of(block), ring.block)]
    plgpu.copy_smem_to_gmem(out.at[slot_of_d], target)
    # Wait until all copies except this one have left the ring, so that the previous slot is free.
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    return gap
