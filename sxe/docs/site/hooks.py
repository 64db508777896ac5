"""How the pages of the site are made from README.md, sxe/docs, the docstrings and the derivation.

MkDocs calls the functions named `on_...`. Griffe, which reads the docstrings, calls `Docstrings`.
"""

import os
import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SITE = Path(__file__).parent
ROOT = SITE.parents[2]
DOCS = "sxe/docs"
REFERENCE = sorted((SITE / "api").glob("*.md"))

FENCE = re.compile(r"^( *)```.*?^\1``` *$", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r"(-|\d+\.) ")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
SESSION = re.DOTALL | re.MULTILINE
# Code that is a name with an entry in the API reference, or a call of one.
PUBLIC = [
    name
    for page in REFERENCE
    for name in re.findall(r"^::: sxe\.(\w+)$", page.read_text("utf-8"), re.MULTILINE)
]
NAME = re.compile(rf"(`+)sxe\.({'|'.join(PUBLIC)})(\([^`]*\))?\1")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    with (ROOT / "pyproject.toml").open("rb") as file:
        urls = tomllib.load(file)["project"]["urls"]
    config.site_url = config.site_url or urls["Documentation"].rstrip("/") + "/"
    config.repo_url = urls["Repository"]
    config.repo_name = "Source"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in sxe/docs, and drops what is not for readers."""
    readme = (ROOT / "README.md").read_text("utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    for page in REFERENCE:
        files.append(File.generated(config, f"api/{page.name}", abs_src_path=str(page)))
    style = SITE / "extra.css"
    files.append(File.generated(config, "assets/extra.css", abs_src_path=str(style)))
    files.append(File.generated(config, "check.html", abs_src_path=str(_measured_derivation())))
    return files


def _measured_derivation() -> Path:
    """The page that `python -m sxe check --html` writes. It takes a minute, so it is kept."""
    page = ROOT / "build/check.html"
    newest = max(path.stat().st_mtime for path in (ROOT / "sxe").rglob("*.py"))
    if not page.exists() or page.stat().st_mtime < newest:
        page.parent.mkdir(exist_ok=True)
        page.unlink(missing_ok=True)
        command = [sys.executable, "-m", "sxe", "check", "--html", str(page)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            page.unlink(missing_ok=True)
            raise PluginError(f"python -m sxe check failed:\n{done.stdout}{done.stderr}")
    return page


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    source = "README.md" if name == "index.md" else f"{DOCS}/{name}"
    folder = posixpath.dirname(f"{DOCS}/{name}")
    text = re.sub(r"^<!--.*?-->\n", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = _lists(text)

    def prose(text: str) -> str:
        def link(match: re.Match[str]) -> str:
            return match[1] + _target(match[2], source, folder, config) + match[3]

        return link_names(LINK.sub(link, text), linked)

    linked: set[str] = set()
    parts: list[str] = []
    end = 0
    for fence in FENCE.finditer(text):
        parts += [prose(text[end : fence.start()]), _code(fence[0])]
        end = fence.end()
    return "".join([*parts, prose(text[end:])])


def _lists(text: str) -> str:
    """Lists as Python-Markdown needs them: a blank line above, items indented by four spaces."""
    lines: list[str] = []
    width, fenced, parts = 0, False, False  # whether an item has several paragraphs
    for line in text.split("\n"):
        above = lines[-1] if lines else ""
        fenced ^= line.startswith("```")
        item = None if fenced else ITEM.match(line)
        if item:
            if above and (not width or parts):
                lines.append("")
            width, parts = len(item[0]), False
        elif line and not line.startswith(" ") and (fenced or not above):
            width = 0
        elif width and line.startswith(" " * width):
            line = "    " + line[width:]
        parts |= width > 0 and (not line or line.endswith("```"))
        lines.append(line)
    return "\n".join(lines)


def _code(fence: str) -> str:
    """A code block. One with prompts is highlighted as a session."""
    return fence.replace("```python", "```pycon", 1) if ">>> " in fence else fence


def _target(target: str, source: str, folder: str, config: MkDocsConfig) -> str:
    """A link in the file `source` of the repository, as a link of a page in `folder`.

    A file that is not in the site is linked in the repository's address.
    """
    path, hash_sign, anchor = target.partition("#")
    if not path or ":" in path:
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path.startswith(f"{DOCS}/"):
        return posixpath.relpath(path, folder) + hash_sign + anchor
    if (ROOT / path).exists():
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path}{hash_sign}{anchor}"
    return target  # which MkDocs reports


def link_names(text: str, linked: set[str]) -> str:
    """Links the first code that names something public to its entry in the API reference."""
    lines = text.split("\n")
    for i, line in enumerate(lines):

        def link(name: re.Match[str], line: str = line) -> str:
            before = line[: name.start()]
            if name[2] in linked or before.count("[") > before.count("]"):  # in a link's text
                return name[0]
            linked.add(name[2])
            return f"[{name[0]}][sxe.{name[2]}]"

        if not line.startswith("#"):
            lines[i] = NAME.sub(link, line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if obj.is_function and obj.path.startswith("sxe.derivation."):
            text = f"```text\n{text}\n```"  # the docstring of a line is its formula
        else:
            text = re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=SESSION)
            text = link_names(text, set())
        # The names of several arguments that share a description may take two lines.
        text = re.sub(r"^( +(?:\w+,[ ]?)+)\n +(?=[\w, ]+: )", r"\1 ", text, flags=re.MULTILINE)
        # The name of the section whose sessions Griffe recognizes.
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
