"""The site without Quarto: formulas, links, anchors and callouts of the pages as nbdev prepares them."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pypandoc
import pytest
from house import NBS, ROOT, copy_sources, in_site, notebooks, run, settings

PROCESS = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)"
# What pandoc forgives and KaTeX or JupyterLab does not.
FOREIGN = re.compile(
    r"\\(newcommand|renewcommand|def|label|ref|eqref|tag|nonumber|mbox)\b"
    r"|\\begin\{(align|equation|eqnarray|gather|multline)\*?\}"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    "The notebooks as Quarto would get them: docstrings shown, hidden cells gone, names linked."
    copy = copy_sources(tmp_path_factory.mktemp("site") / "mice")
    run(sys.executable, "-c", PROCESS, cwd=copy)
    return copy / "_proc"


def cells(path: Path) -> list[dict]:
    "Of a prepared notebook, which nbdev leaves outside the strict format of notebooks."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def markdown(path: Path) -> str:
    "The prose of a prepared notebook, and what its cells show as markdown, such as docstrings."
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


def broken_links(text: str, folder: Path, anchors_of) -> list[str]:
    "Relative links to nowhere; `anchors_of` gives the anchors of a notebook, or of this text for None."
    found = []
    for target in targets(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (folder / name).resolve() if name else None
        if file and not file.exists():
            found.append(target)
        elif anchor and (file is None or file.suffix == ".ipynb") and anchor not in anchors_of(file):
            found.append(target)
    return found


@pytest.mark.parametrize("path", notebooks(), ids=in_site)
def test_formulas_and_callouts(path, pages):
    check_formulas(markdown(pages / in_site(path)))


@pytest.mark.parametrize("path", notebooks(), ids=in_site)
def test_links(path, pages):
    text = markdown(pages / in_site(path))
    anchors_of = lambda file: anchors(text if file is None else markdown(pages / in_site(file)))
    found = broken_links(text, path.parent, anchors_of)
    home = "{doc_host}{doc_baseurl}/".format(**settings())  # nbdev links names in backticks to pages there
    openings = ["".join(cells(page)[0]["source"]) for page in pages.rglob("*.ipynb")]
    built = re.findall(r"^output-file: (\S+)", "\n".join(openings), flags=re.M)
    found += [t for t in targets(text) if t.startswith(home) and t.removeprefix(home).split("#")[0] not in built]
    assert not found, f"links to nowhere: {found}"


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    anchors_of = lambda file: anchors(text if file is None else markdown(file))
    assert not broken_links(text, ROOT, anchors_of)


def test_these_checks_can_fail():
    check_formulas("# One\n\n$\\log \\frac{a}{b}$\n\n:::{.callout-note}\n## Two\nText\n:::")
    callouts = (":::{.callout-note}\nopen", "closed\n\n:::")
    for bad in (r"$\frac{a$", r"$\nosuchcommand{x}$", r"$$\begin{align}a\end{align}$$", "half a $ formula", *callouts):
        with pytest.raises(AssertionError):
            check_formulas(bad)
    text = "## A heading\n\n[a](#a-heading) [b](#nowhere) [c](00_notation.ipynb) [d](missing.ipynb) "
    text += "![e](images/none.png) [f](https://mice.example)"
    assert broken_links(text, NBS, lambda file: anchors(text)) == ["#nowhere", "missing.ipynb", "images/none.png"]
