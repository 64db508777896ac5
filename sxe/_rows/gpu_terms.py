"""The inputs and outputs of the gradient kernel for GPUs, and its arithmetic for targets."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sxe._rows.cross_entropy import scaled_difference
from sxe._rows.gpu_choice import LANES
from sxe._rows.gpu_lanes import WARPS, fragment_layout, plgpu
from sxe._rows.normalizer import Normalizer


class RowTerms(NamedTuple):
    """The kernel's inputs for each row, [N].

    The target of class k is t_k = label_target [k = label] + d_k. d_k is ``uniform`` for all
    classes, or comes from an array of its own. d_k is 0 in label-only rows, where only the label
    has a target.

    Attributes:
      label: int32. If it is outside of [0, K), ``Found.x_label`` is arbitrary.
      has_gradient: bool, passed to the kernel as int32. If it is False, the gradient of the row is
        0, whatever its logits are. The state of the row is computed anyway.
      weight: float32. It is the cotangent g of the loss, or g T in label-only rows, where D7 is
        proportional to T.
      lse_weight: float32. The cotangent of the row's lse is lse times this weight.
      label_target: float32, or None in label-only rows.
      uniform: float32, or None.
    """

    label: Array
    has_gradient: Array
    weight: Array
    lse_weight: Array
    label_target: Array | None = None
    uniform: Array | None = None


class Found(NamedTuple):
    """The kernel's outputs.

    Attributes:
      state: the normalizer state, [N].
      x_label: [N], the label's logit. For an invalid label it is arbitrary.
      d: [N, K], the gradient.
      gap: [N], the cost of the targets d_k: sum_k d_k (m - x_k). If d_k is uniform, see
        ``uniform_gap``. None in label-only rows.
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
      dense: d_k, [N, K], or fewer rows if all rows have the same targets, or None.
      terms: the other inputs of rows.
      found: the results.
    """

    x: Any
    dense: Any
    terms: RowTerms
    found: Found


class Launch(NamedTuple):
    """How rows are divided among programs, warpgroups and slots.

    Attributes:
      rows, classes: N and K.
      vector: the number of logits that a lane loads at once.
      programs: the number of programs. Program p processes long rows p, p + programs, and so on.
        Each of its warpgroups processes four short rows at a time.
      groups: the number of warpgroups of a program.
      slots: the number of slots in the ring of a warpgroup.
      slot: the shape of a slot: [block] for long rows, [fragments, 4, width] for four short rows.
      narrows: whether the gradient's dtype has another size than that of the logits. If so, the
        gradient has slots of its own, two per warpgroup.
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
        """The shape of a warpgroup's array in registers. Each warp holds one of its four rows."""
        return WARPS, LANES * self.vector

    @property
    def layout(self) -> Any:
        return fragment_layout(self.vector)


class ItemSizes(NamedTuple):
    """The bytes of a logit, of its gradient, and of a dense target (0 without dense targets)."""

    x: int
    d: int
    dense: int


def rings_and_barrier(
    launch: Launch, dtypes: tuple[DTypeLike, DTypeLike | None], *, copies: int
) -> tuple[Any, Any, Any]:
    """A barrier for each slot, the slots for logits, and the slots for targets or None.

    ``dtypes`` are the dtypes of logits and targets; None means no targets. ``copies`` is the number
    of copies that fill a slot.
    """
    slots = launch.groups * launch.slots
    rings = [None if of is None else plgpu.SMEM((slots, *launch.slot), of) for of in dtypes]
    copies *= sum(ring is not None for ring in rings)
    return plgpu.Barrier(num_barriers=slots, num_arrivals=copies), rings[0], rings[1]


def spread(uniform: Array) -> Array:
    """The factor of the gaps in their sum: ``uniform``, against overflow, or 1 where it is 0."""
    return jnp.where(uniform == 0, 1.0, uniform)


def uniform_gap(x: Array, uniform: Array, m: Array, log1p_r: Array) -> Array:
    """spread(uniform) (m - x), where 0 log 0 is 0: see ``targets.gap``."""
    cannot_occur = jnp.where(uniform == 0, -log1p_r, jnp.inf)
    return jnp.where(x == -jnp.inf, cannot_occur, m - x) * spread(uniform)


def dense_cost(x: Array, t: Array, m: Array) -> Array:
    """t (m - x), or 0 where t is 0."""
    return jnp.where(t == 0, 0.0, t * (m - x))


def gradient(
    e: Array, t_and_others: tuple[Array, Array], r: Array, scales: tuple[Array, Array]
) -> Array:
    """D7 and the gradient of lse. ``scales`` are the cotangents of loss and lse over 1 + r."""
    scale, lse_scale = scales
    return scaled_difference(e, t_and_others, r) * scale + e * lse_scale


# The largest target and the sum of the others: see ``targets.Dense``. Each lane starts from (0, 0),
# as if it had one more target that is 0.


def add_target(t: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
    """(largest, rest) of each lane after adding one more target."""
    largest, rest = lanes
    is_larger = t > largest
    return jnp.where(is_larger, t, largest), rest + jnp.where(is_larger, largest, t)


def merge_targets(largest: Array, rest: Array) -> tuple[Array, Array]:
    """(largest, rest) of each warp, [4], from those of its lanes, [4, n]."""
    top = jnp.max(largest, axis=1)
    is_top = largest == jnp.broadcast_to(top[:, None], largest.shape)
    rest = jnp.sum(jnp.where(is_top, rest, rest + largest), axis=1)
    return top, rest + (jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1) - 1) * top
