"""What the kernels for GPUs share: states of rows in the lanes of warps, and how a kernel is run.

A Pallas "thread" is a warpgroup: 4 warps of 32 lanes. ``jnp.max`` and ``jnp.sum`` reduce within a
warp only. JAX gives all warpgroups of a program one scratch for a reduction that crosses warps, and
their results would mix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu

from sxe._arrays import vary_like
from sxe._rows.gpu_choice import LANES

plgpu: Any = mosaic_gpu  # its interface is not the same in all versions of JAX

WARPS = 4  # of a warpgroup


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
    """The results of a kernel whose body gets operands, results and scratch as references.

    Args:
      body: what each warpgroup does.
      operands: arrays in memory. Results vary along mesh axes as the first one does.
      results: their shapes and dtypes.
      grid: how many programs there are along each axis, by its name. The last axis is CUDA's x,
        which alone may be longer than 65,535.
      groups: warpgroups of a program, along the axis "group".
      scratch: what a program has in shared memory.
      interpret: on a CPU, for tests.
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
    with jax.enable_x64(False):  # nothing in a kernel has 64 bits, and loops would count in them
        found = call(*operands)
    return vary_like(list(found), operands[0])  # JAX's types do not say that results vary


def fragment_layout(vector: int) -> Any:
    """Of an array [4, 32 vector]: each warp has a row, each lane ``vector`` neighbours of it."""
    fragment = WARPS, LANES * vector
    return plgpu.Layout.TILED(plgpu.Tiling((fragment, (vector,))), (-3,), (-2,), -1)


def exp_difference(x: Array, m: Array) -> Array:
    """exp(x - m) for x <= m, of the exact difference, and 0 for x = -inf, whatever m is.

    See ``normalizer.exp_difference``.
    """
    m = jnp.maximum(m, jnp.finfo(jnp.float32).min)
    s = x - m
    back = s - x
    lost = (x - (s - back)) - (m + back)
    e = jnp.exp(s)
    return e + e * jnp.where(s > -104, lost, 0.0)  # beyond, e is 0, and lost may be NaN


def log1p(r: Array) -> Array:
    """log(1 + r), without the digits that 1 + r loses."""
    total = 1 + r
    return jnp.where(total == 1, r, jnp.log(total) * (r / jnp.where(total == 1, 1.0, total - 1)))


def add_logits(x: Array, lanes: tuple[Array, Array]) -> tuple[Array, Array]:
    """The states of the lanes with one more logit each, in one exponential."""
    m, r = lanes
    top = jnp.maximum(x, m)
    e = exp_difference(jnp.minimum(x, m), top)
    return top, jnp.where(x > m, e + r * e, r + e)


def merge_lanes(m: Array, r: Array) -> tuple[Array, Array]:
    """The states of the lanes of each warp, [4, n], as one state a warp, [4]."""
    top = jnp.max(m, axis=1)
    of_lanes = lax.broadcast_in_dim(top, m.shape, (0,))
    is_top = m == of_lanes
    rest = jnp.sum(jnp.where(is_top, r, (1 + r) * exp_difference(m, of_lanes)), axis=1)
    return top, rest + (jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1) - 1)


def nan_where_infinite(m: Array, r: Array) -> Array:
    """r, and NaN for a row with a logit of +inf, or with -inf alone."""
    return r + (m - m)


def store(ref: Any, of_rows: Array) -> None:
    """Writes four numbers. JAX 0.12 does not write so few unless it is told to."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, of_rows, optimized=False)
    else:
        ref[...] = of_rows
