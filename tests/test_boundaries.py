"""The house rules that no linter can state."""

import ast
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parent.parent
INTERNALS = ("vllm.v1", "vllm.model_executor", "vllm.distributed", "vllm.worker")

PACKAGES = sorted([*ROOT.glob("calibrators/**/*.py"), *ROOT.glob("server/**/*.py")])
OUTSIDE_ENGINE = [file for file in PACKAGES if ROOT / "server" / "engine" not in file.parents]
CODE = [*PACKAGES, *sorted(ROOT.glob("deploy/**/*.py")), *sorted(ROOT.glob("benchmarks/**/*.py"))]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def relative(file):
    return str(file.relative_to(ROOT))


def parse(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(tree):
    """Every dotted name that an import statement reaches, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lengths_of_functions(file):
    """Name and number of lines, decorators and docstring not counted."""
    for node in ast.walk(parse(file)):
        if isinstance(node, FUNCTIONS):
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def inside(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("file", OUTSIDE_ENGINE, ids=relative)
def test_only_the_engine_imports_vllm_internals(file):
    reached = {name for name in imported(parse(file)) for part in INTERNALS if inside(name, part)}
    assert not reached


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import vllm.v1.core", {"vllm.v1.core"}),
        ("from vllm import v1", {"vllm.v1"}),
        ("from vllm.v1.core import sched as s", {"vllm.v1.core.sched"}),
        ("def f():\n    from vllm.worker import x", {"vllm.worker.x"}),
        ("from .v1 import x", set()),
    ],
)
def test_imports_are_seen_in_every_form(code, names):
    assert set(imported(ast.parse(code))) == names


@pytest.mark.parametrize("file", CODE, ids=relative)
def test_size_of_files_and_functions(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
    assert not {name: lines for name, lines in lengths_of_functions(file) if lines > 50}


def test_usual_size_of_files_and_functions():
    files = [len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGES]
    functions = [lines for file in PACKAGES for _, lines in lengths_of_functions(file)]
    assert median(files) <= 120
    assert median(functions) <= 8
    assert quantiles(functions, n=10)[-1] <= 25


def test_at_most_two_broad_excepts():
    broad = [
        f"{relative(file)}:{node.lineno}"
        for file in CODE
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ExceptHandler) and catches_everything(node)
    ]
    assert len(broad) <= 2, broad


def catches_everything(handler):
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {each.id for each in caught if isinstance(each, ast.Name)}
    return handler.type is None or bool(names & {"Exception", "BaseException"})
