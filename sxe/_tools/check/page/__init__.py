"""``python -m sxe check --html``: the report as one self-contained page."""

from importlib import resources
from string import Template

import jax
import optax

from sxe._tools.check.page import pictures, sections
from sxe._tools.check.page.elements import markup
from sxe._tools.check.precision import CLASSES
from sxe._tools.check.results import Report


def page(report: Report) -> str:
    """The report as HTML, without scripts and without requests for other files.

    Raises:
      LookupError: `formulas` has no MathML for a formula or an assumption of the report.
    """
    template = Template(resources.files(__name__).joinpath("page.html").read_text("utf-8"))
    return template.substitute(
        verdict=markup(sections.verdict(report)),
        title="FAIL: sxe check" if report.failures else "sxe check",
        hero=markup(sections.hero(report)),
        problem=markup(sections.problem(report)),
        derivation=markup(sections.derivation(report.lines, report.dtype)),
        row_sums=markup(sections.row_sums(report)),
        jacobian=markup(pictures.jacobian(report.example)),
        gradient=markup(pictures.gradient(report.example)),
        row_notation=markup(sections.row_notation(report)),
        row_lines=markup(sections.derivation(report.row_lines, report.dtype)),
        classes=CLASSES,
        distances=markup(pictures.sweep(report.distances)),
        sweeps="".join(markup(pictures.sweep(sweep)) for sweep in report.sweeps),
        precision=markup(sections.precision(report)),
        rules=markup(sections.rules(report)),
        versions=f"JAX {jax.__version__}, optax {optax.__version__}, {jax.default_backend()}",
    )
