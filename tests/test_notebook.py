"""docs/quickstart.ipynb runs from its first cell to its last, in a fresh kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_imports import REPOSITORY

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
NOTEBOOK = REPOSITORY / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel shows pictures in the notebook
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(REPOSITORY)}})
    client.execute()  # raises CellExecutionError with the cell and its traceback
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    last = shown[-1]["data"]["text/plain"]
    assert len(pictures) == 2 and "rewards/brightness/mean" in last
