"""The work of one device in a call of the head and in its gradient."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp

from sxe._arrays import wide_dtype
from sxe._backend import Backend
from sxe._head.loops import Steps, Tiling, steps_of, tiling
from sxe._head.path import AGAIN, FORWARD, GradientPath, gradient_path, skips_rows
from sxe._rows.gpu_choice import has_gradient_kernel, has_state_kernel

INPUTS = ("hidden", "kernel")
TARGET_INPUTS = ("target_hidden", "target_kernel")
TILE_OPTIONS = (
    "where",
    "bias",
    "logit_scale",
    "softcap",
    "class_mask",
    "label_smoothing",
    "label_weights",
    "jensen_shannon",
)
# Names that only a loss has, which has labels, or only a divergence, which has target_hidden.
OF_LOSS = ("label_smoothing", "label_weights")
OF_DIVERGENCE = ("jensen_shannon",)


class Side(NamedTuple):
    """Hidden states and a kernel, and their logits.

    Attributes:
      size: the hidden size D.
      hidden, kernel, logits: the names of the arrays.
    """

    size: int
    hidden: str
    kernel: str
    logits: str

    @property
    def inputs(self) -> tuple[str, str]:
        return self.hidden, self.kernel


MODEL = *INPUTS, "logits"
TARGET = *TARGET_INPUTS, "target_logits"


@dataclasses.dataclass(frozen=True)
class Work:
    """A call, with the sizes of the part that one device has.

    Attributes:
      rows, classes: N and K of the device.
      sides: the model's and, for a divergence, the target's. D is the size over all devices.
      dtype: the dtype of hidden states and kernels.
      differentiate: the names of the inputs that have a gradient.
      reduction, rule, chunk_size: as for the call.
      options: the options in use, among ``TILE_OPTIONS``.
      counting: the share of the rows that count: not masked out, ignored, or of weight 0.
      backend: where the call runs.
      row_groups, class_shards, kernel_parts: the numbers of devices over which the rows, the
        classes, and the rows of the kernel are sharded.
    """

    rows: int
    classes: int
    sides: tuple[Side, ...]
    dtype: jnp.dtype
    differentiate: frozenset[str]
    reduction: str
    rule: str
    chunk_size: int | None
    options: frozenset[str]
    counting: float
    backend: Backend
    row_groups: int = 1
    class_shards: int = 1
    kernel_parts: int = 1

    @property
    def tiling(self) -> Tiling:
        sizes = self.rows, self.classes
        return tiling(*sizes, chunk_size=self.chunk_size, dtype=self.dtype, backend=self.backend)

    @property
    def skips(self) -> bool:
        """Whether only rows that count are run. Chunks that they fill need no mask."""
        chunks, _, _ = self.tiling
        return "where" in self.options and chunks > 1 and skips_rows(self.rule, self.backend)

    @property
    def steps(self) -> Steps:
        """The chunks and parts of chunks that are run, including padding."""
        chunks, size, _ = self.tiling
        if self.counting == 1 or not self.skips:
            return Steps(chunks, 0, chunks * size)
        return steps_of(math.ceil(self.counting * self.rows), size)

    @property
    def path(self) -> GradientPath | None:
        """The path of the call, or None without a gradient."""
        return gradient_path(self.rule, self.reduction) if self.differentiate else None

    @property
    def has_targets(self) -> bool:
        """Whether the targets are logits of a second side, as for a divergence."""
        return len(self.sides) == 2

    @property
    def mixes(self) -> bool:
        """Whether a divergence is measured from the mixture of both distributions."""
        return "jensen_shannon" in self.options

    def wanted(self, side: Side) -> tuple[str, ...]:
        """The inputs of this side that have a gradient."""
        return tuple(name for name in side.inputs if name in self.differentiate)

    @property
    def wanted_sides(self) -> tuple[Side, ...]:
        """The sides whose logits have a gradient."""
        return tuple(side for side in self.sides if self.wanted(side))

    @property
    def summed(self) -> tuple[str, ...]:
        """The inputs whose gradients are summed over devices."""
        devices = self.class_shards, self.row_groups
        return tuple(
            name
            for side in self.sides
            for name, among in zip(side.inputs, devices, strict=True)
            if name in self.differentiate and among > 1
        )

    @property
    def statistics(self) -> int:
        """How many numbers per row are merged over devices if the classes are sharded."""
        if not self.has_targets:
            return 4  # the maximum; the sum, the number of maxima, and the label's part of the loss
        # The first three of both sides; the divergence; and the state from which gradients start.
        of_gradients = (0, 2, 4) if self.mixes else (0, 1, 3)
        return 7 + self.mixes + of_gradients[len(self.wanted_sides)]

    @property
    def gradient_dtype(self) -> jnp.dtype:
        """The dtype in which the gradient of the logits is multiplied with hidden and kernel."""
        return self.backend.gradient_dtype(self.dtype)

    @property
    def wide_itemsize(self) -> int:
        """The itemsize of the dtype in which logits and sums are computed."""
        return wide_dtype(self.dtype).itemsize

    @property
    def is_narrow(self) -> bool:
        """Whether hidden states and kernels are narrower than logits and sums."""
        return self.dtype.itemsize < self.wide_itemsize

    @property
    def implementation(self) -> str:
        """What computes the row functions."""
        return "mosaic_gpu" if self.backend.uses_row_kernels else "xla"

    @property
    def makes_gradient_with_state(self) -> bool:
        """Whether a single GPU kernel reads a chunk's logits and writes their gradient."""
        if not self.backend.uses_row_kernels or self.path != FORWARD or self.class_shards > 1:
            return False
        if self.has_targets:
            return False
        return not self.options - {"where", "label_smoothing"} and has_gradient_kernel(
            self.classes, jnp.float32, self.gradient_dtype
        )

    @property
    def reads_of_logits(self) -> int:
        """How often the row functions read the logits of a chunk from memory.

        They read the logits of a target as often.
        """
        if self.makes_gradient_with_state:
            return 1
        by_kernel = self.backend.uses_row_kernels and has_state_kernel(self.classes)
        of_state = 1 if by_kernel else self.backend.reads_of_state
        has_dense = self.has_targets or "label_smoothing" in self.options
        of_cost = self.backend.reads_of_dense_cost * has_dense
        return of_state + of_cost + (self.path is not None)

    @property
    def computes_logits_again(self) -> bool:
        """Whether logits are computed in both passes. XLA keeps the logits of a single chunk."""
        return self.path == AGAIN and self.tiling.chunks > 1

    @property
    def flops(self) -> int:
        """The FLOPs of the matrix products."""
        again = self.computes_logits_again
        products = sum((1 + again + len(self.wanted(side))) * side.size for side in self.sides)
        return 2 * products * self.steps.rows * self.classes

    @property
    def traffic_bytes(self) -> int:
        """The bytes that the matrix products and the row functions read and write."""
        return sum(map(self._traffic_of, self.sides))

    def _traffic_of(self, side: Side) -> int:
        again, gradients = self.computes_logits_again, len(self.wanted(side))
        wants_hidden, wants_kernel = (name in self.differentiate for name in side.inputs)
        # In each step, every product with the kernel reads it, and the gradient of the kernel is
        # read and written.
        kernel = (1 + wants_hidden + again) * self.dtype.itemsize
        kernel += wants_kernel * 2 * self.wide_itemsize
        hidden = (1 + again + gradients) * self.dtype.itemsize
        # The logits are written, and read by the row functions. Their gradient is written, and read
        # for each product with it.
        logits = (1 + self.reads_of_logits + again) * self.wide_itemsize
        logits += ((gradients > 0) + gradients) * self.gradient_dtype.itemsize
        rows = min(self.rows, self.steps.rows)
        return (
            (self.steps.chunks + self.steps.parts) * side.size * self.classes * kernel
            + rows * side.size * hidden
            + rows * self.classes * logits
        )

    @property
    def kept_bytes(self) -> int:
        """What the forward pass keeps for the backward pass, except hidden states and kernels."""
        if self.path is None:
            return 0
        if self.path == FORWARD:
            return self.wide_itemsize * sum(self.elements[name] for name in self.differentiate)
        # A loss keeps label, target, its sum, weight, m, r, and the factor of the loss. A
        # divergence keeps weight, m and r of both sides, and its factor; and, for each distribution
        # that is compared with another, four sums.
        numbers = 6 + 4 * (1 + self.mixes) if self.has_targets else 7
        return self.rows * numbers * self.wide_itemsize

    @property
    def logits_bytes(self) -> int:
        return len(self.sides) * self.rows * self.classes * self.wide_itemsize

    @property
    def elements(self) -> dict[str, int]:
        """The number of elements of each input. A kernel has the rows of all devices."""
        counts: dict[str, int] = {}
        for side in self.sides:
            counts[side.hidden] = self.rows * side.size
            counts[side.kernel] = side.size * self.classes
        return counts

    @property
    def input_bytes(self) -> dict[str, int]:
        """The bytes of each input, which are also those of its gradient."""
        kernels = {side.kernel for side in self.sides}
        return {
            name: n * self.dtype.itemsize // (self.kernel_parts if name in kernels else 1)
            for name, n in self.elements.items()
        }

    @property
    def argument_bytes(self) -> int:
        labels = 0 if self.has_targets else self.rows * 4
        return sum(self.input_bytes.values()) + labels

    @property
    def result_bytes(self) -> int:
        losses = self.rows + 1 if self.reduction == "none" else 1
        gradients = sum(self.input_bytes[name] for name in self.differentiate)
        return gradients + losses * self.wide_itemsize
