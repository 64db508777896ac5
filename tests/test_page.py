"""python -m sxe check --html: the HTML of the page, and the page in a browser."""

import itertools
import math
import re
from html.parser import HTMLParser

import jax
import pytest

from sxe import derivation
from sxe.__main__ import main
from sxe._tools.check import against_autodiff, precision
from sxe._tools.check import page as _page
from sxe._tools.check.check import check
from sxe._tools.check.page import formulas

LINES = (*derivation.LINES, *derivation.ROW_LINES)
NAMES = [line.name for line in LINES]
VOID = {"meta", "link", "br", "hr", "img", "input"}


def broken(monkeypatch):
    """D6 with a wrong sign."""
    wrong = derivation.LINES[6]._replace(closed_form=lambda x, y: -derivation.d6(x, y))
    lines = (*derivation.LINES[:6], wrong, *derivation.LINES[7:])
    monkeypatch.setattr(derivation, "LINES", lines)


@pytest.fixture(scope="module", autouse=True)
def _rules_are_not_compiled():
    """Compiling them is most of a check's time. The page needs only their names and errors."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        errors = 1.2e-15, 3.4e-14
        monkeypatch.setattr(against_autodiff, "_rule_errors", lambda *args, **kwargs: errors)
        yield


@pytest.fixture(scope="module")
def report(_rules_are_not_compiled):
    # These are the settings of every test. A check in a test then reuses the compiled programs.
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return check(4, 4, seed=2)


@pytest.fixture(scope="module")
def page(report):
    return _page.page(report)


class Elements(HTMLParser):
    """Every tag with its attributes, its text and the tags around it. Tags must match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        around = [element["tag"] for element in self.open]
        element = {"tag": tag, "text": "", "around": around, "id": None, "class": "", **dict(attrs)}
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.found if element["tag"] == tag]


@pytest.fixture(scope="module")
def elements(page):
    return Elements(page)


def test_the_page_is_one_well_formed_document(page, elements):
    assert page.startswith("<!doctype html>\n")
    assert "$" not in page
    assert {"html", "head", "body", "main", "header", "footer", "nav"} <= {
        element["tag"] for element in elements.found
    }
    ids = [element["id"] for element in elements.found if element["id"]]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in elements.all("a")} <= set(ids)


def test_nothing_is_requested_and_nothing_runs(page, elements):
    assert elements.all("script") == []
    for element in elements.found:
        assert not any(name.startswith("on") for name in element)
        for attribute in ("src", "href", "xlink:href", "srcset", "data"):
            assert element.get(attribute, "#").startswith(("#", "data:,"))
    assert not re.search(r"https?:|@import|url\(", page)


def values(elements):
    return [float(data["value"]) for data in elements.all("data")]


def test_the_numbers_are_those_of_the_report(report, elements):
    def flat(nested):
        if isinstance(nested, float):
            return [nested]
        return [number for part in nested for number in flat(part)]

    transposed = list(zip(*report.example.gradient, strict=True))
    example = report.example
    expected = [
        *flat([(line.autodiff_error, line.differences_error) for line in report.lines]),
        *(comparison.error for comparison in report.row_sums),
        *flat([entry for i in example.jacobian for k in i for entry in k]),
        example.jacobian_error,
        *flat([example.q, example.y, example.difference, transposed]),
        example.gradient_error,
        *flat([(line.autodiff_error, line.differences_error) for line in report.row_lines]),
        *flat(list(zip(*report.distances.errors.values(), strict=True))),
        *flat([list(zip(*sweep.errors.values(), strict=True)) for sweep in report.sweeps]),
        *flat([row[1:6] for row in report.precision]),
        *(comparison.error for comparison in report.rules),
    ]
    assert values(elements) == expected


def test_a_number_is_shown_to_the_digits_of_the_text_report(elements):
    shown = [data for data in elements.all("data") if "ol" in data["around"]]
    assert len(shown) == 2 * len(NAMES)
    for data in shown:
        value, text = float(data["value"]), data["text"]
        assert text == "0" if value == 0 else text.endswith(f"{value:.1e}")


WORDS = {
    "\N{MINUS SIGN}": "-",
    "\N{NOT EQUAL TO}": "!=",
    "\N{N-ARY SUMMATION}": "sum",
    "\N{PARTIAL DIFFERENTIAL}": "d",
    "\N{FUNCTION APPLICATION}": "",
    "\N{GREEK SMALL LETTER BETA}": "beta",
    "\N{GREEK SMALL LETTER PHI}": "phi",
    "\N{PARALLEL TO}": "||",
}


def linear(element):
    """MathML as one line of text without spaces, like the docstrings of sxe.derivation."""
    parts = [linear(child) for child in element]
    match element.tag:
        case "math" | "mrow":
            return "" if element.get("class") == "left" else "".join(parts)
        case "mi" | "mn" | "mo" | "mtext":
            return WORDS.get(element.text, element.text)
        case "mspace":
            return ""
        case "msub" | "munder":
            return "_".join(parts)
        case "msup":
            return "^".join(parts)
        case "mfrac":
            return f"(1/{parts[1]})" if parts[0] == "1" else "/".join(parts)
    raise AssertionError(element.tag)


def test_the_mathml_says_what_the_docstrings_say():
    for line in LINES:
        for text in (line.formula, line.assumption):
            assert linear(formulas.math(text)) == text.replace(" ", "")
    for text, mathml in formulas.FORMULAS.items():
        assert linear(mathml) == text.replace(" ", "")


def test_a_line_without_mathml_is_an_error(report):
    def changed(measured, **fields):
        return measured._replace(line=measured.line._replace(**fields))

    new = changed(report.lines[3], formula="-s_l s_k")
    with pytest.raises(LookupError, match="no MathML for '-s_l s_k': add it to FORMULAS in"):
        _page.page(report._replace(lines=(*report.lines[:3], new)))
    eleventh = changed(report.lines[9], name="D10")
    with pytest.raises(LookupError, match="no explanation of D10: add it to STEPS in"):
        _page.page(report._replace(lines=(*report.lines, eleventh)))


def test_what_is_not_a_number_is_shown_as_such(report):
    row = report.precision[0]._replace(sxe=math.nan, sxe_error=math.nan, passed=False)
    page = _page.page(report._replace(precision=(row, *report.precision[1:])))
    assert "not finite" in page
    assert "FAIL: 1e8, 1e8: loss" in page


def test_text_is_escaped(report):
    first = report.lines[0]
    line = first.line._replace(compared_with="<b>a & b</b>")
    page = _page.page(report._replace(lines=(first._replace(line=line), *report.lines[1:])))
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page
    assert "<b>" not in page


def test_a_sweep_that_fails_fails_the_page(report):
    wrong = report.sweeps[0]._replace(passed=False)
    failing = report._replace(sweeps=(wrong, *report.sweeps[1:]))
    assert failing.failures == ("lead 0 to 80: loss",)
    assert "FAIL: lead 0 to 80: loss" in _page.page(failing)


def test_the_sweeps_and_the_example(report):
    lead, lead_gradient, offset, offset_gradient = report.sweeps
    assert all(sweep.passed for sweep in report.sweeps)
    for sweep in (lead, lead_gradient):
        assert max(sweep.errors["sxe"]) < 1e-6
        assert min(sweep.errors["optax"][40:]) == 1  # the wall
        assert min(sweep.errors["autodiff of D0"][40:]) >= 1
    assert max(offset.errors["optax"]) == 1
    assert max(offset_gradient.errors["optax"]) < 1e-6
    assert math.inf in offset.errors["autodiff of D0"]
    (s, *_), *_ = report.example.q
    assert report.example.jacobian[0][0][0][0] == pytest.approx(s * (1 - s), rel=1e-14)
    assert report.example.jacobian[0][0][1] == (0, 0, 0, 0)


def test_the_divergence_by_distance(report):
    distances = report.distances
    assert distances.passed
    assert (distances.at[0], distances.at[-1]) == (10, pytest.approx(1e-4))
    errors = distances.errors
    assert max(errors["sxe"][:33]) < 1e-5
    assert max(errors["sxe"]) < 1e-4
    assert max(errors["textbook form"][-4:]) > 1  # not a digit is right
    wrong = report._replace(distances=distances._replace(passed=False))
    assert wrong.failures == ("distance 10 to 0.0001: KL divergence",)
    assert "FAIL: distance 10 to 0.0001: KL divergence" in _page.page(wrong)


def test_a_broken_line_of_rows_fails_the_page(report):
    k3 = next(line for line in report.row_lines if line.name == "K3")
    wrong = tuple(line._replace(passed=line is not k3) for line in report.row_lines)
    failing = report._replace(row_lines=wrong)
    assert failing.failures == ("K3",)
    (line,) = (each for each in Elements(_page.page(failing)).all("li") if each["id"] == "K3")
    assert line["class"] == "line failed"


def test_a_loss_that_rounds_away_fails_its_sweeps(monkeypatch):
    monkeypatch.setattr(precision, "softmax_cross_entropy", precision._optax)
    failed = [sweep.name for sweep in precision.check_sweeps() if not sweep.passed]
    assert failed == [
        "lead 0 to 80: loss",
        "lead 0 to 80: label gradient",
        "offset 1 to 1e+08: loss",
    ]


# The same page in a browser.


@pytest.fixture
def show(browser, page, tmp_path):
    """Open a page from a file. The test fails if the page logs or requests anything."""
    contexts, seen = [], []

    def open_page(text=page, width=1280, scheme="light"):
        file = tmp_path / "check.html"
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: seen.append(("console", message.text)))
        tab.on("pageerror", lambda error: seen.append(("error", str(error))))
        tab.on(
            "request",
            lambda request: request.url != file.as_uri() and seen.append(("request", request.url)),
        )
        tab.goto(file.as_uri(), wait_until="networkidle")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert [one for one in seen if one != ("request", "data:,")] == []


def test_every_line_is_there_with_its_formula(show):
    tab = show()
    for name in NAMES:
        line = tab.locator(f"#{name}")
        assert line.locator(".result").inner_text() == "✓ pass"
        box = line.locator(".told math").bounding_box()
        assert box["width"] > 40
        assert box["height"] > 15
    # Without MathML a formula is a row of characters. With it a fraction is higher than its parts.
    heights = "m => [m, ...m.children].map(part => part.getBoundingClientRect().height)"
    whole, above, below = tab.locator("#D1 mfrac").first.evaluate(heights)
    assert whole >= above + below > above > 5


def test_the_variant_that_must_fail_is_shown_failing(show):
    d7, d8 = show().locator(".variant").all()
    assert "✗" not in d7.inner_text()
    assert "It holds" in d7.inner_text()
    assert "≠" in d8.locator("math .left").text_content()
    assert "✗ It fails" in d8.inner_text()
    assert "must fail" in d8.inner_text()
    assert d8.locator(".result").inner_text() == "✓ as expected"


def test_a_broken_line_is_shown_as_failed(show, monkeypatch, capsys, tmp_path):
    broken(monkeypatch)
    file = tmp_path / "written.html"
    assert main(["check", "--rows", "4", "--classes", "4", "--html", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "verdict: FAIL: D6",
        f"page: {file.as_uri()}",
    ]
    tab = show(file.read_text("utf-8"))
    assert tab.title() == "FAIL: sxe check"
    assert tab.locator(".verdict").inner_text() == "✗ FAIL: D6"
    results = [tab.locator(f"#{name} .result").inner_text() for name in NAMES]
    assert results == ["✗ FAIL" if name == "D6" else "✓ pass" for name in NAMES]
    colour = "element => getComputedStyle(element).color"
    assert len({tab.locator(f"#{n} .result").evaluate(colour) for n in ("D5", "D6")}) == 2


def test_a_line_with_nothing_to_compare(show, report):
    lines = [line._replace(shown=line.name not in ("D1", "D3")) for line in report.lines]
    tab = show(_page.page(report._replace(lines=tuple(lines))))
    for name in NAMES:
        assert (
            tab.locator(f"#{name} .result")
            .inner_text()
            .endswith("n/a" if name in ("D1", "D3") else "pass")
        )
        assert tab.locator(f"#{name} data").count() == (0 if name in ("D1", "D3") else 2)


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_never_scrolls_sideways(show, width):
    tab = show(width=width)
    tab.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_wide_boxes_scroll_by_keyboard(show):
    tab = show(width=360)
    tab.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    boxes = tab.locator(".scroll").evaluate_all("all => all.map(box => box.ariaLabel)")
    assert len(boxes) == len(set(boxes))
    assert all(boxes)
    focused = []
    while True:
        tab.keyboard.press("Tab")
        if not tab.evaluate("document.activeElement !== document.body"):
            break
        if tab.evaluate("document.activeElement.matches('.scroll')"):
            assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            focused.append(tab.evaluate("document.activeElement.ariaLabel"))
        assert len(focused) <= len(boxes)
    assert focused == boxes
    wide = tab.get_by_role("region", name="The Jacobian of softmax", exact=True)
    wide.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.activeElement.scrollLeft > 0", timeout=5000)
    inside = "all => all.every(e => e.closest('.scroll') || e.scrollWidth <= e.clientWidth + 1)"
    assert tab.locator("main p, main div, main li, main figure").evaluate_all(inside)


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = colour => {
    const [r, g, b] = rgba(colour).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  // Behind a bar of a gradient, text is on the bar's colour or on the page's.
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      const bar = style.backgroundImage.match(/rgba?\\([^)]*\\)|color\\([^)]*\\)/);
      if (bar) return [bar[0], ...behind(at.parentElement)];
      if (rgba(style.backgroundColor)[3] === 255) return [style.backgroundColor];
    }
    return [];
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest('.spoken, title, desc')) continue;
    const style = getComputedStyle(element);
    const colour = element.closest('svg') ? style.fill : style.color;
    for (const background of behind(element)) {
      count += 1;
      const ratio = contrast(colour, background);
      if (ratio < 4.5) low.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
    }
  }
  return [count, low, getComputedStyle(document.body).backgroundColor];
}"""


def test_text_contrast_in_both_schemes(show, monkeypatch, report):
    lines = [line._replace(passed=line.name != "D6") for line in report.lines]
    failing = _page.page(report._replace(lines=tuple(lines)))
    backgrounds = []
    for scheme in ("light", "dark"):
        count, low, background = show(failing, scheme=scheme).evaluate(CONTRAST)
        assert low == []
        assert count > 1000
        backgrounds.append(background)
    assert backgrounds[0] != backgrounds[1]


def test_the_page_can_be_heard(show):
    tab = show()
    assert tab.locator("html").get_attribute("lang") == "en"
    assert tab.title() == "sxe check"
    for landmark in ("banner", "main", "contentinfo", "navigation"):
        assert tab.get_by_role(landmark).count() == 1
    levels = tab.locator("h1, h2, h3, h4, h5, h6").evaluate_all("all => all.map(h => h.tagName)")
    levels = [int(level[1]) for level in levels]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    named = "all => all.map(t => t.caption?.textContent.trim() ?? '')"
    assert all(tab.locator("table").evaluate_all(named))
    assert all(
        cell in ("col", "row", "colgroup", "rowgroup")
        for cell in tab.locator("th").evaluate_all("all => all.map(cell => cell.scope)")
    )
    figures = tab.locator("svg").evaluate_all(
        "all => all.map(s => [s.getAttribute('role'), s.querySelector('title')?.textContent,"
        " s.querySelector('desc')?.textContent])"
    )
    assert len(figures) == 5
    assert all(role == "img" and title and text for role, title, text in figures)
    assert len({title for _, title, _ in figures}) == 5
    for _, title, _ in figures:
        assert tab.get_by_role("img", name=title, exact=True).count() == 1
    assert tab.locator("section[aria-labelledby]").count() == tab.locator("section").count()


def test_the_cases_differ_by_more_than_colour(show):
    tab = show()
    cells = tab.locator(".jacobian td[class]").evaluate_all(
        "all => all.map(c => [c.classList[0], c.innerText, getComputedStyle(c).backgroundColor])"
    )
    assert len(cells) == 144
    text = {
        kind: [text for k, text, _ in cells if k == kind] for kind in ("same", "other", "apart")
    }
    assert {kind: len(texts) for kind, texts in text.items()} == {
        "same": 12,
        "other": 36,
        "apart": 96,
    }
    assert all(t.startswith(".") for t in text["same"])
    assert all(t.startswith("−.") for t in text["other"])  # noqa: RUF001
    assert set(text["apart"]) == {"0"}
    colours = {kind: {colour for k, _, colour in cells if k == kind} for kind in text}
    assert not colours["same"] & colours["other"]
    assert not (colours["same"] | colours["other"]) & colours["apart"]
