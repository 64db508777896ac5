"""The gradient kernel for NVIDIA GPUs of the Hopper generation: state and gradient of rows at once.

For logits x [N, K], labels y [N] and weights w [N], one launch computes of each row

    (m, r)              the state of ``normalizer``
    x_y                 the label's logit
    w (q_l - [l = y])   the gradient, which is D7 for a label alone; and with a z-loss, or with
                        targets that are uniform beside the label's, all of D7

A row that fits on the chip is read from memory once, and its gradient is written once. Of a row
that does not fit there, each warpgroup reads its first blocks again, soon enough that they are
still in the L2 cache: of bfloat16 rows of 131,072 classes, 64 of 256 KiB on each of 132
multiprocessors, together 8 MiB. Of float32 rows they are 320 of 512 KiB, or 336 where the gradient
is narrower, together 41 or 43 MiB. That cache holds about as much.

A block is some classes of a long row. Blocks go through a ring of slots in shared memory. A slot is
filled by a bulk copy, read twice, overwritten with the gradient, and emptied by a bulk copy. It
then takes the next block at once, which may be of the next row, so that memory is read and written
at all times. A gradient that is narrower than the logits has slots of its own. Short rows go
through a ring as well, four at a time.

A program of the grid is a CUDA block. What crosses warps goes through shared memory: see
``gpu_lanes``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from sxe._rows.gpu_choice import LANES, SHORT_CLASSES, VECTOR_BYTES
from sxe._rows.gpu_lanes import (
    WARPS,
    add_logits,
    exp_difference,
    fragment_layout,
    log1p,
    merge_lanes,
    nan_where_infinite,
    plgpu,
    run,
    store,
)
from sxe._rows.normalizer import Normalizer

BLOCK_BYTES = 8192  # of a long row, for one bulk copy
TWO_ROWS_VECTORS = 4096  # a multiprocessor holds two rows of so many, and slots for the next ones
LOG2_E = 1.4426950408889634


class RowTerms(NamedTuple):
    """What the kernel is told of rows, [N].

    Attributes:
      label: int32. It may lie outside of [0, K), and its logit may then be anything.
      has_gradient: bool. If it is False the gradient of the row is 0, whatever its logits are. Its
        state is computed all the same.
      weight: float32, g in D7. In rows of a label alone it is g T.
      lse_weight: float32. lse times this is the cotangent of the row's lse.
      label_target, uniform: float32, for targets t_k = label_target [k = label] + uniform. None in
        rows of a label alone, where t_k is T [k = label].
    """

    label: Array
    has_gradient: Array
    weight: Array
    lse_weight: Array
    label_target: Array | None = None
    uniform: Array | None = None


class Found(NamedTuple):
    """What the kernel finds.

    Attributes:
      state: of ``normalizer``, [N].
      x_label: [N], the label's logit.
      d: [N, K], the gradient.
      gap: [N], the sum of all s (m - x_k), where s is ``spread(uniform)``, or None in rows of a
        label alone.
    """

    state: Normalizer
    x_label: Any
    d: Any
    gap: Any = None


def spread(uniform: Array) -> Array:
    """By what gaps are multiplied before they are summed, so that no sum overflows: never 0."""
    return jnp.where(uniform == 0, 1.0, uniform)


def state_and_gradient(
    x: Array, terms: RowTerms, *, d_dtype: DTypeLike, cores: int, interpret: bool = False
) -> Found:
    """State and gradient of rows for which ``has_gradient_kernel`` is true.

    Args:
      x: the logits [N, K], bfloat16, float16 or float32.
      terms: what is known of their rows.
      d_dtype: of the gradient.
      cores: how many multiprocessors the GPU has.
      interpret: on a CPU, for tests.
    """
    N, K = x.shape
    is_short, d = K <= SHORT_CLASSES, jax.ShapeDtypeStruct(x.shape, d_dtype)
    sizes = N, K, VECTOR_BYTES // x.dtype.itemsize
    if is_short:
        launch = _short_launch(*sizes, cores=cores)
    else:
        launch = _long_launch(*sizes, cores=cores, narrows=d.dtype != x.dtype)
    # Short rows come four at a time, so that the arrays of rows are padded to a multiple of it.
    pad = -N % WARPS if is_short else 0
    terms = terms._replace(has_gradient=terms.has_gradient.astype(jnp.int32))
    terms = jax.tree.map(lambda a: jnp.pad(a, (0, pad)), terms)
    each: Any = jax.ShapeDtypeStruct((N + pad,), jnp.float32)
    outputs = Found(Normalizer(each, each), each, d, None if terms.uniform is None else each)
    operands = jax.tree.leaves((x, terms))
    arrays, structure = jax.tree.flatten((x, terms, outputs))

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(structure, refs[: len(arrays)])
        scratch = refs[len(arrays) :]
        if is_short:
            _short_rows(launch, given, scratch)
        else:
            _long_rows(launch, given, scratch, interpret=interpret)

    results = run(
        body,
        operands,
        results=jax.tree.leaves(outputs),
        grid={"program": launch.programs},
        groups=launch.groups,
        scratch=_scratch(launch, x.dtype, d.dtype),
        interpret=interpret,
    )
    found = jax.tree.unflatten(jax.tree.structure(outputs), results)
    return jax.tree.map(lambda a: a[:N], found)


Given = tuple[Any, RowTerms, Found]  # the arrays in memory: logits, arguments and results


class Launch(NamedTuple):
    """How rows are divided.

    Attributes:
      rows, classes: N and K.
      vector: how many logits a lane loads at once.
      programs: of the grid, each of which takes every so many rows.
      groups: warpgroups of a program.
      slots: in the ring of a warpgroup.
      slot: the shape of one: of a long row [block], of four short ones [fragments, 4, classes].
      narrows: whether the gradient has another dtype than the logits. Then it has slots of its own,
        two for each warpgroup.
    """

    rows: int
    classes: int
    vector: int
    programs: int
    groups: int
    slots: int
    slot: tuple[int, ...]
    narrows: bool = False

    @property
    def fragment(self) -> tuple[int, int]:
        """The shape of what a warpgroup has in registers: each warp has one of the four rows."""
        return WARPS, LANES * self.vector

    @property
    def layout(self) -> Any:
        return fragment_layout(self.vector)


def _scratch(launch: Launch, dtype: DTypeLike, d_dtype: DTypeLike) -> tuple[Any, ...]:
    """Shared memory: the ring and, of long rows, what warpgroups tell each other."""
    slots, is_short = launch.groups * launch.slots, len(launch.slot) > 1
    # A slot of short rows is filled by a copy for each fragment.
    copies = launch.slot[0] if is_short else 1
    ring = plgpu.SMEM((slots, *launch.slot), dtype)
    filled = plgpu.Barrier(num_barriers=slots, num_arrivals=copies)
    if is_short:
        return ring, filled
    parts = plgpu.SMEM((2, 2, WARPS * launch.groups), jnp.float32)
    met = plgpu.Barrier(num_arrivals=launch.groups)
    of_d = (plgpu.SMEM((2 * launch.groups, *launch.slot), d_dtype),) if launch.narrows else ()
    return ring, filled, parts, met, *of_d


def _exp(x: Array, m: Array) -> Array:
    """exp(x - m) for a gradient: in few instructions, and off by about |x - m| 2^-23."""
    return jnp.exp2((x - m) * LOG2_E)


# Long rows: all warpgroups of a program share one.


def _long_launch(rows: int, classes: int, vector: int, cores: int, *, narrows: bool) -> Launch:
    """How long rows are divided.

    A multiprocessor has 227 KiB of shared memory, and 65,536 registers for all threads. A thread
    takes 72.
    """
    size = WARPS * LANES * vector
    # Two programs on a multiprocessor hide each other's waiting, if it holds the rows of both: six
    # warpgroups together, each with a ring of 32 KiB.
    per_core, groups, slots, block_bytes = 2, 3, 4, BLOCK_BYTES
    if classes > TWO_ROWS_VECTORS * vector:
        per_core, groups, slots = 1, 4, 6
    if narrows:  # Of the 227 KiB, the slots of the gradient take 24.
        per_core, groups, slots, block_bytes = 1, 4, 8, 3 * BLOCK_BYTES // 4
    largest = block_bytes * vector // VECTOR_BYTES
    block = min(largest, classes // size * size)
    programs = min(rows, per_core * cores)
    return Launch(rows, classes, vector, programs, groups, slots, (block,), narrows)


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


def _long_rows(launch: Launch, given: Given, scratch: Any, *, interpret: bool) -> None:
    (x_ref, terms, found), (ring, filled, parts, met, *others) = given, scratch
    out = others[0] if launch.narrows else ring  # slots of the gradient
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
            source = x_ref.at[first_row + i * launch.programs, pl.ds(start_of(b), block)]
            slot = slot_of(n)
            plgpu.copy_gmem_to_smem(
                source,
                ring.at[slot],
                filled.at[slot],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )

    def out_slot_of(n: Array) -> Array:
        return group * 2 + lax.rem(n, 2) if launch.narrows else slot_of(n)

    def fragment_of(ref: Any, slot: Array, i: int) -> Any:
        return ref.at[slot, pl.ds(i * size, size)]

    def read(slot: Array, i: int) -> Array:
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

    def process_row(i: Array, _: Any) -> None:
        row, begin = first_row + i * launch.programs, i * loads

        def add_block(n: Array, state: Any) -> Any:
            b = block_of(n)

            def add(state: Any) -> Any:
                slot = slot_of(begin + n)
                plgpu.barrier_wait(filled.at[slot])

                def fragments(skipped: int, state: Any) -> Any:
                    for j in range(skipped // size, block // size):
                        x = read(slot, j)
                        if j * size < skipped:
                            k = (
                                plgpu.broadcasted_iota(jnp.int32, fragment, 0, layout=layout)
                                * fragment[1]
                            )
                            k += plgpu.broadcasted_iota(jnp.int32, fragment, 1, layout=layout)
                            x = jnp.where(k + j * size >= skipped, x, -jnp.inf)
                        state = add_logits(x, state)
                    return state

                if not overlap:
                    return fragments(0, state)
                last = b == blocks - 1
                return lax.cond(
                    last,
                    functools.partial(fragments, overlap),
                    functools.partial(fragments, 0),
                    state,
                )

            if own * launch.groups == blocks:
                state = add(state)
            else:
                state = lax.cond(b < blocks, add, lambda state: state, state)
            if again:

                @pl.when(n < again)
                def load_next() -> None:
                    plgpu.commit_smem()  # a copy may not overtake what was read before it
                    load(begin + n + slots)

            return state

        lanes = lax.fori_loop(0, own, add_block, (full(-jnp.inf), full(-1.0)))
        # The states of all warps, by way of shared memory. It is written anew for each row, so
        # that the one before may still be read.
        turn = lax.rem(i, 2)
        warps_here = pl.ds(WARPS * group, WARPS)
        parts[turn, 0, warps_here], parts[turn, 1, warps_here] = merge_lanes(*lanes)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        m, r = _merge_warps(parts, turn, WARPS * launch.groups)
        found.state.m[row], found.state.r[row] = m, r  # all warpgroups write the same
        label, has_gradient = terms.label[row], terms.has_gradient[row]
        g, g_lse = terms.weight[row], terms.lse_weight[row] * (m + log1p(r))
        scale = (g + g_lse) / (1 + r)
        kept = plgpu.layout_cast(jnp.full(fragment, has_gradient, jnp.int32), layout) != 0

        def differentiate(n: Array, _: Any) -> None:
            """Of the blocks that are still in the ring first, and then of those read again."""
            number = again + n
            b = block_of(number)

            @pl.when(b < blocks)
            def write_gradient() -> None:
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
                for j in range(block // size):
                    d = jnp.where(kept, _exp(read(slot, j), m) * scale, 0.0)  # D7, t = 0
                    write(out_slot, j, d.astype(found.d.dtype))

                @pl.when(here)
                def put_label() -> None:
                    found.x_label[row] = x_label
                    e = jnp.exp(x_label - m)
                    d = (((e - 1) - r) * g + e * g_lse) / (1 + r)  # D7, t = T
                    out[out_slot, k] = jnp.where(has_gradient != 0, d, 0.0).astype(found.d.dtype)

                plgpu.commit_smem()
                target = found.d.at[row, pl.ds(start_of(b), block)]
                plgpu.copy_smem_to_gmem(out.at[out_slot], target)

                # All copies but this one have left the ring, so that the slot before is free.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            if own * launch.groups != blocks:

                @pl.when(b >= blocks)
                def wait_for_last() -> None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(n > 0)
            def load_freed() -> None:
                load(begin + number - 1 + slots)

        lax.fori_loop(0, own, differentiate, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        load(begin + loads - 1 + slots)

    lax.fori_loop(0, slots, lambda n, _: load(n), None)
    lax.fori_loop(0, rows, process_row, None)
    plgpu.wait_smem_to_gmem(0)


# Short rows: each warp has one, with all of its exponentials in registers.


def _short_launch(rows: int, classes: int, vector: int, *, cores: int) -> Launch:
    width = LANES * vector
    fours = -(-rows // WARPS)
    groups = 4
    programs = min(-(-fours // groups), cores)
    return Launch(rows, classes, vector, programs, groups, 3, (-(-classes // width), WARPS, width))


def _short_rows(launch: Launch, given: Given, scratch: Any) -> None:
    (x_ref, terms, found), (ring, filled) = given, scratch
    group = lax.axis_index("group")
    slots, (fragments, _, width) = launch.slots, launch.slot
    fragment, layout = launch.fragment, launch.layout
    team = lax.axis_index("program") * launch.groups + group
    teams = launch.programs * launch.groups
    steps = (-(-launch.rows // WARPS) - team + teams - 1) // teams

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

        def inside(j: int) -> Array:
            return k < launch.classes - j * width

        def read(j: int) -> Array:
            x = plgpu.load(ring.at[slot, j], layout=layout, optimized=False).astype(jnp.float32)
            return x if (j + 1) * width <= launch.classes else jnp.where(inside(j), x, -jnp.inf)

        top = jnp.max(functools.reduce(jnp.maximum, map(read, range(fragments))), axis=1)
        m, zero = wide(top), plgpu.layout_cast(jnp.zeros(fragment, jnp.float32), layout)
        rest, count, x_label, es = zero, zero, zero, []
        for j in range(fragments):
            x = read(j)
            e = exp_difference(x, m)
            # As in the plain twin: of what is near the maximum, 1 is counted, the rest is summed.
            near = jnp.where(x >= m - 0.25, 1.0, 0.0)
            rest, count = rest + (e - near), count + near
            x_label = x_label + jnp.where(k == label - j * width, x, 0.0)
            es.append(e)
        r_of_row = nan_where_infinite(top, total(rest) + (total(count) - 1))
        r, log1p_r = wide(r_of_row), wide(log1p(r_of_row))
        scale, lse_scale, gap = g / (1 + r), g_lse * (m + log1p_r) / (1 + r), zero
        for j, e in enumerate(es):
            is_label = k == label - j * width
            if uniform is None:
                d = jnp.where(is_label, (e - 1) - r, e) * scale  # D7, times T
            else:
                x = read(j)
                # See ``targets.gap``.
                cost = jnp.where((uniform == 0) & (x == -jnp.inf), -log1p_r, m - x)
                gap = gap + jnp.where(inside(j), cost * spread(uniform), 0.0)
                others = (launch.classes - 1) * uniform
                t = jnp.where(is_label, uniform + label_target, uniform)
                others = jnp.where(is_label, others, others + label_target)
                d = (e * others - t * ((1 - e) + r)) * scale  # D7
            d = jnp.where(has_gradient != 0, d + e * lse_scale, 0.0)
            ring[slot, j] = d.astype(found.d.dtype)
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
        if uniform is not None:
            store(found.gap.at[rows_of(i)], total(gap))
        # All copies but these have left the ring, so that the slot before is free.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

        @pl.when(i > 0)
        def load_freed() -> None:
            load(i - 1 + slots)

    lax.fori_loop(0, slots, lambda i, _: load(i), None)
    lax.fori_loop(0, steps, step, None)
    plgpu.wait_smem_to_gmem(0)
