"""The site without Quarto: formulas, links, anchors and callouts of the pages that `make docs` prepares."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pages
import pypandoc
import pytest
import yaml
from house import NBS, ROOT, copy_sources, in_site, modules, notebooks, run, settings

# What pandoc forgives and KaTeX or JupyterLab does not.
FOREIGN = re.compile(
    r"\\(newcommand|renewcommand|def|label|ref|eqref|tag|nonumber|mbox)\b"
    r"|\\begin\{(align|equation|eqnarray|gather|multline)\*?\}"
)
EQUATIONS = {  # number -> the notebook that derives it, and what computes it
    4: ("paper/03_gate.ipynb", "gating.qmd#log_gate"),
    8: ("paper/05_posterior.ipynb", "estep.qmd#log_posterior"),
    11: ("paper/06_objective.ipynb", "elbo.qmd#mice_objective"),
    13: ("paper/08_prototypes.ipynb", "mstep.qmd#PrototypeSum"),
}


def prepare(folder: Path) -> None:
    "The first half of `make docs`, in a copy of the project."
    copy = copy_sources(folder / "mice")
    run(sys.executable, "tools/pages.py", cwd=copy, env=os.environ | dict(PYTHONPATH=str(copy)))


@pytest.fixture(scope="session")
def site(made_once) -> Path:
    "What Quarto gets: hidden cells gone, names linked, pages of modules and equations added."
    return made_once("site", prepare) / "mice" / "_proc"


def test_without_quarto_one_line_says_where_to_get_it(tmp_path):
    (tmp_path / "sh").symlink_to("/bin/sh")
    command = [shutil.which("make") or "make", "-o", ".venv/.ready", "docs"]
    env = dict(PATH=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "https://quarto.org" in done.stderr.splitlines()[0]


def cells(path: Path) -> list[dict]:
    "Of a prepared notebook, which nbdev leaves outside the strict format of notebooks."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@cache
def markdown(path: Path) -> str:
    "The prose of a prepared page, and what its cells show as markdown, such as docstrings."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    parts = []
    for cell in cells(path):
        parts += [cell["source"]] if cell["cell_type"] == "markdown" else []
        parts += [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
    return "\n\n".join(map("".join, parts))  # a text may be a list of lines


def pandoc(text: str, *options: str) -> str:
    "Pandoc's output; any warning (a formula it cannot read, an unclosed callout) is an error."
    command = [pypandoc.get_pandoc_path(), "--fail-if-warnings", *options]
    done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def parsed(text: str) -> tuple[str, list]:
    "Pandoc's tree of a page, and every (type, content) of it."

    def walk(node):
        if isinstance(node, dict) and "t" in node:
            yield node["t"], node.get("c")
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            yield from walk(child)

    tree = pandoc(text, "--from=markdown", "--to=json")
    return tree, list(walk(json.loads(tree)["blocks"]))


def check_formulas(text: str) -> None:
    tree, nodes = parsed(text)
    formulas = [c[1] for t, c in nodes if t == "Math"]
    if formulas:
        pandoc(tree, "--from=json", "--to=html", "--mathml")
    foreign = [formula for formula in formulas if FOREIGN.search(formula)]
    assert not foreign, f"KaTeX or JupyterLab cannot read {foreign}"
    stray = [c for t, c in nodes if t == "Str" and ("$" in c or ":::" in c)]
    assert not stray, f"a formula or a callout that is none: {stray}"


def anchors(text: str) -> set[str]:
    named = ("Header", "Div", "Span", "CodeBlock")
    attributes = [c[1] if t == "Header" else c[0] for t, c in parsed(text)[1] if t in named]
    return {identifier for identifier, *_ in attributes if identifier}


def targets(text: str) -> list[str]:
    return [unquote(c[-1][0]) for t, c in parsed(text)[1] if t in ("Link", "Image")]


def anchors_of(text: str) -> Callable[[Path | None], set[str]]:
    "The anchors of a file, or of this text for None."
    return lambda file: anchors(text if file is None else markdown(file))


def broken_links(text: str, folders: list[Path]) -> list[str]:
    "Relative links to nowhere, seen from any of the folders."
    found, anchors_at = [], anchors_of(text)
    for target in targets(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        places = [(folder / name).resolve() for folder in folders] if name else []
        file = next((place for place in places if place.exists()), None)
        if name and file is None:
            found.append(target)
        elif anchor and (not name or file.suffix in (".ipynb", ".qmd")) and anchor not in anchors_at(file):
            found.append(target)
    return found


def check_links(text: str, site: Path, folder: str | Path) -> None:
    "`folder` is where the page lies in the site; files such as rows of the ledger are found in the project."
    found = broken_links(text, [site / folder, NBS / folder])
    assert not found, f"links to nowhere: {found}"


@cache
def addresses(site: Path) -> set[str]:
    "Where the pages of notebooks will lie, such as paper/gate.html; nbdev notes it in their first cells."
    found = set()
    for page in site.rglob("*.ipynb"):
        name = re.search(r"^output-file: (\S+)", "".join(cells(page)[0]["source"]), flags=re.M)
        if name:
            found.add((page.parent / name[1]).relative_to(site).as_posix())
    return found


@pytest.mark.parametrize("path", notebooks(), ids=in_site)
def test_formulas_callouts_and_links(path, site):
    text = markdown(site / in_site(path))
    check_formulas(text)
    check_links(text, site, Path(in_site(path)).parent)
    home = "{doc_host}{doc_baseurl}/".format(**settings())  # nbdev links names in backticks to pages there
    linked = [target.removeprefix(home) for target in targets(text) if target.startswith(home)]
    found = [target for target in linked if target.split("#")[0] not in addresses(site)]
    assert not found, f"links to nowhere: {found}"


def test_links_of_the_readme():
    assert not broken_links((ROOT / "README.md").read_text(encoding="utf-8"), [ROOT])


def public_names(module: str) -> set[str]:
    "The `__all__` of a module, without importing it."
    for node in ast.parse(pages.text_of(module)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def test_generated_pages(site):
    "Every public name of every module has a place, and every link of these pages leads somewhere."
    for page in (site / "equations.qmd", *sorted((site / "api").iterdir())):
        check_formulas(markdown(page))
        check_links(markdown(page), site, page.parent.relative_to(site))
    for module in modules():
        lost = public_names(module) - anchors(markdown(site / "api" / f"{module}.qmd"))
        assert not lost, f"names of {module} without a place on its page: {lost}"


def test_equations_lead_to_functions_and_back(site):
    text = markdown(site / "equations.qmd")
    for number, (notebook, function) in EQUATIONS.items():
        (section,) = re.findall(rf"^## Eq. \({number}\) .*?(?=^## |\Z)", text, flags=re.M | re.S)
        assert "$$" in section and f"api/{function}" in section and f"]({notebook}#" in section, section
        page, _ = function.split("#")
        assert f"equations.qmd#equation-{number})" in markdown(site / "api" / page)
    prose = "\n".join(map(markdown, site.rglob("*.ipynb")))
    assert prose.count("equations.qmd#equation-13)") > 5, "the notebooks' prose leads to the equations"


def test_the_generated_pages_are_in_the_sidebar(site):
    sidebar = yaml.safe_load((site / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    page, api = sidebar["contents"][-1]["contents"]
    assert (site / page).is_file() and len(list(site.glob(api["contents"]))) == len(modules())
