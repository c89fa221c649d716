"""Run the notebooks and save their outputs without noise: `python docs/run_notebooks.py`."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).with_name("notebooks")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove what changes from run to run: times, ids, progress bars and warnings."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept for kept in cell.outputs if kept.get("name") != "stderr"]
            for output in cell.outputs:
                _simplify(output)
    return notebook


def _simplify(output: nbformat.NotebookNode) -> None:
    if output.output_type == "stream":
        output.text = output.text.replace("\r\n", "\n")
    if output.output_type == "execute_result":
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        output.data.pop("image/jpeg", None)  # the same picture
        output.data["image/png"] = _fewer_colours(output.data["image/png"])


def _fewer_colours(png: str) -> str:
    """Return a picture, as base64, with at most 256 colours: a third of the bytes."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":  # it has few colours already
        return png
    picture.convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Run all notebooks, each in a new kernel."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600).execute()
        nbformat.write(clean(notebook), path)
        print(path)


if __name__ == "__main__":
    main()
