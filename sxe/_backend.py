"""The backend of a program: all facts about platforms and JAX versions on which sxe depends.

Each call makes one ``Backend`` and passes it on. No other module of the losses compares platforms,
or reads JAX's version or devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, device_count, lax
from jax.sharding import AbstractDevice
from jax.typing import DTypeLike

PLATFORMS = ("cpu", "gpu", "tpu")
MIB = 2**20


class ChunkLimits(NamedTuple):
    """The limits that determine the default number of rows in a chunk of the head.

    Attributes:
      logits_bytes: the size of a chunk's logits, which determines its number of rows.
      wanted_rows: the least number of rows for an efficient matmul, which reads the whole kernel.
        A chunk has at least this many rows, unless ``fewest_chunks`` prevents it.
      fewest_chunks: ``wanted_rows`` never makes the number of chunks smaller than this.
    """

    logits_bytes: int
    wanted_rows: int
    fewest_chunks: int


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where a program will run, and by which implementation.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      is_local: whether each array of the program lies on a single device.
      jax_version: the version of JAX that traces the program.
      uses_row_kernels: whether GPU kernels replace XLA, for the rows that they support.
      interprets_kernels: whether GPU kernels are interpreted on a CPU. Only tests do that.
    """

    platform: str
    is_local: bool
    jax_version: tuple[int, ...] = jax.__version_info__
    uses_row_kernels: bool = False
    interprets_kernels: bool = False

    @property
    def loops_over_rows(self) -> bool:
        """Whether rows and classes may be processed in blocks, one after the other.

        Blocks pay off on a CPU: XLA writes out what it can't fuse, and a block stays in a cache. A
        loop over rows that are sharded over devices would gather them.
        """
        return self.platform == "cpu" and self.is_local

    @property
    def row_block_bytes(self) -> int:
        """The size of a block of rows in float32. Its temporaries stay in a CPU's cache."""
        return 4 * MIB

    @property
    def row_group_bytes(self) -> int:
        """The size in float32 of a group of rows that are not adjacent and are gathered at once."""
        return MIB

    @property
    def class_block_bytes(self) -> int:
        """The size of a block of the kernel's classes in float32. It stays in a CPU's cache."""
        return 8 * MIB

    @property
    def writes_out_shared_terms(self) -> bool:
        """Whether XLA writes out an array that two results need, instead of computing it twice.

        XLA's CPU backend fuses a sum of exponentials into one pass over the logits. If a second sum
        or a gradient needs the same exponentials, it writes all of them to memory.
        """
        return self.platform == "cpu"

    @property
    def writes_out_comparisons(self) -> bool:
        """Whether XLA writes out a comparison instead of fusing it into a sum."""
        return self.platform == "cpu"

    @property
    def most_label_comparisons(self) -> int:
        """The largest number of labels per row for which each class is compared with each label.

        The comparisons put gradients at the labels. XLA fuses them into the gradient, where each
        costs arithmetic for every class. With more labels, the gradient is written out in float32
        and the values at the labels are scattered into it. On a CPU both ways take the same time at
        8 labels for float32 logits, and at 16 for bfloat16. On an H100, both are expected to take
        the same time at about 16 labels, from its arithmetic and its bandwidth.
        """
        return 16

    @property
    def loses_nan_in_maximum(self) -> bool:
        """Whether the maximum of many numbers may be a number although one of them is NaN.

        This is the case on XLA's CPU backend. A sum keeps the NaN.
        """
        return self.platform == "cpu" or self.interprets_kernels

    @property
    def takes_few_classes_one_by_one(self) -> bool:
        """Whether rows with few classes are normalized class by class.

        A CPU sums rows with few classes one row at a time, but processes one class of many rows at
        once. JAX 0.10 miscompiles this in a program for several devices, at the lowest level of
        optimization.
        """
        return self.loops_over_rows and self.jax_version >= (0, 11)

    @property
    def widens_arrays_in_loops(self) -> bool:
        """Whether a loop that slices a 16-bit array converts the whole array in each step.

        XLA's CPU backend converts 16-bit floats like this in JAX 0.10, but not 16-bit integers.
        """
        return self.platform == "cpu" and self.jax_version < (0, 11)

    @property
    def needs_for_row_kernels(self) -> str | None:
        """What the GPU row kernels need and this backend does not have, or None.

        Older versions of JAX lack features of Pallas, and XLA can't partition a kernel over
        devices.
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
        """The number of multiprocessors of a GPU, among which the row kernels divide the rows.

        An H100 and an H200 have 132. On another GPU, some are idle or some take two turns.
        """
        return 132

    def product_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """The dtype in which hidden states and kernel are multiplied for the logits, without loss.

        It is their own dtype, except for float16 on a CPU, which XLA would convert to float32
        anyway.
        """
        widened = dtype == jnp.float16 and self.platform == "cpu"
        return jnp.dtype(jnp.float32 if widened else dtype)

    def gradient_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """The dtype in which the gradient of the logits is multiplied with hidden and kernel.

        An accelerator multiplies bfloat16 only with bfloat16, so the gradient is rounded to it. A
        CPU would gain little from this. Float16 would lose every probability below 6e-8.
        """
        if dtype == jnp.bfloat16 and self.platform != "cpu":
            return jnp.dtype(jnp.bfloat16)
        return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)

    def chunk_limits(self, dtype: DTypeLike) -> ChunkLimits:
        """The limits for hidden states and a kernel of this dtype."""
        if self.platform != "cpu":
            # Each chunk reads the kernel twice, and reads and writes its gradient, in float32. In
            # bfloat16, at 16384 x 4096 x 131072, chunks of 1024, 2048, 4096 and 8192 rows took an
            # NVIDIA H200 94, 84 to 87, 89 and 88 ms, with 2.5, 2.8, 4.3 and 8.3 GiB of temporaries.
            # By its data sheet a TPU v6e (1.64 TB/s, 918 TFLOP/s) computes the three products of
            # 1,120 rows while it moves the kernel. Chunks in float32 have not been compared.
            rows = 2048 if jnp.dtype(dtype).itemsize == 2 else 512
            return ChunkLimits(32 * MIB, rows, 8)
        # On JAX 0.12, chunks with logits of 40 to 47 MiB had 49 to 55 MiB of temporaries. In JAX
        # 0.10, XLA copies the logits for some options.
        return ChunkLimits((24 if self.jax_version < (0, 11) else 48) * MIB, 128, 16)

    # Only ``sxe.plan`` uses the rest: how XLA compiles the programs of the losses.

    @property
    def writes_out_transformed_logits(self) -> bool:
        """Whether XLA writes out a block of logits after a bias, scale, softcap or mask.

        XLA's CPU backend does from JAX 0.11 on. Before, it computed them again for each use.
        """
        return self.platform == "cpu" and self.jax_version >= (0, 11)

    @property
    def copies_tiles_it_replaces(self) -> bool:
        """Whether XLA copies the logits of a chunk if each block is replaced by its gradient.

        XLA's CPU backend does in JAX 0.10, if the blocks of two such arrays are compared.
        """
        return self.platform == "cpu" and self.jax_version < (0, 11)

    @property
    def copies_scaled_gradients(self) -> bool:
        """Whether XLA needs a second array to scale a gradient, instead of scaling it in place.

        XLA's TPU backend does.
        """
        return self.platform == "tpu"

    @property
    def widens_what_it_exchanges(self) -> bool:
        """Whether XLA converts a 16-bit kernel to float32 before gathering it from devices.

        XLA's CPU backend gathers only in float32.
        """
        return self.platform == "cpu"

    @property
    def reads_of_state(self) -> int:
        """How often XLA reads logits from memory to compute the state of their rows.

        A GPU reads them for the maximum and again for the sums. A CPU has them in a cache when it
        needs them again. For a TPU, the least possible number, 1, is assumed.
        """
        return 2 if self.platform == "gpu" else 1

    @property
    def reads_of_dense_cost(self) -> int:
        """How often XLA reads logits from memory, in addition, to compute a cost of each class.

        Dense targets and the sums of a divergence have such a cost.
        """
        return 1 if self.platform == "gpu" else 0

    @property
    def class_multiple(self) -> int:
        """XLA pads the operands of a 16-bit product to a multiple of this number of classes.

        cuBLAS needs rows of a multiple of 16 bytes.
        """
        return 8 if self.platform == "gpu" else 1


def backend_of(*arrays: Array) -> Backend:
    """The backend of a program that is traced with these arrays.

    The program runs on the devices of the mesh around the call, or of the mesh in the types of the
    arrays. This process may not have these devices; it then compiles for them. Without a mesh, the
    program runs on JAX's default backend.
    """
    around = jax.sharding.get_abstract_mesh()
    types = [jax.typeof(x).sharding for x in arrays]
    meshes = [around, *(of_type.mesh for of_type in types)]
    platforms = [_platform(mesh.abstract_device) for mesh in meshes if mesh.abstract_device]
    platform = platforms[0] if platforms else jax.default_backend()
    # Without a mesh, it is unknown whether an array is sharded over several devices.
    alone = device_count() == 1 and all(mesh.size <= 1 for mesh in meshes)
    alone = alone and not any(axes for of_type in types for axes in of_type.spec)
    manual = not around.empty and set(around.manual_axes) == set(around.axis_names)
    return Backend("gpu" if platform in ("cuda", "rocm") else platform, alone or manual)


def _platform(device: AbstractDevice) -> str:
    """The platform of a device, which JAX 0.10.0 does not name: a kind is "cpu" or "TPU v5e"."""
    if hasattr(device, "platform"):
        return device.platform
    kind = device.device_kind.lower()
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")


def apart(m: Array, after: Array, backend: Backend) -> Array:
    """m, computed after ``after``, so that XLA doesn't see that the two share terms.

    See ``Backend.writes_out_shared_terms``.
    """
    if backend.writes_out_shared_terms:
        # ``after`` gets no derivative, because JAX 0.12 can't transpose the barrier in a loop.
        m, _ = lax.optimization_barrier((m, lax.stop_gradient(after)))
    return m


def bits_of(x: Array, backend: Backend) -> Array:
    """x, or its bits as integers if a loop would otherwise convert all of x in each step."""
    if backend.widens_arrays_in_loops and x.dtype.itemsize == 2:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def rounded(z: Array) -> Array:
    """The product z, rounded in the same way wherever it is used.

    XLA may compute logits again for each use, and may fuse a product and a sum into one operation
    that rounds once. If it fused them in only some uses, x - m would not be 0 for the largest
    logit. In a row whose largest logit leads by far, this difference could exceed the loss. The
    select changes no value, and prevents the fusion of the product with a sum.
    """
    return jnp.where(jnp.isnan(z), -z, z)
