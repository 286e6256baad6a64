"""The notebooks run from top to bottom, and what their text says of the results holds."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
VERDICT = "against the original ("  # of every verdict that compares at least one changed output
# What the prose takes for granted: cell -> text of its output.
PROMISES = {
    "01_wrap_a_generator": {
        "batch": "outputs changed",
        "verdict": "The flow helps",
        "control": "guard margin: inf\n\nThe flow changed nothing",
        "save": "the loaded flow gives the same b: True",
    }
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS if path.stem in PROMISES] == sorted(PROMISES)


@each_notebook
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id


@pytest.mark.slow
@each_notebook
def test_runs_and_keeps_its_promises(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    client = NotebookClient(notebook, km=_this_python(tmp_path), timeout=300)
    client.execute(cwd=str(tmp_path))  # raises on the first cell that fails

    shown = {cell.id: _shown(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    assert sum(output.images for output in shown.values()) >= 1
    assert any(VERDICT in output.text for output in shown.values())
    for cell, promise in PROMISES.get(path.stem, {}).items():
        assert promise in shown[cell].text


def _this_python(folder: Path) -> AsyncKernelManager:
    """Return a manager of kernels that run in this interpreter, whatever kernels are installed for the user."""
    spec = {
        "display_name": "this Python",
        "language": "python",
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "env": {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "IPYTHONDIR": str(folder / "ipython"),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # under agg, figures would not be outputs
            "TMPDIR": str(folder),
        },
    }
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    specs = KernelSpecManager(kernel_dirs=[str(place.parent)], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)


def _shown(outputs: list) -> SimpleNamespace:
    """Return the text that was printed, and how many images were drawn."""
    return SimpleNamespace(
        text="".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"),
        images=sum("image/png" in output.get("data", {}) for output in outputs),
    )
