"""README.md is nbs/index.ipynb as markdown: `make readme` writes it."""

import re

import nbformat
from house import NBS, ROOT, directives, exported
from nbconvert import MarkdownExporter

LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s]+)")  # the target of [text](target) or ![text](target)


def hidden(cell: nbformat.NotebookNode) -> bool:
    "Whether a reader of the README sees neither the cell nor its output."
    return cell.cell_type == "raw" or exported(cell) or "hide" in directives(cell)


def from_root(text: str) -> str:
    "Relative links as they are seen from the root of the project."
    return LINK.sub(lambda match: match[1] + ("nbs/" + match[2]).replace("nbs/../", ""), text)


def markdown() -> str:
    "The text of README.md."
    notebook = nbformat.read(NBS / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it; it colours the code
    notebook.cells = [cell for cell in notebook.cells if not hidden(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
            continue
        for output in cell.outputs:
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = from_root(output.data["text/markdown"])
        if "echo: false" in directives(cell):
            cell.metadata["transient"] = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources["outputs"]:
        raise ValueError("index.ipynb computes a figure: store it under nbs/images/ and link it")
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(markdown(), encoding="utf-8")
