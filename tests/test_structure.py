"""The shape of the project: who imports whom, how long functions are, what the README promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_functions_are_short_enough_to_read(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted((n.end_lineno - n.lineno + 1, n.name) for n in functions)
    assert lengths[-1][0] <= 60, lengths[-1]
    assert lengths[len(lengths) // 2][0] <= 14


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_have_docstrings_or_are_one_glance_long(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    assert ast.get_docstring(tree), f"{module}.py says nothing about itself"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = node.end_lineno - node.lineno < 8
            assert ast.get_docstring(node) or short, f"{module}.{node.name} has no docstring"


def readme_commands(program):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(rf"\b{program}\b", line)]


def test_every_option_in_the_readme_exists():
    """Each command of train.py in the README uses options that its --help lists."""
    commands = readme_commands(r"train\.py")
    assert len(commands) >= 4
    shown = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True)
    for line in commands:
        after = line.split("train.py", 1)[1]
        for flag in re.findall(r"--[a-z-]+", after):
            assert flag in shown.stdout, f"{line}: no option {flag}"


def test_every_name_in_the_readmes_map_exists():
    """`file.py:name` in the README, for every module that is there."""
    text = (ROOT / "README.md").read_text()
    references = re.findall(r"`([a-z]\w*)\.py:(\w+)`", text)
    assert len(references) >= 10
    for module, name in references:
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        names |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        names |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
        assert name in names, f"{module}.py has no {name}"


def test_the_three_lines_of_the_readme_run():
    """The README's "In your own loop" block, executed as it stands."""
    import torch

    text = (ROOT / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "fd_penalty" in b]
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    scope = {"model": network, "images": torch.rand(4, 3, 2, 2), "labels": torch.tensor([0, 1, 2, 0])}
    exec(block, scope)
    assert all(p.grad is not None for p in network.parameters())
