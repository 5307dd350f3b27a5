"""The parameters cell of reproduce.ipynb, made from `Config`: `make parameters` writes it."""

from dataclasses import fields

import nbformat
from fastcore.docments import docments
from house import NBS

from mice.config import Config

NOTEBOOK = NBS / "reproduction" / "reproduce.ipynb"
OUT = 'out: str = "runs"  # folder for figures, labels and the ledger'


def text(value: object) -> str:
    "A default as it is written: double quotes, and a list in place of a tuple, as YAML has no tuples."
    if isinstance(value, str):
        return f'"{value}"'
    return repr(list(value) if isinstance(value, tuple) else value)


def parameters() -> str:
    "One line for each field of `Config`, in order, and one for the folder of the results."
    comments = docments(Config)
    lines = []
    for field in fields(Config):
        kind = list if isinstance(field.default, tuple) else type(field.default)
        lines.append(f"{field.name}: {kind.__name__} = {text(field.default)}  # {comments[field.name]}")
    return "\n".join([*lines, OUT])


def cell_of(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The one cell that carries the tag `parameters`."
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def main() -> None:
    "Write the cell, and nothing where it is right already."
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = cell_of(notebook)
    if cell.source != parameters():
        cell.source = parameters()
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
