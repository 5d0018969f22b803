"""README.md's table of what went wrong elsewhere names tests that there are."""

import ast
import pathlib
import re

import pytest

pytestmark = pytest.mark.once

TESTS = pathlib.Path(__file__).parent
TEXT = (TESTS / "README.md").read_text()
ITEMS = 24


def _rows() -> dict[int, str]:
    """The last column, by the first."""
    found = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", TEXT, re.MULTILINE)
    assert len(found) == len(dict(found))
    return {int(number): said for number, said in found}


def _functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_item_is_there_with_a_test_or_a_reason():
    rows = _rows()
    assert list(rows) == list(range(1, ITEMS + 1))
    for number, said in rows.items():
        assert re.search(r"`test_\w+\.py::test_\w+`|Cannot apply: .", said), number


def test_every_test_named_is_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)
    assert TEXT.count("::") == len(named) > ITEMS
    absent = [f"{file}::{name}" for file, name in named if name not in _functions(file)]
    assert not absent


def test_every_file_named_is_there():
    names = set(re.findall(r"`(?:tests/)?([\w/]+\.py)", TEXT))
    roots = TESTS, TESTS.parent, TESTS.parent / "gdn_jax" / "testing"
    assert not [x for x in names if not any((root / x).exists() for root in roots)]
