"""Notebooks and modules agree, imports go one way, and what is generated is up to date."""

import ast
import re
import sys
from collections import Counter

import nbformat
import pytest
import readme
import yaml
from house import BIN, NBS, ROOT, directives, exported, in_site, modules, notebooks, read, run, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# From the bottom up: a module may import modules of the layers above it in this list, never of its own or a later one.
LAYERS = [
    "core",
    "gating experts estep mstep",
    "normalizer",
    "elbo",
    "encoders views metrics ledger ranks",
    "cache engine figures health",
    "data",
    "folders training",
    "datasets inputs two_stage official checkpoints forecast choosing tensorboard bench",
    "methods results",
    "estimator",
    "report",
    "cluster",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer.split()}
MATHEMATICS = "core gating experts estep mstep normalizer elbo".split()
DRAWS = {"choosing", "results"}  # besides notebooks, only these import figures


def contents(folder) -> dict:
    "Name -> bytes of the files below a folder."
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def changed(before: dict, after: dict) -> list[str]:
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def test_export_changes_nothing(copy):
    before = contents(copy)
    run(BIN / "nbdev_export", cwd=copy)
    found = changed(before, contents(copy))
    assert not found, f"nbdev_export changes {found}: run `make export`; mice/ is never edited by hand"


def test_notebooks_are_clean(copy):
    before = contents(copy / "nbs")
    run(BIN / "nbdev_clean", cwd=copy)
    found = changed(before, contents(copy / "nbs"))
    assert not found, f"nbdev_clean changes {found}: run `make clean-notebooks`"


def test_cleaning_keeps_the_parameters_tag(copy):
    path = copy / "nbs" / "tagged.ipynb"
    cell = nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"], "noise": 1})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    run(BIN / "nbdev_clean", "--fname", path, cwd=copy)
    assert nbformat.read(path, as_version=4).cells[0].metadata == {"tags": ["parameters"]}


def test_one_notebook_per_module():
    named = lambda cell: [d.split()[1] for d in directives(cell) if d.startswith("default_exp ")]
    homes = {path: [name for cell in read(path).cells for name in named(cell)] for path in notebooks()}
    count = Counter(name for names in homes.values() for name in names)
    assert all(len(names) <= 1 for names in homes.values()), "a notebook names two modules"
    assert not [name for name, n in count.items() if n > 1], f"two notebooks overwrite one module: {count}"
    assert sorted(count) == modules(), "every module has one notebook, and every default_exp its module"
    for path, names in homes.items():
        exports = any(map(exported, read(path).cells))
        assert exports == bool(names), f"{in_site(path)} exports without default_exp, or the reverse"


def imports(name: str) -> tuple[set[str], set[str]]:
    "What a module imports anywhere in its text: modules of the library, and top-level names of everything else."
    own, other = set(), set()
    for node in ast.walk(ast.parse((ROOT / "mice" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "mice" * bool(node.level) + "." * bool(node.level and node.module) + (node.module or "")
            targets = [f"mice.{alias.name}" for alias in node.names] if base == "mice" else [base]
        else:
            continue
        for first, _, rest in (target.partition(".") for target in targets):
            (own if first == "mice" else other).add(rest.split(".")[0] if first == "mice" else first)
    return own & set(modules()), other


@pytest.mark.parametrize("name", modules())
def test_imports_go_one_way(name):
    assert name in LEVEL, f"give {name} a place in LAYERS, and in DESIGN.md"
    own, other = imports(name)
    wrong = {m for m in own if LEVEL[m] >= LEVEL[name]}
    assert not wrong, f"{name} imports {wrong} of its own layer or above"
    assert "figures" not in own or name in DRAWS, f"{name} draws"
    if name in MATHEMATICS:
        assert other <= {"torch", *sys.stdlib_module_names}, f"mathematics imports torch alone, {name} imports {other}"


@pytest.mark.parametrize(
    "names, banned",
    [
        (MATHEMATICS, "nbdev fastcore IPython matplotlib seaborn papermill torchvision PIL scipy sklearn pandas"),
        ([m for m in modules() if m not in ("figures", "results")], "nbdev fastcore IPython matplotlib seaborn papermill nbclient"),
    ],
    ids=["mathematics", "library"],
)
def test_import_is_light(names, banned):
    names = [name for name in names if name in modules()]
    program = f"import sys, {', '.join('mice.' + n for n in names)}; print(*set({banned.split()}) & set(sys.modules))"
    assert run(sys.executable, "-c", program).strip() == ""


def test_sidebar_names_every_notebook():
    def hrefs(node):
        if isinstance(node, str):
            yield node
        for child in node if isinstance(node, list) else []:
            yield from hrefs(child)
        if isinstance(node, dict):
            yield from hrefs([node[key] for key in ("href", "section", "contents") if key in node])

    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    named = Counter(h for h in hrefs(site["website"]["sidebar"]["contents"]) if h.endswith(".ipynb"))
    assert named == Counter(map(in_site, notebooks())), "the sidebar of _quarto.yml and the notebooks differ"
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml", "nbs/_quarto.yml must be a link to ../_quarto.yml"


def test_only_sources_under_nbs():
    "Everything under nbs/ is copied to the site."
    files = (p.relative_to(NBS) for p in NBS.rglob("*") if p.is_file())
    files = [p for p in files if not any(part[0] in "._" for part in p.parts[:-1])]
    allowed = r"(.+\.(ipynb|ya?ml|md|css|bib|png|svg)|\.gitignore|_quarto\.yml|nbdev\.yml)"
    assert not [p for p in files if not re.fullmatch(allowed, p.name)]


def test_readme_is_the_index():
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == readme.markdown(), "README.md is older than nbs/index.ipynb: run `make readme`"


def test_there_is_no_pyproject():
    assert not (ROOT / "pyproject.toml").exists(), "nbdev would rewrite it; settings.ini and setup.py say everything"


def test_lock_is_exact_and_complete():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines), "exact versions: no index, path or range"
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    foreign = [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))]
    assert not foreign, "torch pins these, on the platforms that have them"
    for kind in ("requirements", "reproduce_requirements", "dev_requirements"):
        for wanted in map(Requirement, settings()[kind].split()):
            version = locked.get(canonicalize_name(wanted.name))
            assert version and wanted.specifier.contains(version), f"{kind} wants {wanted}, locked is {version}"
