"""The parts of the page that are text: the lines of the derivation, and the tables."""

import math
from xml.etree.ElementTree import Element

from sxe._tools.check.page.elements import (
    MARKS,
    MINUS,
    bound,
    e,
    expectation,
    number,
    plain,
    prose,
    result,
    scroll,
    table,
)
from sxe._tools.check.page.formulas import math as formula
from sxe._tools.check.page.formulas import step
from sxe._tools.check.results import (
    PRECISION,
    TOLERANCES,
    Comparison,
    MeasuredLine,
    Precision,
    Report,
)


def _word(measured: MeasuredLine | Comparison | Precision) -> str:
    return "pass" if measured.passed else "FAIL"


def verdict(report: Report) -> Element:
    failed = report.failures
    text = f"FAIL: {'; '.join(failed)}" if failed else "pass: every line holds"
    return e("p", result("FAIL" if failed else "pass", text), class_="verdict")


def hero(report: Report) -> Element:
    """The first and the last formula of the derivation."""
    first, last = (formula(report.lines[n].line.formula, display="block") for n in (0, -1))
    arrow = e("span", "\N{RIGHTWARDS DOUBLE ARROW}", class_="arrow", aria_hidden="true")
    return scroll("From the loss to its gradient", first, arrow, last, class_="hero")


def problem(report: Report) -> Element:
    return e(
        "p",
        *prose(
            f"Measured for *N* = {report.rows} rows and *K* = {report.classes} classes, drawn from "
            f"seed {str(report.seed).replace('-', MINUS)}. The lines are in {report.dtype}."
        ),
    )


def _position(value: float) -> str:
    """The position of a number on the logarithmic scale from 1e-18 to 1, in percent."""
    exponent = math.log10(min(max(value, 1e-18), 1))
    return f"{100 * (1 + exponent / 18):.1f}%"


def _measured(error: float, limit: float) -> list[Element]:
    """The number, a logarithmic scale that shows it with its limit, and the limit."""
    style = f"--error:{_position(error)};--limit:{_position(limit)}"
    kind = "track within" if error <= limit else "track beyond"
    track = e("span", e("i"), class_=kind, style=style, aria_hidden="true")
    return [number(error), track, e("span", bound(limit), class_="limit")]


def derivation(lines: tuple[MeasuredLine, ...], dtype: str) -> Element:
    return e("ol", *(_line(line, dtype) for line in lines), class_="lines")


def row_notation(report: Report) -> Element:
    """The notation of the lines for entropy and divergences."""
    return e(
        "p",
        *prose("*z* are the target logits of the same row, from a second model. With "),
        *(formula("q_k = s_k(x)"), " and ", formula("p_k = s_k(z)"), ", the log-ratio is "),
        *(formula("u_k = log q_k - log p_k"), " and the mixture is "),
        *(formula("M = beta p + (1 - beta) q"), ", measured for ", formula("beta"), " = "),
        *(f"{report.beta}. The function ", formula("phi(u) = exp(u) - 1 - u")),
        *prose(" is never negative. It replaces differences that cancel."),
    )


def _line(measured: MeasuredLine, dtype: str) -> Element:
    line = measured.line
    told, word = step(line.name), _word(measured) if measured.shown else "n/a"
    limits = TOLERANCES[dtype]
    facts = [
        (
            "compared with",
            [e("span", line.compared_with.replace("^T", "\N{MODIFIER LETTER CAPITAL T}"))],
        ),
        ("assumes", [formula(line.assumption)]),
    ]
    if measured.shown:
        facts += [
            ("autodiff", _measured(measured.autodiff_error, limits.autodiff)),
            ("differences", _measured(measured.differences_error, limits.differences)),
        ]
    else:
        facts.append(("errors", [e("span", "none: a single row or class has no such entries")]))
    heading = e("h3", e("span", line.name, class_="name"), " ", e("span", told.title))
    return e(
        "li",
        e("div", heading, result(word), class_="head"),
        e(
            "div",
            scroll(f"Formula {line.name}", formula(line.formula, told.left, "block")),
            e("p", *prose(told.told)),
            class_="told",
        ),
        e("dl", *(e("div", e("dt", term), e("dd", *what)) for term, what in facts)),
        id=line.name,
        class_={"pass": "line", "FAIL": "line failed", "n/a": "line"}[word],
    )


def row_sums(report: Report) -> Element:
    """D7 and D8 for targets that do not sum to one. D8 must fail."""
    formulas = {measured.name: measured.line.formula for measured in report.lines}
    limit = TOLERANCES["float64"].autodiff
    return e("div", *(_variant(c, formulas, limit) for c in report.row_sums), class_="variants")


def _variant(comparison: Comparison, formulas: dict[str, str], limit: float) -> Element:
    name, _, where = comparison.name.partition(" where ")
    holds = comparison.error <= limit
    relation, mark = ("=", "") if holds else ("\N{NOT EQUAL TO}", f"{MARKS['FAIL']} ")
    return e(
        "div",
        e("h3", e("span", name, class_="name"), " where ", formula(where)),
        scroll(
            f"Formula {name} for these targets",
            formula(formulas[name], step(name).left, "block", relation),
        ),
        e(
            "p",
            e("strong", e("span", mark, aria_hidden="true"), "It holds" if holds else "It fails"),
            ": the error is ",
            number(comparison.error),
            ". Expected: ",
            expectation(comparison.expected),
            ".",
        ),
        e("p", result(_word(comparison), "as expected" if comparison.passed else None)),
        class_=f"variant {'holds' if holds else 'refuted'}"
        + ("" if comparison.passed else " wrong"),
    )


def _head(*names: str) -> Element:
    return e("tr", *(e("th", name, scope="col") for name in names))


def precision(report: Report) -> Element:
    limits = (f"{plain(limit, 1)} for the {quantity}" for quantity, limit in PRECISION.items())
    rows = []
    for row in report.precision:
        logits, _, quantity = row.name.partition(": ")
        heads = [e("th", quantity, scope="row")]
        if quantity == next(iter(PRECISION)):
            heads.insert(0, e("th", logits, scope="rowgroup", rowspan=len(PRECISION)))
        cells = [e("td", number(n, 8)) for n in (row.truth, row.sxe, row.optax)]
        errors = [_digits(error) for error in (row.sxe_error, row.optax_error)]
        rows.append(e("tr", *heads, *cells, *errors, e("td", result(_word(row)))))
    return table(
        "The label is class 0; two rows have dense targets. The bar behind an error shows the "
        "number of correct digits. An error is relative to the loss, or to the sum of the two "
        f"terms of the gradient, s (T {MINUS} t) and t (1 {MINUS} s). An error of sxe passes up to "
        f"{' and '.join(limits)}. optax is not judged.",
        [
            _head(
                "logits", "quantity", "truth", "sxe", "optax", "sxe error", "optax error", "result"
            )
        ],
        rows,
        label="Rows that are lost to rounding in float32",
        class_="numbers",
    )


def _digits(error: float) -> Element:
    """An error, in front of a bar whose length is the number of correct digits, at most 8."""
    digits = min(max(-math.log10(max(error, 1e-8)), 0), 8) if math.isfinite(error) else 0
    return e("td", number(error), class_="digits", style=f"--digits:{digits / 8:.3f}")


def rules(report: Report) -> Element:
    """One row per kind of loss and dtype, with the error of each rule."""
    measured: dict[tuple[str, str], dict[str, Comparison]] = {}
    for comparison in report.rules:
        rule, targets, dtype = comparison.name.split(", ")
        measured.setdefault((targets, dtype), {})[rule] = comparison
    names = list(next(iter(measured.values())))
    rows = []
    for (targets, dtype), by_rule in measured.items():
        cells = [
            e("td", number(c.error), " ", result(_word(c)), class_="judgement")
            for c in (by_rule[name] for name in names)
        ]
        limit = e("td", expectation(by_rule[names[0]].expected))
        rows.append(e("tr", e("th", targets, scope="row"), e("td", dtype), *cells, limit))
    return table(
        "Errors of each rule compared with autodiff of the same function, for random cotangents",
        [_head("loss or function", "dtype", *names, "expected")],
        rows,
        class_="numbers",
    )
