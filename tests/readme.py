"""README.md is nbs/index.ipynb as markdown: `python tests/readme.py` writes it."""

import re

import nbformat
from house import NBS, ROOT, directives, exported
from nbconvert import MarkdownExporter

LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s]+)")  # the target of [text](target) or ![text](target)


def markdown() -> str:
    "The text of README.md: hidden and exporting cells dropped, relative links seen from the root."
    notebook = nbformat.read(NBS / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it; it colours the code
    hidden = lambda cell: cell.cell_type == "raw" or exported(cell) or "hide" in directives(cell)
    notebook.cells = [cell for cell in notebook.cells if not hidden(cell)]
    from_root = lambda text: LINK.sub(lambda m: m[1] + ("nbs/" + m[2]).replace("nbs/../", ""), text)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        else:
            for data in (output.get("data", {}) for output in cell.outputs):
                data.update({kind: from_root(text) for kind, text in data.items() if kind == "text/markdown"})
            if "echo: false" in directives(cell):
                cell.metadata["transient"] = {"remove_source": True}
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    assert not resources["outputs"], "index.ipynb shows a figure it computes: store it under nbs/images/ and link it"
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(markdown(), encoding="utf-8")
