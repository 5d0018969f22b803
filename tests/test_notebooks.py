"""The notebooks run from a clean kernel, top to bottom, and draw their pictures."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
PAGES = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=place)
    client.execute()
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_all_six_are_there():
    assert [path.stem[:2] for path in PAGES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_first_cell_of_code_installs_from_one_place(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    first = nbformat.read(PAGES[0], nbformat.NO_CONVERT)
    [same] = [c.source for c in first.cells if c.cell_type == "code"][:1]
    assert code[0] == same and code[0].count("SOURCE = ") == 1
