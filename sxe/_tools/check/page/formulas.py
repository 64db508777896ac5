"""The formulas of `sxe.derivation` in MathML, by the text that each of them typesets.

A new or changed line or assumption has no MathML here until somebody adds it. The page then raises
LookupError, instead of showing a wrong formula.
"""

import copy
from typing import NamedTuple
from xml.etree.ElementTree import Element

from sxe._tools.check.page.elements import MINUS, e

Part = Element | str
APPLY = "\N{FUNCTION APPLICATION}"
SUM = "\N{N-ARY SUMMATION}"
PARTIAL = "\N{PARTIAL DIFFERENTIAL}"
BETA = "\N{GREEK SMALL LETTER BETA}"
PHI = "\N{GREEK SMALL LETTER PHI}"
PARALLEL = "\N{PARALLEL TO}"
NOT_EQUAL = "\N{NOT EQUAL TO}"


def _token(part: Part) -> Element:
    if isinstance(part, Element):
        return part
    if part.isdigit():
        return e("mn", part)
    return e("mi" if part.isalpha() or part == PARTIAL else "mo", part)


def row(*parts: Part, **attributes: object) -> Element:
    return e("mrow", *map(_token, parts), **attributes)


def sub(base: Part, indices: str) -> Element:
    return e("msub", _token(base), row(*indices))


def sup(base: Part, exponent: str) -> Element:
    return e("msup", _token(base), _token(exponent))


def frac(above: Part, below: Part) -> Element:
    return e("mfrac", _token(above), _token(below))


def total(index: str) -> Element:
    return e("munder", _token(SUM), _token(index))


def negative() -> Element:
    return e("mo", MINUS, form="prefix")


def group(*parts: Part, fences: str = "()", stretchy: bool = False) -> Element:
    """The parts in fences. The fences get a row of their own, to be spaced as fences."""
    left, right = (e("mo", fence, stretchy=str(stretchy).lower()) for fence in fences)
    return row(left, *parts, right)


def space() -> Element:
    return e("mspace", width="0.17em")


def applied(function: Part, *to: Part) -> Element:
    return row(function, APPLY, group(*to))


def softmax(k: str, i: str) -> Element:
    return applied(sub("s", k), sub("x", i))


def exp(indices: str) -> Element:
    return applied("exp", sub("x", indices))


def iverson(a: str, b: str) -> Element:
    return group(a, "=", b, fences="[]")


def log(of: Part) -> Element:
    return row(space(), "log", APPLY, space(), of)


def divergence(p: str, q: str) -> Element:
    return applied("KL", p, PARALLEL, q)


def slope(of: Part, by: str) -> Element:
    return frac(row(PARTIAL, of), row(PARTIAL, sub("x", by)))


def one_over(below: Part) -> Element:
    return row(space(), frac("1", below), space())


FORMULAS = {
    "L = -(1/N) sum_i sum_k y_ik log s_k(x_i)": row(
        *("L", "=", negative(), one_over("N"), total("i"), total("k")),
        *(sub("y", "ik"), log(softmax("k", "i"))),
    ),
    "ds_k(x_i)/dx_jl = 0": row(slope(softmax("k", "i"), "jl"), "=", "0"),
    "exp(x_ik)/S - (exp(x_ik)/S)^2 = s_k (1 - s_k)": row(
        *(
            frac(exp("ik"), "S"),
            MINUS,
            sup(group(frac(exp("ik"), "S"), stretchy=True), "2"),
        ),
        *("=", sub("s", "k"), group("1", MINUS, sub("s", "k"))),
    ),
    "-exp(x_ik) exp(x_il) / S^2 = -s_k s_l": row(
        *(negative(), frac(row(exp("ik"), space(), exp("il")), sup("S", "2"))),
        *("=", negative(), sub("s", "k"), sub("s", "l")),
    ),
    "[i=j] s_k(x_i) ([k=l] - s_l(x_i))": row(
        *(iverson("i", "j"), softmax("k", "i")),
        group(iverson("k", "l"), MINUS, softmax("l", "i")),
    ),
    "-(1/N) sum_i sum_k y_ik (1/s_k(x_i)) ds_k(x_i)/dx_jl": row(
        *(negative(), one_over("N"), total("i"), total("k"), sub("y", "ik")),
        *(one_over(softmax("k", "i")), slope(softmax("k", "i"), "jl")),
    ),
    "-(1/N) sum_k y_jk ([k=l] - s_l(x_j))": row(
        *(negative(), one_over("N"), total("k"), sub("y", "jk")),
        group(iverson("k", "l"), MINUS, softmax("l", "j")),
    ),
    "-(1/N) y_jl + (1/N) sum_k y_jk s_l(x_j)": row(
        *(negative(), one_over("N"), sub("y", "jl"), "+"),
        *(one_over("N"), total("k"), sub("y", "jk"), softmax("l", "j")),
    ),
    "(1/N) (s_l(x_j) - y_jl)": row(one_over("N"), group(softmax("l", "j"), MINUS, sub("y", "jl"))),
    "dL/dx = (1/N) (q - y)^T": row(
        *(frac(row(PARTIAL, "L"), row(PARTIAL, "x")), "="),
        *(one_over("N"), sup(group("q", MINUS, "y"), "T")),
    ),
    "H = -sum_k q_k log q_k = log S - sum_k q_k x_k": row(
        *("H", "=", negative(), total("k"), sub("q", "k"), log(sub("q", "k")), "="),
        *(log("S"), MINUS, total("k"), sub("q", "k"), sub("x", "k")),
    ),
    "-q_l (log q_l + H) = q_l (sum_k q_k x_k - x_l)": row(
        *(negative(), sub("q", "l"), group(log(sub("q", "l")), "+", "H"), "="),
        *(sub("q", "l"), group(total("k"), sub("q", "k"), sub("x", "k"), MINUS, sub("x", "l"))),
    ),
    "sum_k p_k (log p_k - log q_k) = sum_k p_k phi(u_k)": row(
        *(total("k"), sub("p", "k"), group(log(sub("p", "k")), MINUS, log(sub("q", "k"))), "="),
        *(total("k"), sub("p", "k"), applied(PHI, sub("u", "k"))),
    ),
    "q_l - p_l = p_l (exp(u_l) - 1)": row(
        *(sub("q", "l"), MINUS, sub("p", "l"), "="),
        *(sub("p", "l"), group(applied("exp", sub("u", "l")), MINUS, "1")),
    ),
    "sum_k q_k (log q_k - log p_k) = sum_k q_k phi(-u_k)": row(
        *(total("k"), sub("q", "k"), group(log(sub("q", "k")), MINUS, log(sub("p", "k"))), "="),
        *(total("k"), sub("q", "k"), applied(PHI, negative(), sub("u", "k"))),
    ),
    "q_l (u_l - KL(q || p))": row(sub("q", "l"), group(sub("u", "l"), MINUS, divergence("q", "p"))),
    "beta KL(p || M) + (1 - beta) KL(q || M)": row(
        *(BETA, space(), divergence("p", "M"), "+"),
        *(group("1", MINUS, BETA), space(), divergence("q", "M")),
    ),
    "(1 - beta) q_l (log q_l - log M_l - KL(q || M))": row(
        *(group("1", MINUS, BETA), sub("q", "l")),
        group(
            *(log(sub("q", "l")), MINUS, log(sub("M", "l")), MINUS, divergence("q", "M")),
        ),
    ),
    "q_k = s_k(x)": row(sub("q", "k"), "=", applied(sub("s", "k"), "x")),
    "p_k = s_k(z)": row(sub("p", "k"), "=", applied(sub("s", "k"), "z")),
    "u_k = log q_k - log p_k": row(
        sub("u", "k"), "=", log(sub("q", "k")), MINUS, log(sub("p", "k"))
    ),
    "phi(u) = exp(u) - 1 - u": row(
        applied(PHI, "u"), "=", applied("exp", "u"), MINUS, "1", MINUS, "u"
    ),
    "M = beta p + (1 - beta) q": row(
        "M", "=", BETA, space(), "p", "+", group("1", MINUS, BETA), space(), "q"
    ),
    "beta": row(BETA),
    "none": e("mtext", "none"),
    "0 < beta < 1": row("0", "<", BETA, "<", "1"),
    "j != i": row("j", NOT_EQUAL, "i"),
    "j = i, k = l": row("j", "=", "i", ",", "k", "=", "l"),
    "j = i, k != l": row("j", "=", "i", ",", "k", NOT_EQUAL, "l"),
    "s_k(x_i) > 0": row(softmax("k", "i"), ">", "0"),
    "sum_k y_jk = 1": row(total("k"), sub("y", "jk"), "=", "1"),
    "sum_k y_jk != 1": row(total("k"), sub("y", "jk"), NOT_EQUAL, "1"),
}


class Step(NamedTuple):
    """The explanation of a line.

    Attributes:
      title: a short title.
      left: the left side of the equation, if the formula has none.
      told: a sentence or more.
    """

    title: str
    left: Element | None
    told: str


_DL = slope("L", "jl")
STEPS = {
    "D0": Step(
        "The loss",
        None,
        "The mean over the rows of minus the logarithm of the probability that softmax gives the "
        "target.",
    ),
    "D1": Step(
        "Another row",
        None,
        "The softmax of row *i* depends only on the logits of row *i*.",
    ),
    "D2": Step(
        "The same logit",
        slope(softmax("k", "i"), "ik"),
        "The logit is in the numerator and in *S*, the denominator. The quotient rule gives one "
        "term for each.",
    ),
    "D3": Step(
        "Another class",
        slope(softmax("k", "i"), "il"),
        "Only *S* contains the other logit. When it grows, the probability of class *k* shrinks in "
        "proportion.",
    ),
    "D4": Step(
        "The Jacobian",
        slope(softmax("k", "i"), "jl"),
        "Two brackets, each 1 or 0, combine the three cases in one formula.",
    ),
    "D5": Step(
        "The chain rule",
        _DL,
        "The derivative of the logarithm, one over the softmax, is multiplied by the Jacobian.",
    ),
    "D6": Step(
        "Cancel",
        _DL,
        "The bracket *i* = *j* leaves one row of the double sum. The softmax in front of the "
        "Jacobian cancels the one in the denominator, so that no division is left.",
    ),
    "D7": Step(
        "Expand",
        _DL,
        "The bracket *k* = *l* picks one target from the sum. This line holds for any targets, and "
        "sxe computes this line.",
    ),
    "D8": Step(
        "Targets sum to one",
        _DL,
        "The softmax does not depend on *k*, and the targets sum to 1. This is the first line that "
        "needs targets that sum to one.",
    ),
    "D9": Step(
        "All entries at once",
        None,
        "With *q* for all values of softmax, the gradient is prediction minus target. It is "
        "transposed, because the derivative of a number by an "
        "*N* \N{MULTIPLICATION SIGN} *K* matrix is "
        "*K* \N{MULTIPLICATION SIGN} *N*. jax.grad gives its transpose.",
    ),
    "E0": Step(
        "The entropy",
        None,
        "The uncertainty of a row: 0 if one class has all of the probability, log *K* if all "
        "classes have the same.",
    ),
    "E1": Step(
        "Its gradient",
        slope("H", "l"),
        "When a logit above the mean of the logits under *q* grows, the entropy falls. When a "
        "logit below this mean grows, the entropy rises.",
    ),
    "K0": Step(
        "Forward divergence",
        row(divergence("p", "q")),
        "The mean under *p* of log *p* \N{MINUS SIGN} log *q*. The two forms are equal, because "
        "*p* (exp *u* \N{MINUS SIGN} 1) = *q* \N{MINUS SIGN} *p* sums to 0 over the classes. The "
        "second form has no negative term; sxe computes this form.",
    ),
    "K1": Step(
        "Its gradient",
        slope(divergence("p", "q"), "l"),
        "Prediction minus target, as in D8, because the divergence is the cross-entropy minus the "
        "entropy of *p*, which is a constant.",
    ),
    "K2": Step(
        "Reverse divergence",
        row(divergence("q", "p")),
        "The forward divergence with *p* and *q* exchanged.",
    ),
    "K3": Step(
        "Its gradient",
        slope(divergence("q", "p"), "l"),
        "*q* times the logarithm of the ratio minus its mean under *q*. It sums to zero over the "
        "classes.",
    ),
    "K4": Step(
        "Jensen-Shannon divergence",
        row("JS"),
        "The divergences of both distributions from their mixture *M*. *M* is positive wherever "
        "one of them is, so the result is always finite.",
    ),
    "K5": Step(
        "Its gradient",
        slope("JS", "l"),
        "The gradient of the reverse divergence from *M*, times 1 \N{MINUS SIGN} "
        "\N{GREEK SMALL LETTER BETA}. *M* depends on *q* too, but these derivatives sum to zero.",
    ),
}


def math(
    text: str, left: Element | None = None, display: str = "inline", relation: str = "="
) -> Element:
    """The MathML of a formula or assumption, with the left side of an equation if given."""
    if text not in FORMULAS:
        raise LookupError(
            f"no MathML for {text!r}: add it to FORMULAS in sxe/_tools/check/page/formulas.py"
        )
    body = [copy.deepcopy(FORMULAS[text])]
    if left is not None:
        body.insert(0, row(copy.deepcopy(left), relation, class_="left"))
    return e("math", *body, display=display, alttext=text)


def step(name: str) -> Step:
    if name not in STEPS:
        raise LookupError(
            f"no explanation of {name}: add it to STEPS in sxe/_tools/check/page/formulas.py"
        )
    return STEPS[name]
