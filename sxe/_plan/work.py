"""What one device does in a call of the head and in its gradient."""

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
# Those of one of the two: a loss has labels, and a divergence has target_hidden.
OF_LOSS = ("label_smoothing", "label_weights")
OF_DIVERGENCE = ("jensen_shannon",)


class Side(NamedTuple):
    """Hidden states and a kernel, and the logits of the two.

    Attributes:
      size: D.
      hidden, kernel, logits: their names.
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
    """A call, with the sizes of what one device holds of it.

    Attributes:
      rows, classes: N and K.
      sides: the model's and, for a divergence, the target's. D is that of all devices.
      dtype: of hidden states and kernels.
      differentiate: the names of those that have a gradient.
      reduction, rule, chunk_size: as for the call.
      options: those of ``TILE_OPTIONS`` in use.
      counting: the share of the rows that count.
      backend: where it runs.
      row_groups, class_shards, kernel_parts: among how many devices rows, classes, and the rows of
        the kernel are divided.
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
        """Whether only rows that count are run, those in whole chunks without a mask."""
        chunks, _, _ = self.tiling
        return "where" in self.options and chunks > 1 and skips_rows(self.rule, self.backend)

    @property
    def steps(self) -> Steps:
        """The chunks and parts of chunks that are run, with padding."""
        chunks, size, _ = self.tiling
        if self.counting == 1 or not self.skips:
            return Steps(chunks, 0, chunks * size)
        return steps_of(math.ceil(self.counting * self.rows), size)

    @property
    def path(self) -> GradientPath | None:
        """None without a gradient."""
        return gradient_path(self.rule, self.reduction) if self.differentiate else None

    @property
    def has_targets(self) -> bool:
        """Whether targets are logits, those of the second side."""
        return len(self.sides) == 2

    @property
    def mixes(self) -> bool:
        """Whether a divergence is one from the mixture of both distributions."""
        return "jensen_shannon" in self.options

    def wanted(self, side: Side) -> tuple[str, ...]:
        """Those of the side's inputs that have a gradient."""
        return tuple(name for name in side.inputs if name in self.differentiate)

    @property
    def wanted_sides(self) -> tuple[Side, ...]:
        """Those whose logits have a gradient."""
        return tuple(side for side in self.sides if self.wanted(side))

    @property
    def summed(self) -> tuple[str, ...]:
        """The inputs whose gradients devices sum."""
        devices = self.class_shards, self.row_groups
        return tuple(
            name
            for side in self.sides
            for name, among in zip(side.inputs, devices, strict=True)
            if name in self.differentiate and among > 1
        )

    @property
    def statistics(self) -> int:
        """How many numbers of a row the devices merge that split its classes."""
        if not self.has_targets:
            return 4  # the maximum; the sum, the number of maxima, and the label's part of the loss
        # The first three of both sides; the divergence; and what gradients start from.
        of_gradients = (0, 2, 4) if self.mixes else (0, 1, 3)
        return 7 + self.mixes + of_gradients[len(self.wanted_sides)]

    @property
    def gradient_dtype(self) -> jnp.dtype:
        """In which the logits' gradient is multiplied."""
        return self.backend.gradient_dtype(self.dtype)

    @property
    def wide_itemsize(self) -> int:
        """Of the dtype in which logits and sums are computed."""
        return wide_dtype(self.dtype).itemsize

    @property
    def is_narrow(self) -> bool:
        """Whether hidden states and kernels are narrower than that."""
        return self.dtype.itemsize < self.wide_itemsize

    @property
    def implementation(self) -> str:
        """Of the functions of rows."""
        return "mosaic_gpu" if self.backend.uses_row_kernels else "xla"

    @property
    def makes_gradient_with_state(self) -> bool:
        """Whether one kernel reads a chunk's logits and writes their gradient."""
        if not self.backend.uses_row_kernels or self.path != FORWARD or self.class_shards > 1:
            return False
        if self.has_targets:
            return False
        return not self.options - {"where", "label_smoothing"} and has_gradient_kernel(
            self.classes, jnp.float32, self.gradient_dtype
        )

    @property
    def reads_of_logits(self) -> int:
        """How often the logits of a chunk are read from memory for the functions of rows.

        Those of a target are read as often.
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
        """XLA sees that both passes compute the same logits of a single chunk, and keeps them."""
        return self.path == AGAIN and self.tiling.chunks > 1

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        again = self.computes_logits_again
        products = sum((1 + again + len(self.wanted(side))) * side.size for side in self.sides)
        return 2 * products * self.steps.rows * self.classes

    @property
    def traffic_bytes(self) -> int:
        """What the matrix products and the functions of rows read and write."""
        return sum(map(self._traffic_of, self.sides))

    def _traffic_of(self, side: Side) -> int:
        again, gradients = self.computes_logits_again, len(self.wanted(side))
        wants_hidden, wants_kernel = (name in self.differentiate for name in side.inputs)
        # The kernel is read for each product with it, and its gradient read and written, in each
        # step.
        kernel = (1 + wants_hidden + again) * self.dtype.itemsize
        kernel += wants_kernel * 2 * self.wide_itemsize
        hidden = (1 + again + gradients) * self.dtype.itemsize
        # Logits are written, and read by the functions of rows. Their gradient is written, and read
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
        """What the forward pass keeps for the backward pass, beside hidden states and kernels."""
        if self.path is None:
            return 0
        if self.path == FORWARD:
            return self.wide_itemsize * sum(self.elements[name] for name in self.differentiate)
        # Label, target, its sum, weight, m, r, and what the loss is multiplied by. Of a divergence:
        # weight, m and r of both sides, four sums of each distribution beside another, and what it
        # is multiplied by.
        numbers = 6 + 4 * (1 + self.mixes) if self.has_targets else 7
        return self.rows * numbers * self.wide_itemsize

    @property
    def logits_bytes(self) -> int:
        return len(self.sides) * self.rows * self.classes * self.wide_itemsize

    @property
    def elements(self) -> dict[str, int]:
        """How many numbers each input has: a kernel with the rows of all devices."""
        counts: dict[str, int] = {}
        for side in self.sides:
            counts[side.hidden] = self.rows * side.size
            counts[side.kernel] = side.size * self.classes
        return counts

    @property
    def input_bytes(self) -> dict[str, int]:
        """Of each input, which are those of its gradient."""
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
