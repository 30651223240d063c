"""What the pages point to is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]


def names_in(path):
    """Names that a file defines at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        for target in [*getattr(node, "targets", ()), getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                yield target.id


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_docs_exists(page):
    """`file.py:name` and `tests/file.py::name`."""
    for file, name in re.findall(r"`([a-z][\w/]*\.py)::?(\w+)`", page.read_text()):
        assert (ROOT / file).is_file(), f"{page.name}: no file {file}"
        assert name in set(names_in(ROOT / file)), f"{page.name}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_in_docs_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: no {target}"


def test_the_paper_is_linked_statement_by_statement():
    """docs/paper.md names code and a test for every numbered equation, proposition, algorithm, table and figure."""
    text = (ROOT / "docs" / "paper.md").read_text().partition("## Abstract")[2]
    heads = " ".join(re.findall(r"^\*\*(.*?)\*\*", text, flags=re.MULTILINE))
    numbered = [f"({i})" for i in range(1, 10)] + [f"Table {i}" for i in range(1, 7)]
    for number in [*numbered, "Remark 2.1", "Proposition 2.2", "Proposition 3.1", "Proposition 3.2", "Algorithm 1"]:
        assert number in heads, number
    assert len(re.findall(r"`\w+\.py:\w+`", text)) >= 40
    assert len(re.findall(r"`tests/\w+\.py::\w+`", text)) >= 40
