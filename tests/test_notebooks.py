"""The notebooks run from a clean kernel, top to bottom, and draw their pictures."""

import pathlib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.once

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
PAGES = sorted(NOTEBOOKS.glob("*.ipynb"))
READ = {page.stem: nbformat.read(page, nbformat.NO_CONVERT) for page in PAGES}


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook) -> list[str]:
    """The pictures of its outputs, in turn."""
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    kept = [output.get("data", {}).get("image/png") for output in outputs]
    return [picture for picture in kept if picture]


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery
@pytest.mark.parametrize("name", READ)
def test_a_notebook_runs(name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS")  # a user has no four devices
    monkeypatch.setenv("NPROC", "1")  # other tests have the other cores
    # they compile more than they compute, as other tests do (conftest.py)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    committed = READ[name]
    notebook = nbformat.from_dict(committed)
    for cell in code_of(notebook):
        cell.outputs = []
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    assert len(pictures(notebook)) == len(pictures(committed)) > 0


def test_all_six_are_there():
    assert [name[:2] for name in READ] == ["01", "02", "03", "04", "05", "06"]


def test_the_first_cell_of_code_installs_from_one_place():
    [first] = {code_of(notebook)[0].source for notebook in READ.values()}
    assert first.count("SOURCE = ") == 1
    later = [cell for notebook in READ.values() for cell in code_of(notebook)[1:]]
    assert not any("pip" in cell.source for cell in later)
