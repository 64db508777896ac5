"""Where a program will run, and every fact about platforms and versions that sxe acts on.

A call makes one ``Backend`` and hands it down. No other module of the losses compares a platform,
or asks for JAX's version or devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, device_count, lax
from jax.typing import DTypeLike

PLATFORMS = ("cpu", "gpu", "tpu")
MIB = 2**20


class ChunkLimits(NamedTuple):
    """What bounds the default number of rows in a chunk of the head.

    Attributes:
      logits_bytes: a chunk has as many rows as have logits of so many bytes.
      wanted_rows: a matmul needs at least so many rows, because it reads the whole kernel.
      most_chunks: where ``wanted_rows`` is the larger one, rows are still divided into so many
        chunks.
    """

    logits_bytes: int
    wanted_rows: int
    most_chunks: int


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where a program will run.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      is_local: whether each array of the program lies on one device whole.
      jax_version: of the JAX that traces it.
      uses_row_kernels: whether the kernels for GPUs compute what they serve, instead of XLA.
      interprets_kernels: whether kernels for a GPU are interpreted on a CPU. Only tests do that.
    """

    platform: str
    is_local: bool
    jax_version: tuple[int, ...] = jax.__version_info__
    uses_row_kernels: bool = False
    interprets_kernels: bool = False

    @property
    def loops_over_rows(self) -> bool:
        """Whether rows and classes may be taken in blocks, one after the other.

        Blocks pay on a CPU, where XLA writes out what it can't fuse, and a block stays in a cache.
        A loop over rows that several devices hold would gather them.
        """
        return self.platform == "cpu" and self.is_local

    @property
    def row_block_bytes(self) -> int:
        """How large a block of rows is in float32. Its temporaries stay in a CPU's cache."""
        return 4 * MIB

    @property
    def row_group_bytes(self) -> int:
        """How large a group of rows is in float32 that are gathered from anywhere."""
        return MIB

    @property
    def class_block_bytes(self) -> int:
        """How large a block of the kernel's classes is in float32, likewise."""
        return 8 * MIB

    @property
    def writes_out_shared_terms(self) -> bool:
        """Whether XLA writes an array out where two results need it, instead of computing it twice.

        XLA's CPU backend fuses a sum of exponentials into one pass over the logits. Where a second
        sum or a gradient needs the same exponentials, it writes them all to memory.
        """
        return self.platform == "cpu"

    @property
    def writes_out_comparisons(self) -> bool:
        """Whether XLA writes a comparison out instead of fusing it into a sum."""
        return self.platform == "cpu"

    @property
    def most_label_comparisons(self) -> int:
        """With how many labels of a row each class is compared, to put gradients at the labels.

        XLA fuses a comparison into the gradient, where it takes arithmetic for every class. More
        labels are scattered into a gradient that is written out in float32. On a CPU the two take
        as long at 8 labels for float32 logits, and at 16 for bfloat16. By the arithmetic and the
        bandwidth of an H100 they would at about 16.
        """
        return 16

    @property
    def loses_nan_in_maximum(self) -> bool:
        """Whether the maximum of many numbers may be a number where one of them is NaN.

        So it is on XLA's CPU backend. A sum keeps the NaN.
        """
        return self.platform == "cpu" or self.interprets_kernels

    @property
    def takes_few_classes_one_by_one(self) -> bool:
        """Whether rows of a few classes are normalized class by class.

        A CPU sums rows of a few classes one row at a time, but takes a class of many rows at once.
        JAX 0.10 compiles that wrongly in a program for several devices, at the lowest level of
        optimization.
        """
        return self.loops_over_rows and self.jax_version >= (0, 11)

    @property
    def widens_arrays_in_loops(self) -> bool:
        """Whether a loop that slices a 16-bit array converts all of the array in each step.

        XLA's CPU backend does that in JAX 0.10. It can't do it for integers of 16 bits.
        """
        return self.platform == "cpu" and self.jax_version < (0, 11)

    @property
    def writes_out_transformed_logits(self) -> bool:
        """Whether XLA writes out a block of logits that bias, scale, softcap or a mask changed.

        XLA's CPU backend does from JAX 0.11 on. Before, it computes them again for each use.
        """
        return self.platform == "cpu" and self.jax_version >= (0, 11)

    @property
    def copies_tiles_it_replaces(self) -> bool:
        """Whether XLA copies a chunk's logits of which each block is replaced by its gradient.

        XLA's CPU backend does in JAX 0.10, where the blocks of two such arrays are compared.
        """
        return self.platform == "cpu" and self.jax_version < (0, 11)

    @property
    def copies_scaled_gradients(self) -> bool:
        """Whether XLA puts a gradient that is scaled into another array than the unscaled one.

        Its TPU backend does.
        """
        return self.platform == "tpu"

    @property
    def widens_what_it_exchanges(self) -> bool:
        """Whether XLA converts a 16-bit kernel to float32 before it is gathered from devices.

        XLA's CPU backend gathers in float32 alone.
        """
        return self.platform == "cpu"

    @property
    def reads_of_state(self) -> int:
        """How often XLA reads logits from memory for the state of their rows.

        On a GPU, for the maximum and again for the sums. A CPU has them in a cache the second time,
        and of a TPU the least is counted.
        """
        return 2 if self.platform == "gpu" else 1

    @property
    def reads_of_dense_cost(self) -> int:
        """How often XLA reads logits from memory for a cost by class, likewise.

        That is what dense targets cost, and the sums of a divergence.
        """
        return 1 if self.platform == "gpu" else 0

    @property
    def needs_for_row_kernels(self) -> str | None:
        """What the row kernels for GPUs would need instead of this backend, or None.

        Older versions of JAX lack parts of its Pallas. XLA can't divide a kernel among devices.
        """
        if self.platform != "gpu":
            return f"a program for a GPU, got one for a {self.platform}"
        if self.jax_version < (0, 11, 2):
            return f"JAX 0.11.2 or newer, got {'.'.join(map(str, self.jax_version))}"
        if not self.is_local:
            return "rows on one device; with several devices, use jax.shard_map or sxe.over_mesh"
        return None

    @property
    def cores(self) -> int:
        """The multiprocessors of a GPU, which the row kernels divide rows among.

        An H100 and an H200 have 132. On another GPU some are idle, or some take two turns.
        """
        return 132

    @property
    def class_multiple(self) -> int:
        """Of how many classes a 16-bit product needs a multiple, or XLA pads its operands.

        cuBLAS wants rows of whole 16 bytes.
        """
        return 8 if self.platform == "gpu" else 1

    def product_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """The dtype in which hidden states and kernel are multiplied, exactly, for the logits.

        It is their own. On a CPU it is float32 for float16, which XLA would widen anyway.
        """
        widened = dtype == jnp.float16 and self.platform == "cpu"
        return jnp.dtype(jnp.float32 if widened else dtype)

    def gradient_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """The dtype in which the logits' gradient is multiplied with hidden states and kernel.

        An accelerator multiplies bfloat16 with bfloat16 only, so that the gradient is rounded to
        it. A CPU gains little by that. Float16 would lose every probability below 6e-8.
        """
        if dtype == jnp.bfloat16 and self.platform != "cpu":
            return jnp.dtype(jnp.bfloat16)
        return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)

    def chunk_limits(self, dtype: DTypeLike) -> ChunkLimits:
        """The limits for hidden states and a kernel of that dtype."""
        if self.platform != "cpu":
            # Each chunk reads the kernel twice, and reads and writes its gradient, in float32. In
            # bfloat16, at 16384 x 4096 x 131072, chunks of 1024, 2048, 4096 and 8192 rows took an
            # NVIDIA H200 94, 84 to 87, 89 and 88 ms, with 2.5, 2.8, 4.3 and 8.3 GiB of temporaries.
            # By its data sheet a TPU v6e (1.64 TB/s, 918 TFLOP/s) computes the three products of
            # 1,120 rows while it moves the kernel. In float32 no chunks have been compared.
            rows = 2048 if jnp.dtype(dtype).itemsize == 2 else 512
            return ChunkLimits(32 * MIB, rows, 8)
        # With what else is as large, a chunk needs below 64 MiB. For some options XLA makes a copy
        # of the logits in JAX 0.10.
        return ChunkLimits((24 if self.jax_version < (0, 11) else 48) * MIB, 128, 16)


def backend_of(*arrays: Array) -> Backend:
    """The backend of a program that is traced with these arrays.

    It runs on the devices of the mesh around the call, or of the mesh in the arrays' types, which
    this process may not have: it then compiles for them. Without a mesh it runs on JAX's default
    backend.
    """
    around = jax.sharding.get_abstract_mesh()
    types = [jax.typeof(x).sharding for x in arrays]
    meshes = [around, *(of_type.mesh for of_type in types)]
    platforms = [mesh.abstract_device.platform for mesh in meshes if mesh.abstract_device]
    platform = platforms[0] if platforms else jax.default_backend()
    # Nobody knows whether several devices split an array without a mesh.
    alone = device_count() == 1 and all(mesh.size <= 1 for mesh in meshes)
    alone = alone and not any(axes for of_type in types for axes in of_type.spec)
    manual = not around.empty and set(around.manual_axes) == set(around.axis_names)
    return Backend("gpu" if platform in ("cuda", "rocm") else platform, alone or manual)


def apart(m: Array, after: Array, backend: Backend) -> Array:
    """m, computed after ``after``, so that XLA doesn't see that the two share terms.

    See ``Backend.writes_out_shared_terms``.
    """
    if backend.writes_out_shared_terms:
        # No derivative passes through what only hides m: JAX 0.12 can't transpose it in a loop.
        m, _ = lax.optimization_barrier((m, lax.stop_gradient(after)))
    return m


def bits_of(x: Array, backend: Backend) -> Array:
    """x, or its bits as integers where a loop would convert all of x in each step."""
    if backend.widens_arrays_in_loops and x.dtype.itemsize == 2:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def rounded(z: Array) -> Array:
    """z, a product, rounded wherever it is used.

    XLA computes logits again for each use, and makes one operation of a product and a sum, which is
    rounded once. Where it did so in one use alone, x - m of the largest logit would not be 0, and
    the loss of a confident row would be that difference. The choice of no effect keeps the product
    and a sum apart.
    """
    return jnp.where(jnp.isnan(z), -z, z)
