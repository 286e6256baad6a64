"""Run the notebooks and store their outputs: ``make notebooks``, or ``python notebooks/store.py 01 06`` for some.

Each runs from top to bottom in a new kernel and an empty folder, on one thread and without the network. The model that
notebook 03 asks is a server of the test suite on loopback, which hands out the example's own drafts. Nothing is stored
of a notebook that fails, writes to standard error, or shows a path or an address of this machine.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
FIGURE_BYTES = 100 * 1000
NOTEBOOK_BYTES = 400 * 1000
CELL_SECONDS = 600
LARGE_BYTES, COLOURS = 40 * 1000, 128  # a larger figure is stored with a palette, which may lose rare colours
# What differs from machine to machine: folders of users and of temporary files, addresses, and objects in memory.
MACHINE = re.compile(
    r"(?<![\w./~])/(?:home|root|tmp|var|work|Users|private|opt|usr|mnt|data)/\S+"
    r"|\b127\.0\.0\.1\b|\blocalhost:\d+|<[\w.]+ object at 0x[0-9a-f]+>"
)


def code_digest(notebook: Any) -> str:
    """Return a digest of a notebook's code. It is stored with the outputs, and tells that they belong to this code."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def problems(notebook: Any) -> list[str]:
    """List what keeps a notebook's outputs from being stored, cell by cell."""
    found: list[str] = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            text = "".join(output.get("text", "")) + "".join(
                "".join(value) for kind, value in data.items() if kind.startswith("text/")
            )
            if output["output_type"] == "error":
                found.append(f"cell {cell['id']} failed: {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"cell {cell['id']} writes to standard error: {text[:300]}")
            if shown := MACHINE.search(text):
                found.append(f"cell {cell['id']} shows what is of this machine alone: {shown[0]}")
            size = len(data.get("image/png", "")) * 3 // 4
            if size > FIGURE_BYTES:
                found.append(f"cell {cell['id']} shows a figure of {size:,} bytes, of at most {FIGURE_BYTES:,}")
    size = len(json.dumps(notebook))
    if size > NOTEBOOK_BYTES:
        found.append(f"the notebook has {size:,} bytes with its outputs, of at most {NOTEBOOK_BYTES:,}")
    return found


def execute(path: Path) -> Any:
    """Run a notebook, and return it with its outputs as they are stored.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="pfm-") as folder, _surroundings():
        client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False)
        client.execute(cwd=folder)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                _reduce(output)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "pfm": {"code": code_digest(notebook)},
    }
    return notebook


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Run the model's server, and set what kernels take over from this process."""
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    from support.example_model import example_reply
    from support.fault_server import FaultServer

    with FaultServer(reply=example_reply()) as server:
        names = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PFM_BASE_URL": server.url}
        before = {name: os.environ.get(name) for name in (*names, "PFM_MODEL", "PFM_JUDGE_MODEL")}
        for name in before:
            os.environ.pop(name, None)
        os.environ.update(names)
        try:
            yield
        finally:
            os.environ.update({name: value for name, value in before.items() if value is not None})


def _joined(outputs: list[Any]) -> list[Any]:
    """Join the pieces of one stream: where they are cut is a matter of timing."""
    found: list[Any] = []
    for output in outputs:
        stream = output.get("name") if output.output_type == "stream" else None
        if stream and found and found[-1].get("name") == stream:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _reduce(output: Any) -> None:
    """Give a large figure a palette, and leave out what describes it in text."""
    data = output.get("data", {})
    if "image/png" not in data:
        return
    data.pop("text/plain", None)
    output["metadata"] = {}
    content = base64.b64decode(data["image/png"])
    if len(content) > LARGE_BYTES:
        from PIL import Image

        file = io.BytesIO()
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        content = file.getvalue()
    data["image/png"] = base64.b64encode(content).decode()


def main(names: list[str]) -> int:
    """Store the outputs of the notebooks whose names begin with one of these, or of all; return the exit code."""
    import nbformat

    code = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        started = time.perf_counter()
        notebook = execute(path)
        found = problems(notebook)
        if found:
            code = 1
            print(f"{path.name} is not stored:", *found, sep="\n  ", file=sys.stderr)
            continue
        text = nbformat.writes(notebook) + "\n"
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {len(text):,} bytes", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
