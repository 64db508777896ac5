"""The graphical parts of the page: colored tables, and plots of errors by magnitude."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple
from xml.etree.ElementTree import Element

from sxe._tools.check.page.elements import (
    MINUS,
    bound,
    e,
    number,
    plain,
    result,
    superscript,
    table,
)
from sxe._tools.check.results import Example, Matrix, Sweep


def _entry(value: float, largest: float, kind: str, places: int) -> Element:
    """A cell, colored by magnitude. The square root keeps small entries visible."""
    strength = math.sqrt(min(abs(value) / largest, 1))
    text = f"{value:.{places}f}".replace("-", MINUS)
    if abs(value) < 1:
        text = text.replace("0.", ".", 1)
    return e(
        "td",
        e("data", text if value else "0", value=repr(value)),
        class_=kind,
        style=f"--strength:{100 * strength:.0f}%" if value else None,
    )


def jacobian(example: Example) -> Element:
    """The Jacobian of softmax: rows (i, k), columns (j, l). Each case has a color."""
    N, K = len(example.q), len(example.q[0])
    largest = 1 / 4  # the maximum of s_k (1 - s_k)

    def head(letter: str, n: int, **attributes: object) -> Element:
        return e("th", e("i", letter), f" = {n + 1}", **attributes)

    def kind(i: int, k: int, j: int, ell: int) -> str:
        return "apart" if i != j else "same" if k == ell else "other"

    pairs = list(itertools.product(range(N), range(K)))
    columns = [
        e(
            "tr",
            e("td", rowspan=2, colspan=2),
            *(head("j", j, colspan=K, scope="colgroup", class_="first") for j in range(N)),
        ),
        e(
            "tr",
            *(
                head("l", ell, scope="col", class_="first" if ell == 0 else None)
                for _, ell in pairs
            ),
        ),
    ]
    bodies = []
    for i in range(N):
        rows = []
        for k in range(K):
            cells = [
                _entry(
                    example.jacobian[i][k][j][ell],
                    largest,
                    kind(i, k, j, ell) + (" first" if ell == 0 else ""),
                    places=3,
                )
                for j, ell in pairs
            ]
            group = [head("i", i, rowspan=K, scope="rowgroup")] if k == 0 else []
            rows.append(e("tr", *group, head("k", k, scope="row"), *cells))
        bodies.append(rows)
    return e(
        "figure",
        table(
            f"The Jacobian of softmax for {N} rows and {K} classes, by autodiff. Row (i, k) and "
            "column (j, l) have the derivative of the softmax of row i, class k, with respect to "
            "the logit of row j, class l.",
            columns,
            *bodies,
            label="The Jacobian of softmax",
            class_="heat jacobian",
        ),
        e("p", "Largest difference from D4: ", number(example.jacobian_error), "."),
    )


def gradient(example: Example) -> Element:
    """q - y = difference, and the gradient of the loss in the layout of D9."""
    transposed = tuple(zip(*example.gradient, strict=True))
    N = len(example.q)
    minus, equals, arrow = (
        e("span", sign, class_="operator", aria_hidden="true")
        for sign in (MINUS, "=", "\N{RIGHTWARDS ARROW}")
    )
    return e(
        "figure",
        e(
            "div",
            *(_matrix("q, softmax", example.q, 1), minus),
            *(_matrix("y, one-hot targets", example.y, 1), equals),
            *(_matrix(f"q {MINUS} y", example.difference, 1), arrow),
            _matrix("its transpose / N", transposed, 1 / N, names=("class", "row")),
            class_="equation",
        ),
        e(
            "p",
            "The last matrix is the transposed gradient of sxe's loss by jax.grad. Its largest "
            "difference from D9: ",
            number(example.gradient_error),
            ".",
        ),
    )


def _matrix(
    caption: str, matrix: Matrix, largest: float, names: tuple[str, str] = ("row", "class")
) -> Element:
    def head(name: str, n: int, scope: str) -> Element:
        return e("th", e("span", f"{name} ", class_="spoken"), f"{n + 1}", scope=scope)

    columns = (head(names[1], n, "col") for n in range(len(matrix[0])))
    rows = [
        e(
            "tr",
            head(names[0], n, "row"),
            *(_entry(v, largest, "less" if v < 0 else "more", places=2) for v in values),
        )
        for n, values in enumerate(matrix)
    ]
    return table(caption, [e("tr", e("td"), *columns)], rows, class_="heat matrix")


class Series(NamedTuple):
    """How the results of one implementation are drawn: color (by kind) and shape."""

    kind: str
    mark: Callable[[float, float], str]


def _disc(x: float, y: float) -> str:
    return f"M{x - 2.2:.1f} {y:.1f}a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0"


def _square(x: float, y: float) -> str:
    return f"M{x - 2.2:.1f} {y - 2.2:.1f}h4.4v4.4h-4.4z"


def _cross(x: float, y: float) -> str:
    return f"M{x - 2.2:.1f} {y - 2.2:.1f}l4.4 4.4m0-4.4l-4.4 4.4"


SERIES = {
    "sxe": Series("disc", _disc),
    "optax": Series("square", _square),
    "autodiff of D0": Series("cross", _cross),
    "textbook form": Series("cross", _cross),
}
AXES = {  # label, ticks, scale
    "lead": ("lead of the label", (0, 20, 40, 60, 80), float),
    "offset": ("common offset", (1, 1e2, 1e4, 1e6, 1e8), math.log10),
    "distance": ("distance of the logits", (10, 1, 0.1, 1e-2, 1e-3, 1e-4), math.log10),
}
WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 388, 34, 216
LOWEST = 1e-9  # smaller errors, including 0, are drawn at this height


def _tick(value: float) -> str:
    if value == 0 or 0.1 < value < 1e3:
        return f"{value:g}"
    return f"10{superscript(round(math.log10(value)))}"


def _height(error: float) -> float:
    """The height of an error on the plot. Errors that are not finite are above the red line."""
    if math.isinf(error):
        return TOP - 9
    power = math.log10(min(max(error, LOWEST), 1))
    return TOP + (BOTTOM - TOP) * power / math.log10(LOWEST)


def sweep(sweep: Sweep) -> Element:
    """A figure: the plot, its content in words, and its numbers."""
    label, ticks, scale = AXES[sweep.magnitude]
    low, high = scale(sweep.at[0]), scale(sweep.at[-1])

    def across(value: float) -> float:
        return LEFT + 6 + (RIGHT - LEFT - 12) * (scale(value) - low) / (high - low)

    title = f"Relative error of the {sweep.quantity}, by the {label}"
    words = [f"{who}: {_in_words(sweep.at, errors)}" for who, errors in sweep.errors.items()]
    drawn = [
        e("title", title),
        e("desc", "; ".join(words)),
        e("rect", class_="wall", x=LEFT, y=TOP - 18, width=RIGHT - LEFT, height=18),
        *_grid(
            f"a, of logits {sweep.row.replace('-', MINUS)}", ((across(t), _tick(t)) for t in ticks)
        ),
    ]
    for who in reversed(sweep.errors):  # draw sxe last, above the others
        marks = (
            SERIES[who].mark(across(a), _height(error))
            for a, error in zip(sweep.at, sweep.errors[who], strict=True)
        )
        drawn.append(e("path", class_=SERIES[who].kind, d="".join(marks)))
    svg = e("svg", *drawn, role="img", viewBox=f"0 0 {WIDTH} {HEIGHT}")
    said = (
        e("li", words, class_=f"key {SERIES[who].kind}")
        for who, words in zip(sweep.errors, words, strict=True)
    )
    limit = ["limit for sxe: ", *_limits(sweep), ": "]
    return e(
        "figure",
        e("h3", f"{sweep.quantity[0].upper()}{sweep.quantity[1:]}, by the {label}"),
        svg,
        e("ul", *said, e("li", *limit, result(_word(sweep)))),
        _numbers(f"{title}, a", sweep),
    )


def _limits(sweep: Sweep) -> list[Element | str]:
    """The first limit, and each further limit with the magnitude at which it starts."""
    parts: list[Element | str] = [bound(sweep.limits[0])]
    for before, limit, a in zip(sweep.limits, sweep.limits[1:], sweep.at[1:], strict=False):
        if limit != before:
            parts += [", ", bound(limit), f" from {plain(a)}"]
    return parts


def _word(sweep: Sweep) -> str:
    return "pass" if sweep.passed else "FAIL"


def _grid(axis: str, ticks: Iterable[tuple[float, str]]) -> list[Element]:
    lines, texts = [], []
    for power in range(-8, 1, 2):
        y = f"{_height(10.0**power):.1f}"
        lines.append(f"M{LEFT} {y}H{RIGHT}")
        texts.append(e("text", _tick(10.0**power), x=LEFT - 6, y=y, class_="y"))
    for x, text in ticks:
        texts.append(e("text", text, x=f"{x:.1f}", y=BOTTOM + 16, class_="x"))
    texts.append(e("text", axis, x=(LEFT + RIGHT) / 2, y=BOTTOM + 36, class_="x"))
    texts.append(e("text", "no correct digit", x=RIGHT, y=TOP - 22, class_="end"))
    texts.append(e("text", "relative error", x=2, y=TOP - 22))
    wall = e("path", class_="edge", d=f"M{LEFT} {TOP}H{RIGHT}")
    return [e("path", class_="grid", d="".join(lines)), wall, *texts]


def _in_words(at: tuple[float, ...], errors: tuple[float, ...]) -> str:
    """The largest error, and the magnitude from which no digit is correct."""
    largest = max(errors)
    text = f"at most {plain(largest)}" if math.isfinite(largest) else "not finite at the end"
    kept = [n for n, error in enumerate(errors) if error < 1]
    first = kept[-1] + 1 if kept else 0
    return f"{text}; no correct digit from {plain(at[first])}" if first < len(at) else text


def _numbers(title: str, sweep: Sweep) -> Element:
    head = e("tr", *(e("th", name, scope="col") for name in ("a", *sweep.errors)))
    rows = [
        e(
            "tr",
            e("th", f"{a:.7g}", scope="row"),
            *(e("td", e("data", f"{error:.1e}", value=repr(error))) for error in errors),
        )
        for a, *errors in zip(sweep.at, *sweep.errors.values(), strict=True)
    ]
    return e(
        "details", e("summary", "Show the numbers"), table(title, [head], rows, class_="numbers")
    )
