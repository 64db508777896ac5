"""What ``sxe.plan`` returns."""

from __future__ import annotations  # so that help() names types shortly

from collections.abc import Mapping
from typing import NamedTuple

from sxe._errors import ArgumentValueError


class Collective(NamedTuple):
    """A collective operation in a call and its gradient.

    Attributes:
      kind: "all-reduce", "all-gather" or "reduce-scatter".
      of: the array or arrays that the devices exchange.
      devices: the number of devices in each group.
      bytes: the size of the whole array on each device: before a scatter, or after a gather.
    """

    kind: str
    of: str
    devices: int
    bytes: int

    @property
    def link_bytes(self) -> float:
        """A lower bound on the bytes that each device sends. An all-reduce sends them twice."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.devices - 1) / self.devices


class Floor(NamedTuple):
    """Lower bounds on the seconds that a call and its gradient take on each device.

    The largest of the three is the lower bound on the time.

    Attributes:
      matmul: for the matrix products.
      memory: for reading and writing the data that does not stay in a cache.
      links: for sending data to other devices.
    """

    matmul: float
    memory: float
    links: float


class Plan(NamedTuple):
    """The work of a call of the head, and of its gradient, on each device.

    The head is the fused final linear layer and loss. For a divergence, the numbers for hidden,
    kernel and logits include both sides.

    Attributes:
      implementation: "xla" or "mosaic_gpu": what computes results and gradients from the logits.
      reason: why this implementation is used, and how often it reads the logits of a chunk.
      path: "value alone"; "gradients in the forward pass", where nothing is computed twice; or
        "logits again in the backward pass".
      chunk_size: the number of rows in a chunk.
      chunks: the number of chunks.
      padding: the number of rows that are added so that all chunks have the same size.
      rows_run: the number of rows in the chunks, and parts of chunks, that are run. Fewer are run
        if some rows do not count because they are masked out, ignored, or of weight 0.
      gradient_dtype: the dtype in which the gradient of the logits is multiplied with hidden and
        kernel.
      flops: the floating-point operations of the matrix products, for all rows that are run.
      terms: the arrays that XLA holds at peak memory in addition to arguments and results, with an
        estimate of their bytes. An array that fits into the memory of a result that is not computed
        yet is left out.
      temporary_bytes: the sum of the terms.
      peak_bytes: an estimate of the peak memory, including arguments and results.
      kept_bytes: the size of the residuals: the arrays that the forward pass keeps for the backward
        pass, in addition to hidden and kernel. If the gradient of a ``lax.scan`` or ``lax.map`` is
        taken outside of it, these arrays are kept for each step.
      logits_bytes: the size of the [N, K] logits in the dtype in which they are computed.
      logits_peak_bytes: a lower bound on the peak memory of a program that stores these logits:
        arguments, results and logits.
      traffic_bytes: a lower bound on the bytes that the matrix products, and the steps between
        them, read from memory and write to it.
      mesh: the number of devices along each mesh axis.
      collectives: the collective operations between devices.
    """

    implementation: str
    reason: str
    path: str
    chunk_size: int
    chunks: int
    padding: int
    rows_run: int
    gradient_dtype: str
    flops: int
    terms: Mapping[str, int]
    temporary_bytes: int
    peak_bytes: int
    kept_bytes: int
    logits_bytes: int
    logits_peak_bytes: int
    traffic_bytes: int
    mesh: Mapping[str, int]
    collectives: tuple[Collective, ...]

    def __hash__(self) -> int:
        return hash(tuple(frozenset(a.items()) if isinstance(a, Mapping) else a for a in self))

    def floor(
        self, flops_per_second: float, bytes_per_second: float, link_bytes_per_second: float
    ) -> Floor:
        """Lower bounds on the time, from the matmul rate, memory and link bandwidth of a device."""
        for name, rate in (
            ("flops_per_second", flops_per_second),
            ("bytes_per_second", bytes_per_second),
            ("link_bytes_per_second", link_bytes_per_second),
        ):
            if not rate > 0:
                raise ArgumentValueError(name, f"expected a number above 0, got {rate!r}")
        return Floor(
            self.flops / flops_per_second,
            self.traffic_bytes / bytes_per_second,
            sum(c.link_bytes for c in self.collectives) / link_bytes_per_second,
        )
