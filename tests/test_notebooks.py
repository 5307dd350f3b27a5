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

EXECUTED = [path for path in notebooks() if path.name != "reproduce.ipynb"]  # that one is run by its own test
NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:e[-+]?\d+)?", re.I)
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}", re.I)
MACHINE = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|Users|opt|mnt)/[\w.]")
every = pytest.mark.parametrize("path", notebooks(), ids=in_site)


def texts(cell) -> list[str]:
    "What a cell printed, then what it displayed, as text."
    printed = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    shown = [o.data.get("text/plain", "") for o in cell.outputs if o.output_type in ("display_data", "execute_result")]
    return ([printed] if printed else []) + shown


def pictures(cell) -> list[str]:
    "The PNGs of a cell, in base64."
    return [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]


def same_text(a: str, b: str) -> bool:
    "Equal words; equal numbers up to 2 % or 1e-4; spaces are free, since tensors align their columns."
    a, b = ADDRESS.sub("", a), ADDRESS.sub("", b)
    words = [["".join(word.split()) for word in NUMBER.split(text)] for text in (a, b)]
    pairs = zip(*(map(float, NUMBER.findall(text)) for text in (a, b)))
    return words[0] == words[1] and all(math.isclose(x, y, rel_tol=0.02, abs_tol=1e-4) for x, y in pairs)


def differences(stored, fresh) -> list[str]:
    "Where the outputs of two runs of one notebook disagree."
    found = []
    for i, (old, new) in enumerate((a, b) for a, b in zip(stored.cells, fresh.cells) if a.cell_type == "code"):
        before, after = texts(old), texts(new)
        if len(pictures(old)) != len(pictures(new)):
            found.append(f"code cell {i} ({old.id}): {len(pictures(old))} stored figures, {len(pictures(new))} fresh")
        if "volatile" in old.metadata.get("tags", []):
            agree = bool(before) == bool(after)
        else:
            agree = len(before) == len(after) and all(map(same_text, before, after))
        if not agree:
            found.append(f"code cell {i} ({old.id})\n  stored: {before}\n  fresh:  {after}")
    return found


def execute(notebook, tmp_path, folder):
    "A fresh run in a kernel of its own, with the inline figures of Jupyter and nobody's start-up files."
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    env |= {"IPYTHONDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    fresh = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute(env=env)
    return fresh


@pytest.mark.parametrize("path", EXECUTED, ids=in_site)
def test_runs_and_shows_what_it_stores(path, tmp_path):
    stored = nbformat.read(path, as_version=4)
    found = differences(stored, execute(stored, tmp_path, path.parent))
    assert not found, f"{path.name}: stored outputs are older than the code (make notebooks)\n" + "\n".join(found)


def syntax(cell) -> ast.Module:
    "The syntax tree of a code cell, magics made harmless."
    return ast.parse(TransformerManager().transform_cell(cell.source))


@every
def test_cells_are_short_and_imports_stand_alone(path):
    limit, found = 40 if path.stem == "11_training" else 20, []
    for i, cell in enumerate(c for c in read(path).cells if c.cell_type == "code"):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        tree = syntax(cell)
        imports = [s for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom))]
        names = [alias.name for s in ast.walk(tree) if isinstance(s, ast.ImportFrom) for alias in s.names]
        if len(lines) > limit and "parameters" not in cell.metadata.get("tags", []):  # one line for each parameter
            found.append(f"code cell {i} ({cell.id}): {len(lines)} lines, at most {limit}")
        if imports and len(imports) != len(tree.body):
            found.append(f"code cell {i} ({cell.id}): imports beside other code; the site would not run them")
        if "*" in names:
            found.append(f"code cell {i} ({cell.id}): star import")
        if exported(cell) and re.search(r"^\s*[%!]", cell.source, flags=re.M):
            found.append(f"code cell {i} ({cell.id}): magic in an exported cell")
    assert not found, "\n".join(found)


@every
def test_opens_with_title_and_one_sentence(path):
    "nbdev makes the first cell the page's title and description and drops whatever else stands in it."
    lines = [line for line in read(path).cells[0].source.splitlines() if line.strip()]
    assert [line[:2] for line in lines] == ["# ", "> "], f"want '# Title' and '> One sentence.' alone, got {lines}"


@every
def test_ids_are_present_and_unique(path):
    ids = [cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]  # nbformat would mend them
    assert all(ids) and len(set(ids)) == len(ids), sorted(i or "missing" for i in ids)


@every
def test_outputs_carry_no_error_no_machine_and_no_weight(path):
    found = []
    for i, cell in enumerate(read(path).cells):
        outputs = cell.get("outputs", [])
        data = [item for o in outputs for item in o.get("data", {}).items()]
        said = [cell.source, *(o.get("text", "") for o in outputs)]
        said += [str(content) for kind, content in data if not kind.startswith("image/")]
        found += [f"cell {i} ({cell.id}): path of a machine: {m}" for text in said for m in MACHINE.findall(text)]
        found += [f"cell {i} ({cell.id}): stored error {o.ename}" for o in outputs if o.output_type == "error"]
        sizes = [len(base64.b64decode(png)) for png in (pictures(cell) if outputs else [])]
        found += [f"cell {i} ({cell.id}): a figure of {n} bytes, at most 100 kB" for n in sizes if n > 100_000]
    assert not found, "\n".join(found)


def test_comparison_can_fail():
    assert same_text("loss 1.000\nshape (3, 4)", "loss 1.015\nshape (3,  4)")
    assert same_text("[ 1.00, -0.00001]", "[1.0, 0.00001]")
    assert same_text("<f at 0x7f00aa11bb22>", "<f at 0x7f99ee11bb22>")
    for a, b in (("loss 1.00", "loss 1.03"), ("K=10", "K=11"), ("good", "bad"), ("1.0 2.0", "1.0"), ("nan", "1.0")):
        assert not same_text(a, b)
