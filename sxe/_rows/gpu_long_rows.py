"""The gradient kernel's long rows: all warpgroups of a program share one.

A block is some classes of a row. Blocks go through a ring of slots in shared memory. A slot is
filled by a bulk copy, read twice, overwritten with the gradient, and emptied by a bulk copy. It
then takes the next block at once, which may be of the next row, so that memory is read and written
at all times. A gradient that is narrower than the logits has slots of its own. Targets of classes
have slots beside those of the logits, which are filled at the same time.

What crosses warps goes through shared memory: see ``gpu_lanes``.
"""

import functools
from typing import Any

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

BLOCK_BYTES = 8192  # of a row, for one bulk copy
TWO_ROWS_VECTORS = 4096  # a multiprocessor holds two rows of so many, and slots for the next ones
RING_BYTES = 55 * 1024  # of one of four warpgroups, which share 227 KiB
MOST_SLOTS = 8  # of a ring
LOG2_E = 1.4426950408889634


def long_launch(
    rows: int, classes: int, vector: int, *, cores: int, of: Bytes, is_label_alone: bool
) -> Launch:
    """How long rows are divided.

    A multiprocessor has 227 KiB of shared memory, and 65,536 registers for all threads. A thread
    takes 72 where a label alone has a target, and up to 96 where other classes have one.
    """
    size, narrows, slot_bytes = WARPS * LANES * vector, of.d != of.x, of.x + of.dense
    # Two programs on a multiprocessor hide each other's waiting, if it holds the rows of both: six
    # warpgroups together, each with a ring of 32 KiB. One program has four.
    if is_label_alone and not narrows and classes <= TWO_ROWS_VECTORS * vector:
        per_core, groups, ring_bytes, block_bytes = 2, 3, 32 * 1024, BLOCK_BYTES
    else:
        per_core, groups, ring_bytes, block_bytes = 1, 4, RING_BYTES, BLOCK_BYTES
    if narrows:
        block_bytes = 3 * BLOCK_BYTES // 4
    if of.dense:
        block_bytes = BLOCK_BYTES // 2
    block = min(block_bytes * vector // VECTOR_BYTES, classes // size * size)
    ring_bytes -= 2 * block * of.d if narrows else 0
    slots = min(ring_bytes // (block * slot_bytes), MOST_SLOTS)
    programs = min(rows, per_core * cores)
    return Launch(rows, classes, vector, programs, groups, slots, (block,), narrows)


def long_scratch(
    launch: Launch, dtype: DTypeLike, dense: DTypeLike | None, d_dtype: DTypeLike
) -> tuple[Any, ...]:
    """What warpgroups tell each other, slots of the gradient if it has its own, and the rings."""
    statistics = 2 if dense is None else 4
    parts = plgpu.SMEM((2, statistics, WARPS * launch.groups), jnp.float32)
    met = plgpu.Barrier(num_arrivals=launch.groups)
    of_d = (plgpu.SMEM((2 * launch.groups, *launch.slot), d_dtype),) if launch.narrows else ()
    return parts, met, *of_d, *scratch(launch, (dtype, dense), 1)


def _exp(x: Array, m: Array) -> Array:
    """exp(x - m) for a gradient: in few instructions, and off by about |x - m| 2^-23."""
    return jnp.exp2((x - m) * LOG2_E)


def _merge_warps(parts: Any, turn: Array, warps: int) -> tuple[Array, Array]:
    """The state of a row, from those of all warps, which ``parts`` holds."""
    m = functools.reduce(jnp.maximum, [parts[turn, 0, j] for j in range(warps)])
    rest, tops = jnp.float32(0), jnp.float32(-1)
    for j in range(warps):
        of_warp, r_of_warp = parts[turn, 0, j], parts[turn, 1, j]
        is_top = of_warp == m
        rest += jnp.where(is_top, r_of_warp, (1 + r_of_warp) * exp_difference(of_warp, m))
        tops += jnp.where(is_top, 1.0, 0.0)
    return m, nan_where_infinite(m, rest + tops)


def _merge_warps_targets(parts: Any, turn: Array, warps: int) -> tuple[Array, Array]:
    """(largest, rest) of a row's targets, likewise."""
    found = parts[turn, 2, 0], parts[turn, 3, 0]
    for j in range(1, warps):
        largest, rest = add_target(parts[turn, 2, j], found)
        found = largest, rest + parts[turn, 3, j]
    return found


def long_rows(launch: Launch, given: Given, scratch: tuple[Any, ...], *, interpret: bool) -> None:
    x_ref, dense_ref, terms, found = given
    parts, met, *rest_of_scratch = scratch
    filled, ring, *rings = rest_of_scratch[launch.narrows :]
    out = rest_of_scratch[0] if launch.narrows else ring  # slots of the gradient
    first_row, group = lax.axis_index("program"), lax.axis_index("group")
    K, slots, (block,) = launch.classes, launch.slots, launch.slot
    fragment, layout = launch.fragment, launch.layout
    size = fragment[0] * fragment[1]
    blocks = -(-K // block)  # of a row. The last one ends with the row, and may overlap.
    overlap = blocks * block - K
    own = -(-blocks // launch.groups)  # blocks of this warpgroup, some of them past the end
    again = max(0, own - slots)  # blocks that are read a second time
    loads = own + again  # of a row
    rows = (launch.rows - first_row + launch.programs - 1) // launch.programs
    warps, warps_here = WARPS * launch.groups, pl.ds(WARPS * group, WARPS)

    def slot_of(n: Array) -> Array:
        return group * slots + lax.rem(n, slots)

    def block_of(n: Array) -> Array:
        """The block of a row that its load number n brings."""
        return group * own + jnp.where(n < own, n, n - own)

    def start_of(b: Array) -> Array:
        start = b * block
        return pl.multiple_of(jnp.minimum(start, K - block) if overlap else start, launch.vector)

    def load(n: Array) -> None:
        """Starts load number n of this warpgroup, counted over all of its rows."""
        i = n // loads
        b = block_of(n - i * loads)

        @pl.when((n < rows * loads) & (b < blocks))
        def start() -> None:
            slot, row = slot_of(n), first_row + i * launch.programs
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            )
            classes = pl.ds(start_of(b), block)
            copy(x_ref.at[row, classes], ring.at[slot], filled.at[slot])
            for dense_ring in rings:
                row_of_targets = 0 * row if dense_ref.shape[0] == 1 else row
                source = dense_ref.at[row_of_targets, classes]
                copy(source, dense_ring.at[slot], filled.at[slot])

    def out_slot_of(n: Array) -> Array:
        return group * 2 + lax.rem(n, 2) if launch.narrows else slot_of(n)

    def fragment_of(ref: Any, slot: Array, i: int) -> Any:
        return ref.at[slot, pl.ds(i * size, size)]

    def read(ring: Any, slot: Array, i: int) -> Array:
        ref = fragment_of(ring, slot, i)
        if interpret:  # it has no reshaped references
            return ref[...].reshape(fragment).astype(jnp.float32)
        x = plgpu.load(ref.reshape(*fragment), layout=layout, optimized=False)
        return x.astype(jnp.float32)

    def write(slot: Array, i: int, d: Array) -> None:
        ref = fragment_of(out, slot, i)
        if interpret:
            ref[...] = d.reshape(size)
        else:
            ref.reshape(*fragment)[...] = d

    def full(value: float) -> Array:
        return plgpu.layout_cast(jnp.full(fragment, value, jnp.float32), layout)

    def is_new(skipped: Any, i: int) -> Array:
        """Of fragment i of a block, which classes are not among its first ``skipped`` ones."""
        k = plgpu.broadcasted_iota(jnp.int32, fragment, 0, layout=layout) * fragment[1]
        k += plgpu.broadcasted_iota(jnp.int32, fragment, 1, layout=layout)
        return k + i * size >= skipped

    def process_row(i: Array, _: Any) -> None:
        row, begin = first_row + i * launch.programs, i * loads

        def add_block(n: Array, lanes: Any) -> Any:
            b = block_of(n)

            def add(lanes: Any) -> Any:
                slot = slot_of(begin + n)
                plgpu.barrier_wait(filled.at[slot])

                def fragments(skipped: int, lanes: Any) -> Any:
                    state, *of_targets = lanes
                    for j in range(skipped // size, block // size):
                        read_all = [(ring, -jnp.inf), *((of, 0.0) for of in rings)]
                        x, *ts = [
                            jnp.where(is_new(skipped, j), read(of, slot, j), neutral)
                            if j * size < skipped
                            else read(of, slot, j)
                            for of, neutral in read_all
                        ]
                        state = add_logits(x, state)
                        of_targets = [*map(add_target, ts, of_targets)]
                    return state, *of_targets

                if not overlap:
                    return fragments(0, lanes)
                last = b == blocks - 1
                return lax.cond(
                    last,
                    functools.partial(fragments, overlap),
                    functools.partial(fragments, 0),
                    lanes,
                )

            if own * launch.groups == blocks:
                lanes = add(lanes)
            else:
                lanes = lax.cond(b < blocks, add, lambda lanes: lanes, lanes)
            if again:

                @pl.when(n < again)
                def load_next() -> None:
                    plgpu.commit_smem()  # a copy may not overtake what was read before it
                    load(begin + n + slots)

            return lanes

        start = (full(-jnp.inf), full(-1.0)), *((full(0.0), full(0.0)) for _ in rings)
        lanes, *lanes_of_targets = lax.fori_loop(0, own, add_block, start)
        # The states of all warps, by way of shared memory. It is written anew for each row, so
        # that the one before may still be read.
        turn = lax.rem(i, 2)
        parts[turn, 0, warps_here], parts[turn, 1, warps_here] = merge_lanes(*lanes)
        for of in lanes_of_targets:
            parts[turn, 2, warps_here], parts[turn, 3, warps_here] = merge_targets(*of)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        m, r = _merge_warps(parts, turn, warps)
        log1p_r = log1p(r)
        found.state.m[row], found.state.r[row] = m, r  # all warpgroups write the same
        label, has_gradient = terms.label[row], terms.has_gradient[row]
        g, g_lse = terms.weight[row], terms.lse_weight[row] * (m + log1p_r)
        largest = others = uniform = jnp.float32(0)
        label_target = jnp.float32(1)
        if terms.label_target is not None:
            label_target = terms.label_target[row]
        if terms.uniform is not None:
            largest = uniform = terms.uniform[row]
            others = (K - 1) * uniform
        if rings:
            largest, others = _merge_warps_targets(parts, turn, warps)
            found.total[row] = largest + others
        scales = g / (1 + r), g_lse / (1 + r)
        scale = (g + g_lse) / (1 + r)
        kept = plgpu.layout_cast(jnp.full(fragment, has_gradient, jnp.int32), layout) != 0

        def differentiate(n: Array, gap: Any) -> Any:
            """Of the blocks that are still in the ring first, and then of those read again."""
            number = again + n
            b = block_of(number)

            def write_gradient(gap: Any) -> Any:
                slot, out_slot = slot_of(begin + number), out_slot_of(begin + number)
                if again:

                    @pl.when(number >= own)
                    def wait() -> None:
                        plgpu.barrier_wait(filled.at[slot])

                k = label - start_of(b)
                here = (k >= 0) & (k < block)  # where two blocks overlap, in both of them
                k = jnp.where(here, k, 0)
                # All warps have read it before one writes: JAX puts a barrier before a store.
                x_label = ring[slot, k].astype(jnp.float32)
                t_label = rings[0][slot, k].astype(jnp.float32) if rings else uniform
                skipped = jnp.where(b == blocks - 1, overlap, 0)
                for j in range(block // size):
                    x = read(ring, slot, j)
                    e = _exp(x, m)
                    if terms.label_target is None:
                        d = e * scale  # D7, t = 0 and T = 1
                    else:
                        if rings:
                            t = read(rings[0], slot, j)
                            more = dense_gap(x, t, m)
                        else:
                            t, more = uniform, uniform_gap(x, uniform, m, log1p_r)
                        gap += jnp.where(is_new(skipped, j), more, 0.0) if overlap else more
                        d = gradient(e, (t, others + (largest - t) + label_target), r, scales)
                    write(out_slot, j, jnp.where(kept, d, 0.0).astype(found.d.dtype))

                @pl.when(here)
                def put_label() -> None:
                    found.x_label[row] = x_label
                    t = t_label + label_target, others + (largest - t_label)
                    d = gradient(jnp.exp(x_label - m), t, r, scales)
                    out[out_slot, k] = jnp.where(has_gradient != 0, d, 0.0).astype(found.d.dtype)

                plgpu.commit_smem()
                target = found.d.at[row, pl.ds(start_of(b), block)]
                plgpu.copy_smem_to_gmem(out.at[out_slot], target)

                # All copies but this one have left the ring, so that the slot before is free.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                return gap

            def wait_for_last(gap: Any) -> Any:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                return gap

            if own * launch.groups == blocks:
                gap = write_gradient(gap)
            else:
                gap = lax.cond(b < blocks, write_gradient, wait_for_last, gap)

            @pl.when(n > 0)
            def load_freed() -> None:
                load(begin + number - 1 + slots)

            return gap

        gap = lax.fori_loop(0, own, differentiate, () if found.gap is None else full(0.0))
        if found.gap is not None:
            store(found.gap.at[row, warps_here], jnp.sum(gap, axis=1))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        load(begin + loads - 1 + slots)

    lax.fori_loop(0, slots, lambda n, _: load(n), None)
    lax.fori_loop(0, rows, process_row, None)
    plgpu.wait_smem_to_gmem(0)
