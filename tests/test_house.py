"""The structure of the package: layers, one place for facts about platforms, and README's list."""

import ast
import re
from pathlib import Path

import sxe

PACKAGE = Path(sxe.__file__).parent
# The layers, lowest first. A folder is a layer. Its modules may import one another without cycles.
LAYERS = (
    ("derivation.py", "_errors.py", "_backend.py"),
    ("_arrays.py",),
    ("_primitives.py",),
    ("_rows",),
    ("_head",),
    ("_call",),
    (
        "_softmax_cross_entropy.py",
        "_linear_softmax_cross_entropy.py",
        "_kl_divergence.py",
        "_linear_kl_divergence.py",
    ),
    ("_log_prob_and_entropy.py",),
    ("_mesh.py", "_plan"),
    ("__init__.py",),
    ("_tools",),
    ("__main__.py",),
)
FACTS = ("default_backend", "device_count", "__version_info__", "platform")


def layer_of(path):
    top = path.relative_to(PACKAGE).parts[0]
    return next(i for i, rooms in enumerate(LAYERS) if top in rooms)


def modules():
    documentation = PACKAGE / "docs"  # not a part of the package
    return sorted(p for p in PACKAGE.rglob("*.py") if documentation not in p.parents)


def imported(path):
    """The files of this package that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # In "from package import name", the name may be a module.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "sxe":
                file = PACKAGE.joinpath(*parts[1:])
                found = (file.with_suffix(".py"), file / "__init__.py")
                yield from (each for each in found if each.exists() and parts[1:])


def test_a_module_imports_from_layers_below_it():
    wrong = [
        (str(path.relative_to(PACKAGE)), str(other.relative_to(PACKAGE)))
        for path in modules()
        for other in imported(path)
        if layer_of(other) > layer_of(path)
        or (layer_of(other) == layer_of(path) and other.parent == PACKAGE == path.parent)
    ]
    assert wrong == []


def test_no_circle_of_modules():
    seen = {}

    def visit(path, above):
        assert path not in above, [str(each) for each in above]
        if path not in seen:
            seen[path] = True
            for other in imported(path):
                if other != path:
                    visit(other, (*above, path))

    for path in modules():
        visit(path, ())


def test_platforms_and_versions_are_facts_of_the_backend():
    """The losses ask ``Backend``. Tools may ask JAX. A mesh names the platform of its devices."""
    asking = set()
    for path in modules():
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("_tools") or name in ("_backend.py", "_mesh.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in FACTS:
                asking.add(name)
    assert asking <= {"_plan/memory.py"}  # it selects the estimate for a platform


def test_the_reading_list_counts_lines():
    text = (PACKAGE / "docs" / "contributing.md").read_text()
    listed = re.findall(r"^\| `(sxe/\S+)` \| (\d+) \|", text, re.MULTILINE)
    assert len(listed) >= 6
    for file, lines in listed:
        count = len((PACKAGE.parent / file).read_text().splitlines())
        assert abs(count - int(lines)) <= 10, (file, count)
