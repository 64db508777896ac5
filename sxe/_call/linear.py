"""From a caller's hidden states, kernel and options to the inputs of the head."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sxe._arrays import AxisName, any_class, axis_names, vary, varying, wide_dtype
from sxe._backend import Backend
from sxe._call.options import Options, of_each_row
from sxe._head.chunk import Head, Hidden, Projection, Shared
from sxe._head.chunked import HiddenRows
from sxe._head.path import gradient_path, skips_rows
from sxe._head.projection import Products, Transform, gather_rows, product_precision
from sxe._rows.normalizer import has_softmax
from sxe._rows.rules import RowFunction
from sxe._rows.targets import Rows

T = TypeVar("T")


class Linear(NamedTuple):
    """The arrays from which logits are computed, as a caller passes them. None means off.

    Attributes:
      hidden: [..., D], or the logits themselves, [..., K].
      kernel: [D, K], or None for logits.
      bias: [K].
      logit_scale: a scalar, or [...] with one value per row.
      softcap: a scalar.
    """

    hidden: Array
    kernel: Array | None
    bias: Array | None
    logit_scale: Array | float | None
    softcap: Array | float | None

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the product."""
        operands = (self.hidden,) if self.kernel is None else (self.hidden, self.kernel)
        return jnp.result_type(*operands)

    @property
    def row_scale(self) -> Array | None:
        return of_each_row(self.logit_scale)

    def has_softmax(self, axis_name: AxisName, backend: Backend) -> Array:
        """Rows that have a softmax, as far as is known before the product, bool [...]."""
        if self.kernel is None:
            found = has_softmax(self.hidden, axis_name, backend)
        else:
            found = jnp.all(jnp.isfinite(self.hidden), axis=-1)
        return found if self.row_scale is None else found & jnp.isfinite(self.row_scale)


def head_of(
    f: RowFunction, sides: Sequence[Linear], options: Options, *, ranks: bool = False
) -> Head:
    """The configuration of the head for the rows of a call."""
    return Head(
        f=f,
        products=tuple(
            Products(dtype, product_precision(dtype), f.backend) for dtype in _dtypes(sides)
        ),
        path=gradient_path(options.rule, options.reduction),
        rule=options.rule,
        chunk_size=options.chunk_size,
        skips=options.leaves_rows_out and skips_rows(options.rule, f.backend),
        has_weights=options.weights is not None,
        predicts=options.return_metrics,
        ranks=ranks,
    )


def _dtypes(sides: Sequence[Linear]) -> list[jnp.dtype]:
    """The dtype of each product: float64 for all if any of them has it."""
    wide = wide_of(sides)
    return [wide if wide == jnp.float64 else side.dtype for side in sides]


def wide_of(sides: Sequence[Linear]) -> jnp.dtype:
    """The dtype of logits and results."""
    return wide_dtype(*(side.dtype for side in sides))


def projections_of(
    sides: Sequence[Linear], options: Options
) -> tuple[tuple[Projection, ...], HiddenRows]:
    """The projections that all rows share, and the hidden states of each row, [N, ...]."""
    class_mask, dtype = options.class_mask, wide_of(sides)
    if class_mask is not None:
        # If no class can occur, no row counts. Mask no class then, so that all logits are finite.
        class_mask = class_mask | ~any_class(class_mask, options.axis_name)

    def wide(x: Array | float | None) -> Array | None:
        return None if x is None else jnp.asarray(x, dtype)

    projections, hidden = [], []
    for side in sides:
        scale = None if side.row_scale is not None else wide(side.logit_scale)
        transform = Transform(wide(side.bias), scale, wide(side.softcap), class_mask)
        kernel = side.kernel
        if kernel is not None:
            kernel = _wide_kernel(side.hidden, kernel, options, dtype)
        projections.append(Projection(kernel, transform))
        of_rows = Hidden(side.hidden.astype(dtype), wide(side.row_scale))
        hidden.append(flat_rows(of_rows, side.hidden.shape[:-1]))
    return tuple(projections), tuple(hidden)


def _wide_kernel(hidden: Array, kernel: Array, options: Options, dtype: DTypeLike) -> Array:
    # Widen here and narrow again in the rule, so that a gradient is rounded once, after all sums.
    fsdp = None if options.layout is None else options.layout.fsdp
    if fsdp is None:
        return kernel.astype(dtype)
    return gather_rows(kernel, fsdp, varying(hidden), dtype)


def flat_rows(x: T, shape: tuple[int, ...]) -> T:
    """Reshape arrays [..., F], whose rows have this shape, to [N, F]."""
    return jax.tree.map(lambda a: a.reshape(math.prod(shape), *a.shape[len(shape) :]), x)


def typed_alike(
    shared: Shared, hidden: HiddenRows, rows: Rows, axis_name: AxisName
) -> tuple[Shared, HiddenRows, Rows]:
    """Cast the inputs of the head to vary over the same mesh axes.

    Rows and targets without a class axis vary only over the mesh axes of the rows. shard_map needs
    a cotangent of the same type as its input. The transpose of this cast sums the gradients of
    hidden states and kernel over devices, once per call.
    """
    every = frozenset().union(*(varying(a) for a in jax.tree.leaves((shared, hidden, rows))))

    def tile(x: T) -> T:
        return jax.tree.map(lambda a: vary(a, every), x)

    def row(x: T) -> T:
        return jax.tree.map(lambda a: vary(a, every - set(axis_names(axis_name))), x)

    targets: Any = row(rows.targets)
    if targets is not None and targets.dense is not None:
        targets = targets._replace(dense=targets.dense._replace(t=tile(targets.dense.t)))
    shared = tile(shared)._replace(z_loss=row(shared.z_loss))
    return shared, tile(hidden), row(rows)._replace(targets=targets)
