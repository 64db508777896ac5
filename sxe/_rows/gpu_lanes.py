"""Code that the GPU kernels share: states of rows in the lanes of warps, and a kernel's launch.

A Pallas "thread" is a warpgroup: 4 warps of 32 lanes. ``jnp.max`` and ``jnp.sum`` are used only
within a warp. For a reduction across warps, JAX gives all warpgroups of a program the same scratch
memory, and their results would mix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu

from sxe._arrays import vary_like
from sxe._rows.gpu_choice import LANES

plgpu: Any = mosaic_gpu  # Any, because its interface depends on the version of JAX

WARPS = 4  # warps of a warpgroup


def run(
    body: Callable[..., None],
    operands: list[Array],
    *,
    results: list[jax.ShapeDtypeStruct],
    grid: dict[str, int],
    groups: int = 1,
    scratch: tuple[Any, ...] = (),
    interpret: bool,
) -> list[Array]:
    """Runs a kernel and returns its results.

    Args:
      body: the code of each warpgroup. It takes references to operands, results and scratch.
      operands: arrays in memory. The results vary along the same mesh axes as the first operand.
      results: the shapes and dtypes of the results.
      grid: the number of programs along each axis, by the axis's name. The last axis is CUDA's x,
        the only one that may be longer than 65,535.
      groups: the number of warpgroups of a program, along the axis "group".
      scratch: the arrays of a program in shared memory.
      interpret: whether to interpret the kernel on a CPU, for tests.
    """
    varies = jax.typeof(operands[0]).manual_axis_type
    call = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varies) for a in results],
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups,
        thread_name="group",
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    with jax.enable_x64(False):  # kernels use no 64-bit numbers, but loop counters would have 64
        found = call(*operands)
    return vary_like(list(found), operands[0])  # JAX types the results as not varying


def fragment_layout(vector: int) -> Any:
    """The layout of an array [4, 32 vector]: one row per warp, ``vector`` neighbors per lane."""
    fragment = WARPS, LANES * vector
    return plgpu.Layout.TILED(plgpu.Tiling((fragment, (vector,))), (-3,), (-2,), -1)


def exp_difference(x: Array, m: Array) -> Array:
    """exp(x - m) for x <= m, from the exact difference, and 0 for x = -inf, whatever m is.

    See ``normalizer.exp_difference``.
    """
    m = jnp.maximum(m, jnp.finfo(jnp.float32).min)
    s = x - m
    back = s - x
    lost = (x - (s - back)) - (m + back)
    e = jnp.exp(s)
    return e + e * jnp.where(s > -104, lost, 0.0)  # below -104, e is 0 and lost may be NaN


def log1p(r: Array) -> Array:
    """log(1 + r), accurate even where 1 + r is rounded."""
    total = 1 + r
    return jnp.where(total == 1, r, jnp.log(total) * (r / jnp.where(total == 1, 1.0, total - 1)))


def add_logits(x: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
    """The state of each lane after adding one more logit, with a single exponential."""
    m, r = lanes
    top = jnp.maximum(x, m)
    e = exp_difference(jnp.minimum(x, m), top)
    return top, jnp.where(x > m, e + r * e, r + e)


def merge_lanes(m: Array, r: Array) -> tuple[Array, Array]:
    """The state of each warp, [4], from the states of its lanes, [4, n]."""
    top = jnp.max(m, axis=1)
    of_lanes = lax.broadcast_in_dim(top, m.shape, (0,))
    is_top = m == of_lanes
    rest = jnp.sum(jnp.where(is_top, r, (1 + r) * exp_difference(m, of_lanes)), axis=1)
    return top, rest + (jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1) - 1)


def nan_where_infinite(m: Array, r: Array) -> Array:
    """r, or NaN for a row with a logit of +inf, or with only -inf."""
    return r + (m - m)


def store(ref: Any, of_rows: Array) -> None:
    """Writes four numbers. JAX 0.12 rejects so small a store unless ``optimized`` is False."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, of_rows, optimized=False)
    else:
        ref[...] = of_rows
