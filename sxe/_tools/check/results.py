"""The results of a check, and the largest errors that pass. Text and page show them."""

from typing import NamedTuple

from sxe.derivation import Line


class Tolerance(NamedTuple):
    """The largest errors that pass.

    Attributes:
      autodiff: of a line, compared with autodiff.
      differences: of a line, compared with central differences. In float64 nearly all of the error
        comes from the differences. It is about N eps / h.
      rule: of a gradient rule, compared with autodiff of the function. In bfloat16 this is one
        rounding.
    """

    autodiff: float
    differences: float
    rule: float


TOLERANCES = {
    "float64": Tolerance(autodiff=1e-13, differences=1e-7, rule=1e-13),
    "float32": Tolerance(autodiff=5e-6, differences=5e-6, rule=5e-6),
    "bfloat16": Tolerance(autodiff=4e-2, differences=4e-2, rule=8e-3),
}
PRECISION = {
    "loss": 1e-6,
    "label gradient": 2e-5,
}  # the limits in float32, in the units of `precision.Truth`


class MeasuredLine(NamedTuple):
    """A line of the derivation, with its errors against autodiff and central differences.

    Attributes:
      shown: whether any entries were compared. D1 has none for one row, D3 none for one class.
    """

    line: Line
    shown: bool
    autodiff_error: float
    differences_error: float
    passed: bool

    @property
    def name(self) -> str:
        return self.line.name


class Comparison(NamedTuple):
    """An error, and the expected error as text."""

    name: str
    error: float
    expected: str
    passed: bool


class Precision(NamedTuple):
    """A number that is lost to rounding in float32: the truth, two results and their errors."""

    name: str
    truth: float
    sxe: float
    optax: float
    sxe_error: float
    optax_error: float
    passed: bool


class Sweep(NamedTuple):
    """Relative errors of a number in float32, for logits of growing size or shrinking distance.

    Attributes:
      magnitude: the quantity that changes: "lead", "offset" or "distance".
      row: the logits as text, in which a is the magnitude.
      quantity: the measured number: a key of PRECISION, or "KL divergence".
      at: the magnitudes, the easiest first.
      limits: the largest error with which sxe passes, at each magnitude.
      errors: by implementation, the error at each magnitude; inf where the result is not finite.
    """

    name: str
    magnitude: str
    row: str
    quantity: str
    at: tuple[float, ...]
    limits: tuple[float, ...]
    errors: dict[str, tuple[float, ...]]
    passed: bool


Matrix = tuple[tuple[float, ...], ...]


class Example(NamedTuple):
    """The derivatives of a small problem with one-hot targets, which the page shows.

    Attributes:
      jacobian: the Jacobian of softmax by autodiff, [i][k][j][l].
      q: softmax.
      y: the targets.
      difference: q - y.
      gradient: the gradient of sxe's loss, [N, K] as all matrices here.
      jacobian_error: the error of D4.
      gradient_error: the error of D9.
    """

    jacobian: tuple[tuple[Matrix, ...], ...]
    q: Matrix
    y: Matrix
    difference: Matrix
    gradient: Matrix
    jacobian_error: float
    gradient_error: float


class Report(NamedTuple):
    """All results of `check`."""

    rows: int
    classes: int
    seed: int
    dtype: str
    beta: float
    lines: tuple[MeasuredLine, ...]
    row_sums: tuple[Comparison, ...]
    row_lines: tuple[MeasuredLine, ...]
    rules: tuple[Comparison, ...]
    precision: tuple[Precision, ...]
    sweeps: tuple[Sweep, ...]
    distances: Sweep
    example: Example

    @property
    def failures(self) -> tuple[str, ...]:
        """The names of all results that did not pass. Only the errors of sxe are judged."""
        parts = (
            *(self.lines, self.row_sums, self.row_lines, self.rules),
            *(self.precision, self.sweeps, [self.distances]),
        )
        return tuple(result.name for part in parts for result in part if not result.passed)
