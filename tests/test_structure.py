"""The shape of the project: who imports whom, how long things are, what README and docs promise."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))

# Whom a module may import of ours; gradreg stands on torch alone, tui on the run directory alone.
MAY_IMPORT = {
    "gradreg": set(),
    "runs": set(),
    "models": {"runs"},
    "data": {"runs"},
    "attacks": {"gradreg"},
    "bounds": {"gradreg"},
    "train": {"gradreg", "runs", "models", "data", "attacks", "bounds"},
    "evaluate": {"gradreg", "runs", "models", "data", "attacks", "bounds", "report"},
    "report": {"gradreg", "runs", "models", "data", "attacks", "bounds", "evaluate"},
    "tui": set(),
}


def imported(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_plan(module):
    ours = set(imported(module)) & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[module]
    if module == "tui":
        assert not {"torch", "torchvision", "scipy", "matplotlib"} & set(imported(module))


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_classes_are_short_enough_to_read(module):
    nodes = list(ast.walk(ast.parse((ROOT / f"{module}.py").read_text())))

    def lengths(*kinds):
        return sorted((n.end_lineno - n.lineno + 1, n.name) for n in nodes if isinstance(n, kinds))

    functions = lengths(ast.FunctionDef, ast.AsyncFunctionDef)
    assert functions[-1][0] <= 60, functions[-1]
    assert functions[len(functions) // 2][0] <= 14
    assert all(lines <= 150 for lines, _ in lengths(ast.ClassDef)), lengths(ast.ClassDef)[-1]


def test_the_whole_is_small_enough_to_read():
    """Under 6,000 lines: an evening's reading.  And a front page is a page."""
    assert sum(len((ROOT / f"{module}.py").read_text().splitlines()) for module in MODULES) < 6000
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_have_docstrings_or_are_one_glance_long(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    assert ast.get_docstring(tree), f"{module}.py says nothing about itself"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = node.end_lineno - node.lineno < 8
            assert ast.get_docstring(node) or short, f"{module}.{node.name} has no docstring"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, *languages):
    """The fenced blocks of a page in any of these languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page):
    """(program, arguments) of each line of a page's shell blocks that runs one of our programs."""
    for line in "".join(blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if re.fullmatch(r"(train|evaluate|tui|data|benchmarks/\w+)\.py", word):
                yield word, words[i + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_is_understood(page):
    """Each is parsed by the program's own command line: every option exists and takes such a value."""
    found = list(commands(page))
    assert len(found) >= 10 or page.name != "README.md"
    for program, arguments in found:
        assert (ROOT / program).is_file()
        if "/" in program:
            continue
        app = typer.Typer(add_completion=False)
        app.command()(importlib.import_module(program.removesuffix(".py")).main)
        typer.main.get_command(app).make_context(program, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_of_the_readme_runs():
    """Its blocks, executed one after the other as they stand."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    images, others = (torch.rand(8, 3, 2, 2, generator=generator) for _ in range(2))
    labels, other_labels = (network(x).argmax(1).detach() for x in (images, others))
    scope = {"model": network, "images": images, "labels": labels, "others": others, "other_labels": other_labels}
    own_loop, own_network = blocks(ROOT / "README.md", "python")
    exec(own_loop, scope)
    assert all(p.grad is not None for p in network.parameters())
    exec(own_network, scope)
    assert (scope["found"].distances > 0).all()
