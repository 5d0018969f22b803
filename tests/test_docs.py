"""The code of the documentation runs, page by page, as printed."""

import pathlib
import re

import pytest
import typer

from gdn_jax.cli.commands import app

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


# What they call has tests of its own on every line of JAX.
@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_code_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)


def test_there_are_pages_with_code():
    assert sum("```python" in page.read_text() for page in PAGES) >= 6


def test_its_commands_and_scripts_are_there():
    """What they do is tested elsewhere."""
    pages = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    code = [
        block
        for page in pages
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    commands = set(re.findall(r"\bgdn-jax (\w+)", "\n".join(code)))
    assert {"generate", "check", "info"} <= commands
    assert commands <= set(typer.main.get_command(app).commands)
    scripts = re.findall(r"\bpython (\S+\.py)", "\n".join(code))
    assert scripts and all((ROOT / script).is_file() for script in scripts)
