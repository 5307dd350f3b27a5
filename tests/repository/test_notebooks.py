"""Every notebook runs in a process of its own, shows what it stores, and keeps the style of the house."""

import ast
import base64
import json
import math
import os
import re

import nbformat
import pytest
from house import BIN, exported, in_site, notebooks, read
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

WIDTH = 110
EXECUTED = [path for path in notebooks() if path.name != "reproduce.ipynb"]  # that one is run by its own test
VALUE = r"\d[\d.,]*(?:e[-+]?\d+)?"
TIME = rf"{VALUE}\s?(?:ms|s|min|h|seconds|minutes|hours|days)\b"
VARYING = [
    re.compile(rf"\b{TIME}(?:\s+{TIME})*"),  # a duration, such as 0.3 s or 1 min 5 s
    re.compile(rf"\b{VALUE}\s?images/s"),
    re.compile(r"\b0x[0-9a-f]{6,}", re.I),  # an address in memory
]
NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:e[-+]?\d+)?", re.I)
MACHINE = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|Users|opt|mnt)/[\w.]")
every_notebook = pytest.mark.parametrize("path", notebooks(), ids=in_site)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell) -> list[str]:
    "What a cell printed, then what it displayed, as text."
    printed = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    displayed = [o for o in cell.outputs if o.output_type in ("display_data", "execute_result")]
    return [printed] * bool(printed) + [o.data.get("text/plain", "") for o in displayed]


def figures(cell) -> list[str]:
    "The PNGs of a cell, in base64."
    return [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]


def same_text(stored: str, fresh: str) -> bool:
    """Whether two outputs agree: equal words, and numbers equal up to 2 % or 1e-4, since chips differ.

    Spaces are free, since tensors align their columns; durations, images/s and addresses are not compared.
    """
    words, numbers = [], []
    for text in (stored, fresh):
        for pattern in VARYING:
            text = pattern.sub("", text)
        words.append("".join(NUMBER.sub("0", text).split()))
        numbers.append([float(number) for number in NUMBER.findall(text)])
    if words[0] != words[1] or len(numbers[0]) != len(numbers[1]):
        return False
    return all(math.isclose(a, b, rel_tol=0.02, abs_tol=1e-4) for a, b in zip(*numbers, strict=True))


def differences(stored, fresh) -> list[str]:
    "Where the outputs of two runs of one notebook disagree."
    found = []
    for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
        before, after = texts(old), texts(new)
        if len(figures(old)) != len(figures(new)):
            found.append(f"cell {old.id}: {len(figures(old))} stored figures, {len(figures(new))} fresh")
        if len(before) != len(after) or not all(map(same_text, before, after)):
            found.append(f"cell {old.id}\n  stored: {before}\n  fresh:  {after}")
    return found


def execute(notebook, tmp_path, folder):
    "A fresh run in a kernel of its own, with the inline figures of Jupyter and nobody's start-up files."
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= dict(IPYTHONDIR=str(tmp_path), OMP_NUM_THREADS="1", PATH=f"{BIN}{os.pathsep}{env['PATH']}")
    fresh = nbformat.from_dict(notebook)
    for cell in code_cells(fresh):
        cell.outputs = []
    resources = {"metadata": {"path": str(folder)}}
    options = dict(timeout=300, kernel_name="python3", shutdown_kernel="immediate")  # nothing is left to do
    NotebookClient(fresh, resources=resources, **options).execute(env=env)
    return fresh


@pytest.mark.parametrize("path", EXECUTED, ids=in_site)
def test_runs_and_shows_what_it_stores(path, tmp_path):
    stored = nbformat.read(path, as_version=4)
    found = differences(stored, execute(stored, tmp_path, path.parent))
    assert not found, "stored outputs are older than the code (make notebooks)\n" + "\n".join(found)


@every_notebook
def test_lines_are_short_and_imports_stand_alone(path):
    found = []
    for cell in code_cells(read(path)):
        wide = [line for line in cell.source.splitlines() if len(line) > WIDTH]
        found += [f"{cell.id}: {len(line)} columns, at most {WIDTH}: {line}" for line in wide]
        tree = ast.parse(TransformerManager().transform_cell(cell.source))  # magics made harmless
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        if imports and len(imports) != len(tree.body):
            found.append(f"{cell.id}: imports beside other code; the site would not run them")
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if any(alias.name == "*" for node in froms for alias in node.names):
            found.append(f"{cell.id}: star import")
        if exported(cell) and re.search(r"^\s*[%!]", cell.source, flags=re.M):
            found.append(f"{cell.id}: magic in an exported cell")
    assert not found, "\n".join(found)


@every_notebook
def test_opens_with_title_and_one_sentence(path):
    "nbdev makes the first cell the page's title and description and drops whatever else stands in it."
    lines = [line for line in read(path).cells[0].source.splitlines() if line.strip()]
    starts = [line[:2] for line in lines]
    assert starts == ["# ", "> "], f"want '# Title' and '> One sentence.' alone, got {lines}"


@every_notebook
def test_ids_are_present_and_unique(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]  # nbformat would mend them
    ids = [cell.get("id") for cell in cells]
    assert all(ids) and len(set(ids)) == len(ids), sorted(i or "missing" for i in ids)


@every_notebook
def test_every_output_is_compared(path):
    "The tag `volatile` once excused cells from the comparison with a fresh run."
    assert not [cell.id for cell in read(path).cells if "volatile" in cell.metadata.get("tags", [])]


@every_notebook
def test_outputs_carry_no_error_no_machine_and_no_weight(path):
    found = []
    for cell in read(path).cells:
        outputs = cell.get("outputs", [])
        shown = [cell.source, *(output.get("text", "") for output in outputs)]
        for output in outputs:
            data = output.get("data", {}).items()
            shown += [str(content) for kind, content in data if not kind.startswith("image/")]
            if output.output_type == "error":
                found.append(f"{cell.id}: stored error {output.ename}")
        found += [f"{cell.id}: path of a machine: {m}" for text in shown for m in MACHINE.findall(text)]
        for figure in figures(cell) if outputs else []:
            size = len(base64.b64decode(figure))
            if size > 100_000:
                found.append(f"{cell.id}: a figure of {size} bytes, at most 100 kB")
    assert not found, "\n".join(found)
