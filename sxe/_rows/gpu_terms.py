"""What the gradient kernel for GPUs is given and what it finds, and its arithmetic of targets."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sxe._rows.cross_entropy import scaled_difference
from sxe._rows.gpu_choice import LANES
from sxe._rows.gpu_lanes import WARPS, fragment_layout, plgpu
from sxe._rows.normalizer import Normalizer


class RowTerms(NamedTuple):
    """What the kernel is told of rows, [N].

    The target of class k is t_k = label_target [k = label] + d_k. There d_k is the same ``uniform``
    for all classes, or stands in an array of its own. In rows of a label alone it is 0.

    Attributes:
      label: int32. It may lie outside of [0, K), and its logit may then be anything.
      has_gradient: bool, which the kernel gets as int32. If it is False the gradient of the row is
        0, whatever its logits are. Its state is computed all the same.
      weight: float32, g in D7; or, in rows of a label alone, g T, as D7 is proportional to T there.
      lse_weight: float32. lse times this is the cotangent of the row's lse.
      label_target: float32, or None in rows of a label alone.
      uniform: float32, or None.
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
      x_label: [N], the label's logit. Where the label is no class, it may be anything.
      d: [N, K], the gradient.
      gap: [N], what targets of classes cost: sum_k d_k (m - x_k). If d_k is uniform, see
        ``uniform_gap``. None in rows of a label alone.
      total: [N], the sum of all d_k, or None if they are uniform or 0.
    """

    state: Normalizer
    x_label: Any
    d: Any
    gap: Any = None
    total: Any = None


class Refs(NamedTuple):
    """The arrays of a launch in the GPU's memory.

    Attributes:
      x: the logits [N, K].
      dense: d_k, [N, K], or fewer rows of it if all rows have the same, or None.
      terms: what else is known of rows.
      found: the results.
    """

    x: Any
    dense: Any
    terms: RowTerms
    found: Found


class Launch(NamedTuple):
    """How rows are divided.

    Attributes:
      rows, classes: N and K.
      vector: how many logits a lane loads at once.
      programs: how many there are. Program p takes long rows p, p + programs, and so on. Of short
        rows it takes four for each of its warpgroups at a time.
      groups: warpgroups of a program.
      slots: in the ring of a warpgroup.
      slot: the shape of one: of a long row [block], of four short ones [fragments, 4, width].
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


class ItemSizes(NamedTuple):
    """The bytes of a logit, of its gradient, and of a target, or 0 if no array holds targets."""

    x: int
    d: int
    dense: int


def rings_and_barrier(
    launch: Launch, dtypes: tuple[DTypeLike, DTypeLike | None], *, copies: int
) -> tuple[Any, Any, Any]:
    """A barrier for each slot, and the slots: of logits, and of targets if those have a dtype.

    ``copies`` is how many fill a slot.
    """
    slots = launch.groups * launch.slots
    rings = [None if of is None else plgpu.SMEM((slots, *launch.slot), of) for of in dtypes]
    copies *= sum(ring is not None for ring in rings)
    return plgpu.Barrier(num_barriers=slots, num_arrivals=copies), rings[0], rings[1]


def spread(uniform: Array) -> Array:
    """The factor of gaps in their sum: so that it does not overflow, and never 0."""
    return jnp.where(uniform == 0, 1.0, uniform)


def uniform_gap(x: Array, uniform: Array, m: Array, log1p_r: Array) -> Array:
    """spread(uniform) (m - x), with 0 log 0 = 0: see ``targets.gap``."""
    cannot_occur = jnp.where(uniform == 0, -log1p_r, jnp.inf)
    return jnp.where(x == -jnp.inf, cannot_occur, m - x) * spread(uniform)


def dense_cost(x: Array, t: Array, m: Array) -> Array:
    """t (m - x), and 0 where t is 0."""
    return jnp.where(t == 0, 0.0, t * (m - x))


def gradient(
    e: Array, t_and_others: tuple[Array, Array], r: Array, scales: tuple[Array, Array]
) -> Array:
    """D7, from t and T - t, and from the cotangents of loss and lse divided by 1 + r."""
    scale, lse_scale = scales
    return scaled_difference(e, t_and_others, r) * scale + e * lse_scale


# The sum of targets, apart from the largest one: see ``targets.Dense``. Each lane starts from (0,
# 0), as from a target of 0 more.


def add_target(t: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
    """(largest, rest) of the lanes with one more target each."""
    largest, rest = lanes
    is_larger = t > largest
    return jnp.where(is_larger, t, largest), rest + jnp.where(is_larger, largest, t)


def merge_targets(largest: Array, rest: Array) -> tuple[Array, Array]:
    """(largest, rest) of the lanes of each warp, [4, n], as one a warp, [4]."""
    top = jnp.max(largest, axis=1)
    is_top = largest == jnp.broadcast_to(top[:, None], largest.shape)
    rest = jnp.sum(jnp.where(is_top, rest, rest + largest), axis=1)
    return top, rest + (jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1) - 1) * top
