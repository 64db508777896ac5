"""What a check finds, and the errors that it allows. The text and the page show these."""

from typing import NamedTuple

from sxe.derivation import Line


class Tolerance(NamedTuple):
    """The largest errors that pass.

    Attributes:
      autodiff: of a line against autodiff.
      differences: of a line against central differences. In float64 it is the differences that are
        off, by about N eps / h.
      rule: of a rule against autodiff of its function. In bfloat16 it is one rounding.
    """

    autodiff: float
    differences: float
    rule: float


TOLERANCES = {
    "float64": Tolerance(autodiff=1e-13, differences=1e-7, rule=1e-13),
    "float32": Tolerance(autodiff=5e-6, differences=5e-6, rule=5e-6),
    "bfloat16": Tolerance(autodiff=4e-2, differences=4e-2, rule=8e-3),
}
PRECISION = {"loss": 1e-6, "label gradient": 2e-5}  # in float32, in the units of `precision.Truth`


class MeasuredLine(NamedTuple):
    """A line of the derivation, and how far it is from autodiff and from central differences.

    Attributes:
      shown: whether there were entries to compare: one row or one class leaves D1 or D3 none.
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
    """An error, and what it is expected to be."""

    name: str
    error: float
    expected: str
    passed: bool


class Precision(NamedTuple):
    """A number that float32 rounds away: the truth, two results and their errors."""

    name: str
    truth: float
    sxe: float
    optax: float
    sxe_error: float
    optax_error: float
    passed: bool


class Sweep(NamedTuple):
    """Relative errors of a number in float32 as the logits grow, or come near to one another.

    Attributes:
      magnitude: what changes, "lead", "offset" or "distance".
      row: the logits as text, with a for the magnitude.
      quantity: the number, a key of PRECISION, or "KL divergence".
      at: the magnitudes, from the easiest on.
      limits: the largest error of sxe that passes, at each magnitude.
      errors: at each magnitude, by who computed the number; inf where it is not finite.
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
    """What autodiff gives for a small problem with one-hot targets, for the page to show.

    Attributes:
      jacobian: of softmax, [i][k][j][l].
      q: softmax.
      y: the targets.
      difference: q - y.
      gradient: of the loss, by the attached rule; [N, K], as all matrices here.
      jacobian_error: of D4.
      gradient_error: of D9.
    """

    jacobian: tuple[tuple[Matrix, ...], ...]
    q: Matrix
    y: Matrix
    difference: Matrix
    gradient: Matrix
    jacobian_error: float
    gradient_error: float


class Report(NamedTuple):
    """What `check` measured."""

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
        """The names of what did not pass. Only sxe's errors are judged."""
        parts = (
            *(self.lines, self.row_sums, self.row_lines, self.rules),
            *(self.precision, self.sweeps, [self.distances]),
        )
        return tuple(result.name for part in parts for result in part if not result.passed)
