"""What one device does in a call of the head and in its gradient."""

import dataclasses
import math

import jax.numpy as jnp

from sxe._arrays import wide_dtype
from sxe._backend import Backend
from sxe._head.loops import Steps, Tiling, steps_of, tiling
from sxe._head.path import AGAIN, FORWARD, GradientPath, gradient_path, skips_rows
from sxe._rows.gpu_choice import has_gradient_kernel, has_state_kernel

INPUTS = ("hidden", "kernel")
TILE_OPTIONS = (
    "where",
    "bias",
    "logit_scale",
    "softcap",
    "class_mask",
    "label_smoothing",
    "label_weights",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """A call, with the sizes of what one device holds of it.

    Attributes:
      rows, hidden, classes: N, D and K. D is that of all devices.
      dtype: of hidden and kernel.
      differentiate: those of ``INPUTS`` that have a gradient.
      reduction, rule, chunk_size: as for the call.
      options: those of ``TILE_OPTIONS`` in use.
      counting: the share of the rows that count.
      backend: where it runs.
      row_groups, class_shards, kernel_parts: among how many devices rows, classes, and the rows of
        the kernel are divided.
    """

    rows: int
    hidden: int
    classes: int
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
    def summed(self) -> tuple[str, ...]:
        """Those of ``INPUTS`` whose gradients devices sum."""
        devices = {"hidden": self.class_shards, "kernel": self.row_groups}
        return tuple(x for x in INPUTS if x in self.differentiate and devices[x] > 1)

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
        """Whether hidden and kernel are narrower than that."""
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
        return not self.options - {"where", "label_smoothing"} and has_gradient_kernel(
            self.classes, jnp.float32, self.gradient_dtype
        )

    @property
    def reads_of_logits(self) -> int:
        """How often the logits of a chunk are read from memory for the functions of rows."""
        if self.makes_gradient_with_state:
            return 1
        by_kernel = self.backend.uses_row_kernels and has_state_kernel(self.classes)
        of_state = 1 if by_kernel else self.backend.reads_of_state
        of_cost = self.backend.reads_of_dense_cost * ("label_smoothing" in self.options)
        return of_state + of_cost + (self.path is not None)

    @property
    def computes_logits_again(self) -> bool:
        """XLA sees that both passes compute the same logits of a single chunk, and keeps them."""
        return self.path == AGAIN and self.tiling.chunks > 1

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        products = 1 + len(self.differentiate) + self.computes_logits_again
        return 2 * products * self.steps.rows * self.hidden * self.classes

    @property
    def traffic_bytes(self) -> int:
        """What the matrix products and the functions of rows read and write."""
        again, gradients = self.computes_logits_again, len(self.differentiate)
        wants_hidden, wants_kernel = (name in self.differentiate for name in INPUTS)
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
            (self.steps.chunks + self.steps.parts) * self.hidden * self.classes * kernel
            + rows * self.hidden * hidden
            + rows * self.classes * logits
        )

    @property
    def kept_bytes(self) -> int:
        """What the forward pass keeps for the backward pass, beside hidden and kernel."""
        if self.path is None:
            return 0
        if self.path == FORWARD:
            sizes = {"hidden": self.rows * self.hidden, "kernel": self.hidden * self.classes}
            return self.wide_itemsize * sum(sizes[name] for name in self.differentiate)
        # Label, target, its sum, weight, m, r, and what the loss is multiplied by.
        return self.rows * 7 * self.wide_itemsize

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.classes * self.wide_itemsize

    @property
    def kernel_bytes(self) -> int:
        """Of the kernel with the rows of all devices."""
        return self.hidden * self.classes * self.dtype.itemsize

    @property
    def input_bytes(self) -> dict[str, int]:
        """Of each of ``INPUTS``, which are those of its gradient."""
        hidden = self.rows * self.hidden * self.dtype.itemsize
        return {"hidden": hidden, "kernel": self.kernel_bytes // self.kernel_parts}

    @property
    def argument_bytes(self) -> int:
        return sum(self.input_bytes.values()) + self.rows * 4

    @property
    def result_bytes(self) -> int:
        losses = self.rows + 1 if self.reduction == "none" else 1
        gradients = sum(self.input_bytes[name] for name in self.differentiate)
        return gradients + losses * self.wide_itemsize
