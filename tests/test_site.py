"""The documentation site: what its pages have in them, where their links go, how they look."""

import functools
import http.server
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import sxe

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "sxe/docs/site/mkdocs.yml"
PAGES = sorted(path.stem for path in (ROOT / "sxe/docs").glob("*.md"))
VIEWS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]
ADDRESS = "http://site/"  # to resolve links of files with


class Html(HTMLParser):
    """The links, anchors, images and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors, self.text, self.code = [], set(), "", 0
        self.prose = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id"))
        self.code += tag == "pre"
        self.targets += [attributes[name] for name in ("href", "src") if attributes.get(name)]

    def handle_endtag(self, tag):
        self.code -= tag == "pre"

    def handle_data(self, data):
        self.text += data
        self.prose += "" if self.code else data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built with warnings as errors."""
    for module in ("material", "mkdocs", "mkdocstrings_handlers.python"):
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None and os.environ.get("SXE_SITE") == "required":
            pytest.fail(f"SXE_SITE=required, but {module} is not installed")
        if found is None:
            pytest.skip(f"{module} is not installed: pip install --group docs")
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--site-dir", folder, "--config-file", CONFIGURATION]
    built = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Each page, by its path in the site."""
    paths = (path for path in site.rglob("*.html") if path.name != "404.html")
    return {path.relative_to(site).as_posix(): Html(path.read_text("utf-8")) for path in paths}


def test_every_document_is_a_page(pages):
    assert {"reference", "head", "mesh", "changelog", "contributing"} <= set(PAGES)
    assert {f"{name}/index.html" for name in PAGES} <= set(pages)
    assert {"index.html", "check.html"} <= set(pages)


def test_the_home_page_is_the_readme(pages):
    home = pages["index.html"]
    assert {"install", "use"} <= home.anchors
    assert "collapse.png" in home.targets
    assert "api/losses/#sxe.linear_softmax_cross_entropy" in home.targets


def test_every_page_is_in_the_navigation(pages):
    home = {urljoin(ADDRESS, target) for target in pages["index.html"].targets}
    for name in pages:
        assert urljoin(ADDRESS, name).removesuffix("index.html") in home, name


def test_lists_and_code_are_not_left_as_text(pages):
    """GitHub and MkDocs differ in what they take for a list."""
    for name, page in pages.items():
        left = re.findall(r"^ *(?:[-*] |```|>>> ).*", page.prose, re.MULTILINE)
        assert left == [], name


def words(text):
    return "".join(character for character in text if character.isalnum())


def test_every_public_name_has_its_docstring_in_the_reference(pages):
    for name in sxe.__all__:
        (page,) = (page for page in pages.values() if f"sxe.{name}" in page.anchors)
        summary, *_ = inspect.getdoc(getattr(sxe, name)).split("\n\n")
        assert words(summary) in words(page.text), name


def test_every_line_of_the_derivation_has_its_formula(pages):
    page = pages["api/derivation/index.html"]
    for line in (*sxe.derivation.LINES, *sxe.derivation.ROW_LINES):
        assert f"sxe.derivation.{line.name.lower()}" in page.anchors
        assert line.formula in page.text


def test_links_lead_somewhere(site, pages):
    broken, outside = [], set()
    for name, page in pages.items():
        for target in page.targets:
            parts = urlsplit(urljoin(ADDRESS + name, target))
            if f"{parts.scheme}://{parts.netloc}/" != ADDRESS:
                outside.add(target)
                continue
            path = unquote(parts.path[1:])
            path += "index.html" if path == "" or path.endswith("/") else ""
            anchors = {"", *pages[path].anchors} if path in pages else {parts.fragment}
            if not (site / path).is_file() or parts.fragment not in anchors:
                broken.append((name, target))
    assert broken == []
    # Files that are not in the site are linked in the repository.
    in_repository = [target for target in outside if "/blob/main/" in target]
    assert any(target.endswith("examples/recipes/grpo.py") for target in in_repository)
    for target in in_repository:
        assert (ROOT / urlsplit(target).path.partition("/blob/main/")[2]).is_file(), target


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


# What stands out of the page on the right, unless it is in a box that scrolls by itself.
OUTSIDE = """() => {
  const scrolls = element => {
    for (let box = element.parentElement; box; box = box.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)) return true;
    return false;
  };
  return [...document.querySelectorAll('article *, main *')]
    .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
    .filter(element => !scrolls(element))
    .map(element => element.outerHTML.slice(0, 200));
}"""
BROKEN = (
    """() => [...document.images].filter(image => !image.naturalWidth).map(image => image.src)"""
)
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g)[0] < 128"


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_pages_fit_the_window(browser, address, pages, width, scheme):
    size = {"width": width, "height": 900}
    with browser.new_context(viewport=size, color_scheme=scheme) as context:
        for name in pages:
            tab, seen = context.new_page(), []
            tab.on("console", lambda message, seen=seen: seen.append(message.text))
            tab.on("pageerror", lambda error, seen=seen: seen.append(str(error)))
            tab.on("requestfailed", lambda request, seen=seen: seen.append(f"no {request.url}"))
            tab.on("request", lambda request, seen=seen: seen.append(request.url))
            tab.goto(address + name, wait_until="load")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
            assert tab.evaluate(OUTSIDE) == [], name
            assert tab.evaluate(BROKEN) == [], name
            assert tab.evaluate(BACKGROUND) == (scheme == "dark"), name
            # Nothing is logged, nothing fails, and nothing comes from another server.
            assert [one for one in seen if not one.startswith((address, "data:,"))] == [], name
            tab.close()


def test_a_word_of_a_docstring_is_found(browser, address):
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto(address)
        tab.get_by_placeholder("Search").fill("softcap")
        tab.locator(".md-search-result__item", has_text="softcap").first.wait_for(timeout=20_000)
