"""The options of a call, and how each is parsed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import jax
from jax import Array
from jax.typing import ArrayLike

from sxe._arrays import AxisName, axis_names
from sxe._call import arguments
from sxe._call.layout import Layout
from sxe._errors import ArgumentTypeError, ArgumentValueError
from sxe._rows.kl_divergence import MODES, Mode
from sxe._rows.rules import RULES

Reduction = Literal["mean", "sum", "none"]
Rule = Literal["vjp", "jvp", "autodiff"]
Implementation = Literal["xla", "mosaic_gpu"] | None
REDUCTIONS = ("mean", "sum", "none")
IMPLEMENTATIONS = ("xla", "mosaic_gpu")


# The losses' keyword arguments, for type checkers: return_metrics decides the type of the result.


class _CommonOptions(TypedDict, total=False):
    label_weights: ArrayLike | None
    where: ArrayLike | None
    weights: ArrayLike | None
    class_weights: ArrayLike | None
    class_mask: ArrayLike | None
    label_smoothing: ArrayLike
    z_loss: ArrayLike
    ignore_index: int | None
    axis_name: AxisName
    batch_axis_name: AxisName
    implementation: Implementation


class LogitsGradientOptions(_CommonOptions, total=False):
    axis: int | tuple[int, ...]
    reduction: Literal["mean", "sum"]


class LogitsOptions(_CommonOptions, total=False):
    axis: int | tuple[int, ...]
    reduction: Reduction
    rule: Rule


class HeadOptions(_CommonOptions, total=False):
    bias: ArrayLike | None
    logit_scale: ArrayLike
    softcap: ArrayLike | None
    chunk_size: int | None
    reduction: Reduction
    rule: Rule


def _option(parse: Callable[[str, Any], Any], default: Any = None, *, static: bool = False) -> Any:
    """A field with the function that parses its argument. ``static`` is as for ``jax.jit``."""
    return dataclasses.field(default=default, metadata={"parse": parse, "static": static})


def _array(name: str, value: ArrayLike | None) -> Array | None:
    return None if value is None else arguments.array(name, value)


def _label_smoothing(name: str, value: ArrayLike) -> Array | float | None:
    expected = "a number in [0, 1] (0.0 turns it off)"
    return arguments.number(name, value, expected, fits=lambda a: 0 <= a <= 1, off=0)


def _z_loss(name: str, value: ArrayLike) -> Array | float | None:
    expected = "a finite number of at least 0 (0.0 turns it off)"
    return arguments.number(name, value, expected, fits=lambda z: 0 <= z < math.inf, off=0)


def _logit_scale(name: str, value: ArrayLike) -> Array | float | None:
    if isinstance(value, list | tuple) or (hasattr(value, "ndim") and value.ndim):  # one per row
        return arguments.array(name, value)
    expected = "a finite number (1.0 turns it off)"
    return arguments.number(name, value, expected, fits=math.isfinite, off=1)


def _softcap(name: str, value: ArrayLike | None) -> Array | float | None:
    if value is None:
        return None
    expected = "a number above 0 (None turns it off)"
    return arguments.number(name, value, expected, fits=lambda c: c > 0, off=math.inf)


LEAST_BETA = 1e-20  # a smaller share of the mixture could fall below the numbers of float32


def _beta(name: str, value: Any) -> float:
    expected = f"a number from {LEAST_BETA} to below 1"
    beta = arguments.number(name, value, expected, fits=_is_share, off=0)
    if not isinstance(beta, float):
        raise ArgumentTypeError(
            name, f"expected a Python number, got {value!r}; it is static under jax.jit"
        )
    return beta


def _is_share(a: float) -> bool:
    return LEAST_BETA <= a < 1


def _mode(name: str, value: str) -> str:
    return arguments.one_of(name, value, MODES)


def _reduction(name: str, value: str) -> str:
    return arguments.one_of(name, value, REDUCTIONS)


def _rule(name: str, value: str) -> str:
    return arguments.one_of(name, value, tuple(RULES))


def implementation(name: str, value: str | None) -> str | None:
    return None if value is None else arguments.one_of(name, value, IMPLEMENTATIONS)


def chunk_size(name: str, value: Any) -> int | None:
    size = arguments.integer_or_none(name, value)
    if size is not None and size < 1:
        raise ArgumentValueError(name, f"expected at least 1, or None for the default, got {size}")
    return size


def of_each_row(scale: Array | float | None) -> Array | None:
    """The scale if it has one value per row, [...], else None."""
    return scale if isinstance(scale, Array) and scale.ndim else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """The options that a caller passed. An option of None is off.

    Arrays, and numbers that may be traced, come first. The other options are static. Fields are
    named like their arguments, except for two fields without an argument. ``layout`` describes how
    a mesh shards global arrays. ``returns_log_prob`` requests the log-probability of the label and
    the entropy instead of the loss.
    """

    label_weights: Array | None = _option(_array)
    where: Array | None = _option(_array)
    weights: Array | None = _option(_array)
    class_weights: Array | None = _option(_array)
    class_mask: Array | None = _option(_array)
    label_smoothing: Array | float | None = _option(_label_smoothing)
    z_loss: Array | float | None = _option(_z_loss)
    bias: Array | None = _option(_array)
    logit_scale: Array | float | None = _option(_logit_scale)
    softcap: Array | float | None = _option(_softcap)
    target_bias: Array | None = _option(_array)
    target_logit_scale: Array | float | None = _option(_logit_scale)
    target_softcap: Array | float | None = _option(_softcap)

    ignore_index: int | None = _option(arguments.integer_or_none, static=True)
    axis: int | tuple[int, ...] = _option(arguments.axis, -1, static=True)
    reduction: Reduction = _option(_reduction, "mean", static=True)
    return_metrics: bool = _option(arguments.boolean, False, static=True)
    axis_name: AxisName = _option(arguments.mesh_axes, static=True)
    batch_axis_name: AxisName = _option(arguments.mesh_axes, static=True)
    rule: Rule = _option(_rule, "vjp", static=True)
    mode: Mode = _option(_mode, "forward", static=True)
    beta: float = _option(_beta, 0.5, static=True)
    implementation: Implementation = _option(implementation, static=True)
    chunk_size: int | None = _option(chunk_size, static=True)
    layout: Layout | None = _option(lambda name, value: value, static=True)
    returns_log_prob: bool = _option(arguments.boolean, False, static=True)

    @property
    def row_scale(self) -> Array | None:
        """The logit_scale if it has one value per row, [...], else None."""
        return of_each_row(self.logit_scale)

    @property
    def target_row_scale(self) -> Array | None:
        """The target_logit_scale, likewise."""
        return of_each_row(self.target_logit_scale)

    @property
    def leaves_rows_out(self) -> bool:
        """Whether some rows may count and others not. A class mask excludes all rows or none."""
        return any(a is not None for a in (self.where, self.weights, self.ignore_index))

    @property
    def needs_entropy(self) -> bool:
        return self.returns_log_prob or self.return_metrics

    def of_rows(self) -> dict[str, Array | None]:
        """The arrays that have axes of the logits, by name. They are sharded like these axes."""
        names = ("label_weights", "where", "weights", "class_weights", "class_mask")
        scales = {"logit_scale": self.row_scale, "target_logit_scale": self.target_row_scale}
        return {name: getattr(self, name) for name in names} | scales

    def replace(self, **changes: Any) -> "Options":
        return dataclasses.replace(self, **changes)


def parse(**given: Any) -> Options:
    """Parse the options of one call. Checks that need the shapes of other arguments come later.

    Options that are not passed are off.
    """
    fields = {field.name: field for field in dataclasses.fields(Options)}
    options = Options(
        **{name: fields[name].metadata["parse"](name, value) for name, value in given.items()}
    )
    both = set(axis_names(options.axis_name)) & set(axis_names(options.batch_axis_name))
    if both:
        raise ArgumentValueError(
            "batch_axis_name",
            f"expected mesh axes that axis_name does not contain, got {sorted(both)} in both",
        )
    if options.mode != "jensen_shannon" and options.beta != fields["beta"].default:
        raise ArgumentValueError(
            "beta",
            f"expected no value with mode {options.mode!r}, got {options.beta!r}; it is the "
            "target's share of the mixture in mode 'jensen_shannon'",
        )
    return options
