"""Every notebook runs top to bottom; there is no exclusion list."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter_client's own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        # As Jupyter runs it.
        resources={"metadata": {"path": str(path.parent)}},
    )
    # As a reader has it: without the simulated devices and the compiler of the tests.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    client.execute(env=environment | {"PYTHONPATH": str(ROOT)})
    assert all(
        cell.execution_count for cell in notebook.cells if cell.cell_type == "code"
    )
