"""The elements of the page. ElementTree, and nothing else, escapes their text."""

import math
import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

MINUS = "\N{MINUS SIGN}"
MARKS = {"pass": "\N{CHECK MARK}", "FAIL": "\N{BALLOT X}", "n/a": "\N{EN DASH}"}


def e(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element. class_ sets class, aria_label sets aria-label, and None is ignored."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    element = Element(tag, {names[k]: str(v) for k, v in attributes.items() if v is not None})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child:
            element.text = (element.text or "") + child
    return element


def markup(element: Element) -> str:
    return ElementTree.tostring(element, encoding="unicode", method="html")


def scroll(label: str, *children: Element, class_: str = "") -> Element:
    """A box that scrolls horizontally, with the keyboard too."""
    attributes = {"role": "region", "aria_label": label, "tabindex": 0}
    return e("div", *children, class_=f"scroll {class_}".strip(), **attributes)


def table(
    caption: str, head: list[Element], *bodies: list[Element], label: str = "", class_: str = ""
) -> Element:
    """A table in a box that scrolls. The caption stays visible."""
    return scroll(
        label or caption,
        e(
            "table",
            e("caption", e("span", caption)),
            e("thead", *head),
            *(e("tbody", *rows) for rows in bodies),
            class_=class_,
        ),
    )


def number(value: float, digits: int = 2) -> Element:
    """A measured number. The text has few digits, the value of the element has all of them."""
    return e("data", *_typeset(value, digits), value=repr(value))


def bound(value: float) -> Element:
    return e("span", "\N{LESS-THAN OR EQUAL TO}\N{NO-BREAK SPACE}", *_typeset(value, 1))


def expectation(text: str) -> Element:
    """The expectation of the report, such as "<= 1e-13, must hold", with the number typeset."""
    before, limit, after = re.split(r"(\d+e[-+]\d+)", text)
    before = before.replace("<=", "\N{LESS-THAN OR EQUAL TO}")
    return e("span", before, *_typeset(float(limit), 1), after)


def prose(text: str) -> list[Element | str]:
    """Text in which *i* is a variable."""
    return [e("i", part) if n % 2 else part for n, part in enumerate(text.split("*"))]


def plain(value: float, digits: int = 2) -> str:
    """A number as plain text, for places that cannot have elements."""
    mantissa, power = _scientific(value, digits)
    return mantissa if power is None else f"{mantissa}10{superscript(power)}"


def superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _scientific(value: float, digits: int) -> tuple[str, int | None]:
    """The text before the power of ten, and the power or None."""
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa, power = mantissa.replace("-", MINUS), int(exponent)
    if value == 0 or -2 < power < 3:
        return f"{value:.{max(digits, power + 1)}g}".replace("-", MINUS), None
    if digits == 1 and mantissa.endswith("1"):
        return mantissa.removesuffix("1"), power  # 10^-13 rather than 1 x 10^-13
    return f"{mantissa}\N{MULTIPLICATION SIGN}", power


def _typeset(value: float, digits: int) -> list[Element | str]:
    if not math.isfinite(value):
        return ["not finite"]
    mantissa, power = _scientific(value, digits)
    if power is None:
        return [mantissa]
    raised = e("sup", str(power).replace("-", MINUS))
    # A screen reader does not say that an exponent is a superscript.
    spoken = e("span", f"{value:.{digits - 1}e}", class_="spoken")
    return [e("span", f"{mantissa}10", raised, aria_hidden="true"), spoken]


def result(word: str, text: str | None = None) -> Element:
    """pass, FAIL or n/a, shown by word, mark and color."""
    kind = {"pass": "pass", "FAIL": "fail", "n/a": "none"}[word]
    mark = e("span", MARKS[word], aria_hidden="true")
    return e("span", mark, f" {text or word}", class_=f"result {kind}")
