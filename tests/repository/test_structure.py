"""Notebooks and modules agree, imports go one way, and what is generated is up to date.

The rule of imports, with the parts from the bottom up in `LAYERS`: a module may import what stands below its
part, and other modules of its own part, without a circle. Parts that stand side by side do not import each
other. Within a part the numbers of the notebooks are the order of reading, not of importing: the loop is read
before the engine it can use, the objective before the attention kernels, the images before their cache.
"""

import ast
import re
import sys
from collections import Counter
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pages
import parameters
import pytest
import readme
import yaml
from house import (
    BIN,
    NBS,
    ROOT,
    copy_sources,
    exported,
    exports_to,
    in_site,
    module_path,
    modules,
    notebooks,
    read,
    run,
    settings,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MATHEMATICS = "core attention gating experts estep mstep normalizer elbo"
FLAT = "config encoders metrics figures files text machine cli".split()  # outside the package of their part
LAYERS = [
    [MATHEMATICS],
    ["files text machine"],
    ["config", "metrics figures"],  # they need nothing of the parts they belong to, and parts below use them
    ["data.*"],
    ["encoders training.*"],
    ["reproduction.*", "clustering.*"],
    ["cli"],
]
SECTIONS = {  # of the sidebar -> folder
    "Start": "start",
    "Follow the paper": "paper",
    "Data": "data",
    "Training": "training",
    "Reproduction": "reproduction",
    "Clustering": "clustering",
    "Shared": "shared",
}


def contents(folder: Path) -> dict[str, bytes]:
    "Name -> bytes of the files below a folder."
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def changed(before: dict, after: dict) -> list[str]:
    "The names of files that appeared, disappeared or changed."
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def test_exporting_and_cleaning_change_nothing(tmp_path):
    copy = copy_sources(tmp_path / "mice")
    before = contents(copy)
    run(BIN / "nbdev_export", cwd=copy)
    exported_now = contents(copy)
    run(BIN / "nbdev_clean", cwd=copy)
    edited, noisy = changed(before, exported_now), changed(exported_now, contents(copy))
    assert not edited, f"nbdev_export changes {edited}: run `make export`; mice/ is never edited by hand"
    assert not noisy, f"nbdev_clean changes {noisy}: run `make clean-notebooks`"


def test_one_notebook_per_module():
    homes = {path: exports_to(path) for path in notebooks()}
    count = Counter(name for names in homes.values() for name in names)
    assert all(len(names) <= 1 for names in homes.values()), "a notebook names two modules"
    assert max(count.values()) == 1, f"two notebooks overwrite one module: {count.most_common(1)}"
    assert sorted(count) == modules(), "every module has one notebook, and every default_exp its module"
    for path, names in homes.items():
        exports = any(map(exported, read(path).cells))
        assert exports == bool(names), f"{in_site(path)} exports without default_exp, or the reverse"


def test_a_notebook_and_its_module_share_a_name():
    "The mathematics has its own names: the paper's words in the notebooks, short ones in the code."
    found = []
    for path in notebooks():
        for module in exports_to(path):
            part, stem = path.parent.name, re.sub(r"^\d+_", "", path.stem)
            wanted = MATHEMATICS.split() if part == "paper" else [stem if stem in FLAT else f"{part}.{stem}"]
            if module not in wanted:
                found.append(f"{in_site(path)} exports to {module}, not to {' or '.join(wanted)}")
    assert not found, "\n".join(found)


def test_a_public_name_is_defined_in_one_module():
    homes = {}
    for module in modules():
        for name in pages.public(ast.parse(pages.text_of(module))):
            homes.setdefault(name, []).append(module)
    found = [f"{name} in {', '.join(places)}" for name, places in sorted(homes.items()) if len(places) > 1]
    assert not found, "one name means one thing in the whole library\n" + "\n".join(found)


def place(module: str) -> tuple[int, int]:
    "The layer of a module, and its part within the layer."
    for level, parts in enumerate(LAYERS):
        for i, part in enumerate(parts):
            if any(fnmatch(module, pattern) for pattern in part.split()):
                return level, i
    raise AssertionError(f"give {module} a place in LAYERS")


def imports(module: str) -> tuple[set[str], set[str]]:
    "What a module imports anywhere in its text: modules of the library, and other packages."
    found = set()
    package = ["mice", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(module_path(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    own = {name.removeprefix("mice.") for name in found} & set(modules())
    return own, {name.split(".")[0] for name in found} - {"mice"}


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    own, other = imports(module)
    level, part = place(module)
    wrong = [name for name in own if place(name)[0] >= level and place(name) != (level, part)]
    assert not wrong, f"{module} imports {wrong} of a part above or beside its own"
    if module in MATHEMATICS.split():
        foreign = other - {"torch", *sys.stdlib_module_names}
        assert not foreign, f"mathematics imports torch alone, {module} imports {foreign}"


def test_imports_have_no_circle():
    try:
        TopologicalSorter({module: imports(module)[0] for module in modules()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_imports_are_light():
    "The mathematics loads nothing but torch; the library loads no tools for notebooks and no plotting."
    heavy = "torchvision PIL scipy sklearn pandas".split()
    tools = "nbdev fastcore IPython papermill nbclient matplotlib seaborn".split()
    drawing = ["figures", "reproduction.plots"]
    library = [name for name in modules() if name not in drawing]
    program = f"""
import sys
from importlib import import_module
for name in {MATHEMATICS.split()}: import_module("mice." + name)
print("mathematics:", *set({heavy + tools}) & set(sys.modules))
for name in {library}: import_module("mice." + name)
print("library:", *set({tools}) & set(sys.modules))
"""
    assert run(sys.executable, "-c", program) == "mathematics:\nlibrary:\n"


def sidebar() -> dict[str, list[str]]:
    "Section of the site's sidebar -> its pages, in order; '' for the pages above the first section."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    found = {"": []}
    for item in site["website"]["sidebar"]["contents"]:
        if isinstance(item, str):
            found[""].append(item)
        else:
            found[item["section"]] = [page for page in item["contents"] if isinstance(page, str)]
    return found


def test_the_sidebar_names_every_notebook():
    pages_of = sidebar()
    named = Counter(page for pages in pages_of.values() for page in pages if page.endswith(".ipynb"))
    assert named == Counter(map(in_site, notebooks())), "the sidebar of _quarto.yml and the notebooks differ"
    assert list(pages_of) == ["", *SECTIONS, "Reference"]
    link = NBS / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == ROOT / "_quarto.yml", "nbs/_quarto.yml must be a link"


@pytest.mark.parametrize("section, folder", SECTIONS.items())
def test_the_sidebar_follows_the_numbers(section, folder):
    "A section holds one folder; its numbers rise by one from page to page, beginning with 00 or 01."
    listed = sidebar()[section]
    assert {Path(page).parent.as_posix() for page in listed} == {folder}
    numbers = [int(match[1]) for match in (re.match(r"(\d\d)_", Path(page).name) for page in listed) if match]
    first = numbers[0] if numbers else 0
    assert first in (0, 1) and numbers == list(range(first, first + len(numbers)))


def test_only_sources_under_nbs():
    "Everything under nbs/ is copied to the site."
    files = (path.relative_to(NBS) for path in NBS.rglob("*") if path.is_file())
    visible = [path for path in files if not any(part[0] in "._" for part in path.parts[:-1])]
    allowed = r"(.+\.(ipynb|ya?ml|md|css|bib|png|svg)|\.gitignore|_quarto\.yml|nbdev\.yml)"
    assert not [path for path in visible if not re.fullmatch(allowed, path.name)]


def test_readme_is_the_index():
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == readme.markdown(), "README.md is older than nbs/index.ipynb: run `make readme`"


def test_the_parameters_cell_is_the_config():
    cell = parameters.cell_of(read(parameters.NOTEBOOK))
    assert cell.source == parameters.parameters(), "the cell is older than Config: run `make parameters`"


def test_ruff_finds_nothing():
    options = ["--no-cache", "--quiet", "--output-format=concise"]
    run(BIN / "ruff", "check", *options, "mice", "tests", "tools", "setup.py")


def test_there_is_no_pyproject():
    assert not (ROOT / "pyproject.toml").exists(), "nbdev would rewrite it; settings.ini says everything"


def test_lock_is_exact_and_complete():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and line[0] != "#"]
    inexact = [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.+!]+", pin)]
    assert not inexact, "exact versions: no index, path or range"
    locked = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    foreign = [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))]
    assert not foreign, "torch pins these, on the platforms that have them"
    for kind in ("requirements", "reproduce_requirements", "dev_requirements"):
        for wanted in map(Requirement, settings()[kind].split()):
            version = locked.get(canonicalize_name(wanted.name))
            known = version and wanted.specifier.contains(version)
            assert known, f"{kind} wants {wanted}, locked is {version}"
