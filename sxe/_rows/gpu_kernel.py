"""The row kernel for NVIDIA GPUs of the Hopper generation: state and gradient of rows at once.

For logits x [N, K], labels y [N] and weights w [N], one launch computes of each row

    (m, r)          the state of ``normalizer``
    x_y             the label's logit
    w (q_l - [l = y])   the gradient, which is D7 for a label alone, in the dtype of the logits

A row that fits on the chip is read from memory once, and its gradient is written once. Short rows
stay in registers, and long ones in shared memory. Of a row that does not fit there, each warpgroup
reads its first blocks again, soon enough that they are still in the L2 cache: of bfloat16 rows of
131,072 classes, 64 of 256 KiB on each of 132 multiprocessors, together 8 MiB. Of float32 rows they
are 320 of 512 KiB, or 336 where the gradient is narrower, together 41 or 43 MiB. That cache holds
about as much.

A block is some classes of a long row. Blocks go through a ring of slots in shared memory. A slot is
filled by a bulk copy, read twice, overwritten with the gradient, and emptied by a bulk copy. It
then takes the next block at once, which may be of the next row, so that memory is read and written
at all times.

A program of the grid is a CUDA block, and a Pallas "thread" is one of its warpgroups, 128 CUDA
threads. No reduction here crosses warps: JAX gives all warpgroups of a program one scratch for it,
and their results would mix.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

plgpu: Any = mosaic_gpu  # its interface is not the same in all versions of JAX

WARPS = 4  # of a warpgroup
LANES = 32  # of a warp
VECTOR_BYTES = 16  # the widest load of a lane, and what bulk copies are aligned to
SHORT = 1024  # classes of a row that stays in registers
BLOCK_BYTES = 8192  # of a long row, for one bulk copy
LONG = 4096  # vectors of a row. Of shorter ones two fit on a multiprocessor, and parts of the next.
LOG2_E = 1.4426950408889634


def takes_rows(
    classes: int, dtype: DTypeLike, d_dtype: DTypeLike, *, has_uniform_targets: bool
) -> bool:
    """Whether the kernel takes rows of these sizes and dtypes, the second one of the gradient."""
    dtypes = {jnp.dtype(dtype), jnp.dtype(d_dtype)}
    aligned = all(classes * of.itemsize % VECTOR_BYTES == 0 for of in dtypes)
    if classes <= SHORT:
        return aligned and len(dtypes) == 1
    return aligned and not has_uniform_targets


class RowTerms(NamedTuple):
    """What the kernel is told of rows, [N].

    Attributes:
      label: int32. It may lie outside of [0, K), and its logit may then be anything.
      counts: bool. A row that does not count has a gradient of 0, whatever its logits are; its
        state may be anything too.
      weight: float32, g in D7. In rows of a label alone it is g T.
      lse_weight: float32. lse times this is the cotangent of the row's lse.
      label_target, uniform: float32, for targets t_k = label_target [k = label] + uniform. None in
        rows of a label alone, where t_k is T [k = label].
    """

    label: Array
    counts: Array
    weight: Array
    lse_weight: Array
    label_target: Array | None = None
    uniform: Array | None = None


class Found(NamedTuple):
    """What the kernel finds.

    Attributes:
      m, r: [N], the state of ``normalizer``.
      x_label: [N], the label's logit.
      d: [N, K], the gradient, in the dtype of the logits.
      gap: [N], the sum of all m - x_k, or None in rows of a label alone.
    """

    m: Any
    r: Any
    x_label: Any
    d: Any
    gap: Any = None


def state_and_gradient(
    x: Array, terms: RowTerms, *, d_dtype: DTypeLike, cores: int, interpret: bool = False
) -> Found:
    """State and gradient of rows of logits that ``takes_rows`` says the kernel takes.

    Args:
      x: the logits [N, K], bfloat16, float16 or float32.
      terms: what is known of their rows.
      d_dtype: of the gradient.
      cores: how many multiprocessors the GPU has.
      interpret: on a CPU, for tests.
    """
    N, K = x.shape
    vector = VECTOR_BYTES // x.dtype.itemsize
    short = K <= SHORT
    # Short rows come four at a time, so that the arrays of rows are padded to a multiple of it.
    pad = -N % WARPS if short else 0
    terms = terms._replace(counts=terms.counts.astype(jnp.int32))
    terms = jax.tree.map(lambda a: jnp.pad(a, (0, pad)), terms)
    varies = jax.typeof(x).manual_axis_type
    of_rows = jax.ShapeDtypeStruct((N + pad,), jnp.float32, manual_axis_type=varies)
    d = jax.ShapeDtypeStruct(x.shape, d_dtype, manual_axis_type=varies)
    results = Found(of_rows, of_rows, of_rows, d, None if terms.uniform is None else of_rows)
    launch = _short_launch(N, K, vector, cores)
    if not short:
        launch = _long_launch(N, K, vector, cores, narrows=d.dtype != x.dtype)
    leaves, structure = jax.tree.flatten((x, terms, results))

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(structure, refs[: len(leaves)])
        scratch = refs[len(leaves) :]
        if short:
            _short_rows(launch, given, scratch)
        else:
            _long_rows(launch, given, scratch, interpret=interpret)

    call = plgpu.kernel(
        body,
        out_type=jax.tree.leaves(results),
        scratch_types=launch.scratch(x.dtype, d.dtype),
        grid=(launch.programs,),
        grid_names=("program",),
        num_threads=launch.groups,
        thread_name="group",
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    with jax.enable_x64(False):  # nothing in the kernel has 64 bits, and loops would count in them
        found = Found(*call(x, *jax.tree.leaves(terms)))
    return jax.tree.map(lambda a: a[:N] if a.ndim == 1 else a, found)


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

    def scratch(self, dtype: Any, d_dtype: Any) -> list[Any]:
        """Shared memory: of rows that are long, for what warpgroups tell each other too."""
        slots = self.groups * self.slots
        ring = plgpu.SMEM((slots, *self.slot), dtype)
        if len(self.slot) > 1:
            return [ring, plgpu.Barrier(num_barriers=slots, num_arrivals=self.slot[0])]
        parts = plgpu.SMEM((2, 2, WARPS * self.groups), jnp.float32)
        met = plgpu.Barrier(num_arrivals=self.groups)
        of_d = [plgpu.SMEM((2 * self.groups, *self.slot), d_dtype)] if self.narrows else []
        return [ring, plgpu.Barrier(num_barriers=slots), parts, met, *of_d]


def fragment_layout(vector: int) -> Any:
    """Of [4, 32 vectors]: each warp has a row, and each lane a vector of it."""
    fragment = WARPS, LANES * vector
    return plgpu.Layout.TILED(plgpu.Tiling((fragment, (vector,))), (-3,), (-2,), -1)


def _exp_difference(x: Array, m: Array) -> Array:
    """exp(x - m) for x <= m, of the exact difference, and 0 for x = -inf, whatever m is.

    See ``normalizer.exp_difference``.
    """
    m = jnp.maximum(m, jnp.finfo(jnp.float32).min)
    s = x - m
    back = s - x
    lost = (x - (s - back)) - (m + back)
    e = jnp.exp(s)
    return e + e * jnp.where(s > -104, lost, 0.0)  # beyond, e is 0, and lost may be NaN


def _log1p(r: Array) -> Array:
    """log(1 + r), without the digits that 1 + r loses."""
    total = 1 + r
    return jnp.where(total == 1, r, jnp.log(total) * (r / jnp.where(total == 1, 1.0, total - 1)))


def _exp(x: Array, m: Array) -> Array:
    """exp(x - m) for a gradient, whose last digits are rounded to the dtype of the logits."""
    return jnp.exp2((x - m) * LOG2_E)


def add_logits(x: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
    """The states of the lanes with one more logit each, in one exponential."""
    m, r = lanes
    top = jnp.maximum(x, m)
    e = _exp_difference(jnp.minimum(x, m), top)
    return top, jnp.where(x > m, e + r * e, r + e)


def merge_lanes(m: Array, r: Array) -> tuple[Array, Array]:
    """The states of the lanes of each warp, [4, n], as one state a warp, [4]."""
    top = jnp.max(m, axis=1)
    of_lanes = lax.broadcast_in_dim(top, m.shape, (0,))
    is_top = m == of_lanes
    rest = jnp.sum(jnp.where(is_top, r, (1 + r) * _exp_difference(m, of_lanes)), axis=1)
    return top, rest + (jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1) - 1)


def nan_where_infinite(m: Array, r: Array) -> Array:
    """r, and NaN for a row with a logit of +inf, or with -inf alone."""
    return r + (m - m)


def store(ref: Any, of_rows: Array) -> None:
    """Four numbers, fewer than JAX 0.12 writes to memory without being told to."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, of_rows, optimized=False)
    else:
        ref[...] = of_rows


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
    if classes > LONG * vector:
        per_core, groups, slots = 1, 4, 6
    if narrows:  # Of the 227 KiB, the slots of the gradient take 24.
        per_core, groups, slots, block_bytes = 1, 4, 8, 3 * BLOCK_BYTES // 4
    largest = block_bytes * vector // VECTOR_BYTES
    block = min(largest, classes // size * size)
    programs = min(rows, per_core * cores)
    return Launch(rows, classes, vector, programs, groups, slots, (block,), narrows)


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

    def fragment_of(slots: Any, slot: Array, i: int) -> Any:
        return slots.at[slot, pl.ds(i * size, size)]

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

    def row_of(i: Array, _: Any) -> None:
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
        warps = range(WARPS * launch.groups)
        m = functools.reduce(jnp.maximum, [parts[turn, 0, j] for j in warps])
        rest, tops = jnp.float32(0), jnp.float32(-1)
        for j in warps:
            of_warp, r_of_warp = parts[turn, 0, j], parts[turn, 1, j]
            is_top = of_warp == m
            e = _exp_difference(of_warp, m)
            rest += jnp.where(is_top, r_of_warp, (1 + r_of_warp) * e)
            tops += jnp.where(is_top, 1.0, 0.0)
        r = nan_where_infinite(m, rest + tops)
        found.m[row], found.r[row] = m, r  # all warpgroups write the same
        label, counts = terms.label[row], terms.counts[row] != 0
        g, g_lse = terms.weight[row], terms.lse_weight[row] * (m + _log1p(r))
        scale = (g + g_lse) / (1 + r)
        counted = plgpu.layout_cast(jnp.full(fragment, terms.counts[row], jnp.int32), layout) != 0

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
                x_label = ring[slot, k].astype(jnp.float32)
                for j in range(block // size):
                    d = jnp.where(counted, _exp(read(slot, j), m) * scale, 0.0)  # D7, t = 0
                    write(out_slot, j, d.astype(found.d.dtype))

                @pl.when(here)
                def put_label() -> None:
                    found.x_label[row] = x_label
                    e = jnp.exp(x_label - m)
                    d = (((e - 1) - r) * g + e * g_lse) / (1 + r)  # D7, t = T
                    out[out_slot, k] = jnp.where(counts, d, 0.0).astype(found.d.dtype)

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
    lax.fori_loop(0, rows, row_of, None)
    plgpu.wait_smem_to_gmem(0)


# Short rows: each warp has one, whole in its registers.


def _short_launch(rows: int, classes: int, vector: int, cores: int) -> Launch:
    width = LANES * vector
    fours = -(-rows // WARPS)
    groups = 4
    blocks = min(-(-fours // groups), cores)
    return Launch(rows, classes, vector, blocks, groups, 3, (-(-classes // width), WARPS, width))


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

    def total(terms: Array) -> Array:
        return jnp.sum(terms, axis=1)

    def step(i: Array, _: Any) -> None:
        slot = slot_of(i)
        label, counts, g, g_lse, label_target, uniform = jax.tree.map(
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
            e = _exp_difference(x, m)
            # As in the plain twin: of what is near the maximum, 1 is counted, the rest is summed.
            near = jnp.where(x >= m - 0.25, 1.0, 0.0)
            rest, count = rest + (e - near), count + near
            x_label = x_label + jnp.where(k == label - j * width, x, 0.0)
            es.append(e)
        r_of_row = nan_where_infinite(top, total(rest) + (total(count) - 1))
        r, log1p_r = wide(r_of_row), wide(_log1p(r_of_row))
        g, g_lse, gap = g / (1 + r), g_lse * (m + log1p_r) / (1 + r), zero
        for j, e in enumerate(es):
            is_label = k == label - j * width
            if uniform is None:
                d = jnp.where(is_label, (e - 1) - r, e) * g  # D7, times T
            else:
                x = read(j)
                # See ``targets.gap``.
                cost = jnp.where((uniform == 0) & (x == -jnp.inf), -log1p_r, m - x)
                gap = gap + jnp.where(inside(j), cost, 0.0)
                others = (launch.classes - 1) * uniform
                t = jnp.where(is_label, uniform + label_target, uniform)
                others = jnp.where(is_label, others, others + label_target)
                d = (e * others - t * ((1 - e) + r)) * g  # D7
            ring[slot, j] = jnp.where(counts != 0, d + e * g_lse, 0.0).astype(found.d.dtype)
        of_row = Found(top, r_of_row, total(x_label), None, None if uniform is None else total(gap))
        plgpu.commit_smem()
        for j in range(fragments):
            plgpu.copy_smem_to_gmem(
                ring.at[slot, j],
                found.d.at[rows_of(i), columns(j)],
                commit_group=j == fragments - 1,
            )
        for ref, values in zip(found._replace(d=None), of_row, strict=True):
            if ref is not None:
                store(ref.at[rows_of(i)], values)
        # All copies but these have left the ring, so that the slot before is free.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

        @pl.when(i > 0)
        def load_freed() -> None:
            load(i - 1 + slots)

    lax.fori_loop(0, slots, lambda i, _: load(i), None)
    lax.fori_loop(0, steps, step, None)
    plgpu.wait_smem_to_gmem(0)
