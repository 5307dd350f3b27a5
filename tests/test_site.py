"""The site without Quarto: formulas, links, anchors and callouts of the pages as `make docs` prepares them."""

import ast
import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pages as site_pages
import pypandoc
import pytest
import yaml
from house import BIN, NBS, ROOT, copy_sources, in_site, notebooks, run, settings

MAKE = shutil.which("make") or "make"
QUARTO = """#!/bin/sh
echo "$@" > called; mkdir _docs; echo "a stand-in for Quarto was here" > _docs/index.html
"""
# What pandoc forgives and KaTeX or JupyterLab does not.
FOREIGN = re.compile(
    r"\\(newcommand|renewcommand|def|label|ref|eqref|tag|nonumber|mbox)\b"
    r"|\\begin\{(align|equation|eqnarray|gather|multline)\*?\}"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    "What Quarto would get of `make docs`: docstrings shown, hidden cells gone, names linked, pages of modules and equations added."
    folder = tmp_path_factory.mktemp("site")
    copy, quarto = copy_sources(folder / "mice"), folder / "bin" / "quarto"
    shutil.copy2(ROOT / "Makefile", copy)
    quarto.parent.mkdir()
    quarto.write_text(QUARTO)
    quarto.chmod(0o755)
    env = os.environ | dict(PATH=f"{quarto.parent}{os.pathsep}{os.environ['PATH']}")
    run(MAKE, "-o", ".venv/.ready", f"BIN={BIN}", "docs", cwd=copy, env=env)
    assert (copy / "_proc" / "called").read_text() == "render --no-cache\n"
    assert "stand-in" in (copy / "_docs" / "index.html").read_text()
    return copy / "_proc"


def test_without_quarto_one_line_says_where_to_get_it(tmp_path):
    (tmp_path / "sh").symlink_to("/bin/sh")
    done = subprocess.run([MAKE, "-o", ".venv/.ready", "docs"], cwd=ROOT, env=dict(PATH=str(tmp_path)), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "https://quarto.org" in done.stderr.splitlines()[0]


def cells(path: Path) -> list[dict]:
    "Of a prepared notebook, which nbdev leaves outside the strict format of notebooks."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


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
    pandoc(tree, "--from=json", "--to=html", "--mathml")
    foreign = [c[1] for t, c in nodes if t == "Math" and FOREIGN.search(c[1])]
    assert not foreign, f"KaTeX or JupyterLab cannot read {foreign}"
    stray = [c for t, c in nodes if t == "Str" and ("$" in c or ":::" in c)]
    assert not stray, f"a formula or a callout that is none: {stray}"


def anchors(text: str) -> set[str]:
    named = ("Header", "Div", "Span", "CodeBlock")
    attributes = [c[1] if t == "Header" else c[0] for t, c in parsed(text)[1] if t in named]
    return {identifier for identifier, *_ in attributes if identifier}


def targets(text: str) -> list[str]:
    return [unquote(c[-1][0]) for t, c in parsed(text)[1] if t in ("Link", "Image")]


def broken_links(text: str, folders: list[Path], anchors_of) -> list[str]:
    "Relative links to nowhere, seen from any of the folders; `anchors_of` gives the anchors of a page, or of this text for None."
    found = []
    for target in targets(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = next((f for f in ((folder / name).resolve() for folder in folders) if f.exists()), None)
        if name and file is None:
            found.append(target)
        elif anchor and (not name or file.suffix in (".ipynb", ".qmd")) and anchor not in anchors_of(file if name else None):
            found.append(target)
    return found


@pytest.mark.parametrize("path", notebooks(), ids=in_site)
def test_formulas_and_callouts(path, pages):
    check_formulas(markdown(pages / in_site(path)))


def check_links(text: str, pages: Path, folder: str) -> None:
    "`folder` is where the page lies in the site; a file that is no page, such as a row of the ledger, is looked for in the project."
    anchors_of = lambda file: anchors(text if file is None else markdown(file))
    found = broken_links(text, [pages / folder, NBS / folder], anchors_of)
    assert not found, f"links to nowhere: {found}"


@pytest.mark.parametrize("path", notebooks(), ids=in_site)
def test_links(path, pages):
    text = markdown(pages / in_site(path))
    check_links(text, pages, Path(in_site(path)).parent)
    home = "{doc_host}{doc_baseurl}/".format(**settings())  # nbdev links names in backticks to pages there
    openings = ["".join(cells(page)[0]["source"]) for page in pages.rglob("*.ipynb")]
    built = re.findall(r"^output-file: (\S+)", "\n".join(openings), flags=re.M)
    found = [t for t in targets(text) if t.startswith(home) and t.removeprefix(home).split("#")[0] not in built]
    assert not found, f"links to nowhere: {found}"


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    anchors_of = lambda file: anchors(text if file is None else markdown(file))
    assert not broken_links(text, [ROOT], anchors_of)


def test_generated_pages(pages):
    "Every public name of every module has a place, and every link of these pages leads somewhere."
    for page in (pages / "equations.qmd", *sorted((pages / "api").iterdir())):
        check_formulas(markdown(page))
        check_links(markdown(page), pages, page.parent.relative_to(pages))
    for module in site_pages.documented():
        tree = ast.parse(site_pages.text_of(module))
        (names,) = (ast.literal_eval(s.value) for s in tree.body if isinstance(s, ast.Assign) and getattr(s.targets[0], "id", "") == "__all__")
        lost = set(names) - anchors(markdown(pages / "api" / f"{module}.qmd"))
        assert not lost, f"names of {module} without a place on its page: {lost}"


def test_equations_lead_to_functions_and_back(pages):
    text, linked = markdown(pages / "equations.qmd"), "\n".join(map(markdown, pages.rglob("*.ipynb")))
    for number, function in {4: "gating.qmd#log_gate", 8: "estep.qmd#log_posterior", 11: "elbo.qmd#mice_objective", 13: "mstep.qmd#PrototypeSum"}.items():
        module, name = function.split(".qmd#")
        (section,) = re.findall(rf"^## Eq. \({number}\) .*?(?=^## |\Z)", text, flags=re.M | re.S)
        assert "$$" in section and f"api/{function}" in section and re.search(r"\]\(0\d_\w+\.ipynb#", section), section
        assert f"equations.qmd#equation-{number})" in markdown(pages / "api" / f"{module}.qmd")
    assert linked.count("(equations.qmd#equation-13)") > 5, "the notebooks' prose leads to the equations"


def test_the_paths_of_the_sidebar_are_on_the_landing_page(pages):
    contents = yaml.safe_load((pages / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    paths = {part["section"]: part["contents"] for part in contents if isinstance(part, dict)}
    assert list(paths) == ["Follow the paper", "Reproduce", "Use it on your images", "Reference"]
    landing = markdown(pages / "index.ipynb")
    missing = [page for name, path in paths.items() if name != "Reference" for page in path if page not in targets(landing)]
    assert not missing, f"run nbs/index.ipynb again: it does not link {missing}"
    written = [page for page in paths["Reference"] if isinstance(page, str)]
    assert all((pages / page).is_file() for page in written) and list(pages.glob(paths["Reference"][-1]["contents"]))


def test_these_checks_can_fail():
    check_formulas("# One\n\n$\\log \\frac{a}{b}$\n\n:::{.callout-note}\n## Two\nText\n:::")
    callouts = (":::{.callout-note}\nopen", "closed\n\n:::")
    for bad in (r"$\frac{a$", r"$\nosuchcommand{x}$", r"$$\begin{align}a\end{align}$$", "half a $ formula", *callouts):
        with pytest.raises(AssertionError):
            check_formulas(bad)
    text = "## A heading\n\n[a](#a-heading) [b](#nowhere) [c](00_notation.ipynb) [d](missing.ipynb) "
    text += "![e](images/none.png) [f](https://mice.example)"
    assert broken_links(text, [NBS], lambda file: anchors(text)) == ["#nowhere", "missing.ipynb", "images/none.png"]
