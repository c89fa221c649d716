"""A MkDocs hook that turns notebooks into pages of the site, with their saved outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


class NotebookPage(File):
    """A notebook used as a Markdown page."""

    def is_documentation_page(self) -> bool:
        """Return True."""
        return True


def on_files(files: Files, config: Any) -> Files:
    """Turn notebooks into pages before MkDocs reads the pages."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        assert file.abs_src_path
        notebook = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))
        page = NotebookPage(file.src_uri, None, config.site_dir, config.use_directory_urls)
        page.content_string = "\n\n".join(_markdown(cell) for cell in notebook["cells"])
        files.append(page)
    return files


def _markdown(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    outputs = [_output(output) for output in cell["outputs"]]
    return "\n\n".join([f"```python\n{source}\n```", *filter(None, outputs)])


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        return f"![output of the cell](data:image/png;base64,{png})"
    return f"```text\n{''.join(data.get('text/plain', ''))}\n```"
