"""The pages that Quarto renders: `make docs` writes them to _proc/.

They are the notebooks as nbdev prepares them, a page for each module with its signatures as they are written,
and the equations of the paper with the functions that compute them.
"""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from house import ROOT, exported, exports_to, in_site, module_path, modules, notebooks, read

EQUATION = re.compile(r"\bEqs?\. \((\d+)\)")
DISPLAYED = re.compile(r"\$\$.*?\$\$", flags=re.S)
CONSTANT = ast.Assign, ast.AnnAssign
# Formulas, code, links and headings: no place for a link.
NO_LINK = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`|\[[^]\n]*\]\([^)\n]*\)|^#.*$", flags=re.S | re.M)
ABOUT_EQUATIONS = (
    "The numbers follow the order in which the authors present the equations; of the paper's own numbers "
    "only (13) is confirmed, by the official code. Each formula is shown as in the notebook that derives it; "
    "below it, where it is explained, and which functions compute it."
)


class Section(NamedTuple):
    "A heading of a notebook, and what stands below it."

    page: str  # such as 'paper/03_gate.ipynb'
    title: str
    anchor: str  # with its #; empty for what stands above the first heading
    prose: list  # markdown cells
    names: list  # exported

    def link(self, up: str) -> str:
        return f"[{self.title}]({up}{self.page}{self.anchor})"


def anchor(title: str) -> str:
    "The anchor that pandoc gives to a heading."
    words = re.sub(r"[^\w\s.-]", "", title.replace("$", "").replace("\\", "").lower())
    return "#" + re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words.strip()))


def sections() -> list[Section]:
    "All sections of all notebooks, in order."
    found = []
    for path in notebooks():
        title = read(path).cells[0].source.splitlines()[0].removeprefix("# ")
        found.append(Section(in_site(path), title, "", [], []))
        for cell in read(path).cells:
            if cell.cell_type == "markdown":
                for part in re.split(r"^(?=## )", cell.source, flags=re.M):
                    if part.startswith("## ") and "callout" not in cell.source.split("## ")[0]:
                        heading = part.splitlines()[0].removeprefix("## ")
                        found.append(Section(in_site(path), heading, anchor(heading), [], []))
                    found[-1].prose.append(part)
            elif exported(cell):
                found[-1].names.extend(public(ast.parse(cell.source)))
    return found


def public(tree: ast.Module) -> dict[str, ast.AST]:
    "The public names a module or a cell defines, with their definitions."
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, CONSTANT):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= dict.fromkeys(names, node)
    return {name: node for name, node in found.items() if name[0] != "_"}


def text_of(name: str) -> str:
    "The source of a module."
    return module_path(name).read_text(encoding="utf-8")


def docstring(node: ast.AST) -> str:
    "The docstring of a definition; empty if it has none, as constants."
    return "" if isinstance(node, CONSTANT) else ast.get_docstring(node) or ""


def head(node: ast.AST, lines: list[str]) -> list[str]:
    "The lines of a definition up to its body, decorators and comments included."
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return lines[first - 1 : max(node.body[0].lineno - 1, node.lineno)]


def signature(node: ast.AST, lines: list[str]) -> str:
    "What a user of a function or a class needs to see: parameters, fields and methods, as they are written."
    if isinstance(node, CONSTANT):
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])
    shown = head(node, lines)
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(part, ast.AnnAssign):
            shown += lines[part.lineno - 1 : part.end_lineno]
        elif isinstance(part, ast.FunctionDef) and (part.name == "__init__" or part.name[0] != "_"):
            shown += ["", *head(part, lines)]
            if ast.get_docstring(part):
                shown.append(f'        "{ast.get_docstring(part)}"')
    return "\n".join(shown).rstrip()


def with_links(text: str, up: str = "") -> str:
    "Link each Eq. (n) of a text to the page of equations, except in formulas, code, links and headings."

    def link(part):
        return EQUATION.sub(lambda match: f"[{match[0]}]({up}equations.qmd#equation-{match[1]})", part)

    ends = [0, *(end for found in NO_LINK.finditer(text) for end in found.span()), len(text)]
    parts = [text[start:end] for start, end in pairwise(ends)]
    return "".join(part if i % 2 else link(part) for i, part in enumerate(parts))


def api_page(module: str, home: list[Section]) -> str:
    "The page of a module; `home` are the sections of its notebook."
    text = text_of(module)
    tree, lines = ast.parse(text), text.splitlines()
    explained = f"Explained in [{home[0].title}](../{home[0].page})."
    parts = [f"---\ntitle: mice.{module}\n---", ast.get_docstring(tree), explained]
    for name, node in public(tree).items():
        shown, about = signature(node, lines), docstring(node)
        origin = next((section.link("../") for section in home if name in section.names), "")
        cited = [with_links(match[0], "../") for match in EQUATION.finditer(shown + about)]
        parts += [f"## `{name}` {{#{name}}}", " · ".join(filter(None, [origin, *dict.fromkeys(cited)]))]
        parts += [f"```python\n{shown}\n```", with_links(about, "../")]
    return "\n\n".join(filter(None, parts)) + "\n"


def formula(prose: list[str], number: str) -> str | None:
    "The displayed formula nearest to Eq. (number): after it in its cell, else before it, else the first."
    before = ""
    for cell in prose:
        for found in EQUATION.finditer(cell):
            if found[1] == number:
                after = DISPLAYED.search(cell[found.end() :])
                earlier = DISPLAYED.findall(before + cell[: found.start()])
                if after or earlier:
                    return after[0] if after else earlier[-1]
        before += cell
    return next(iter(DISPLAYED.findall(before)), None)


def functions_by_equation() -> dict[str, list[tuple[str, str]]]:
    "Number of an equation -> (module, name) of what says that it computes it."
    computed = {}
    for module in modules():
        lines = text_of(module).splitlines()
        for name, node in public(ast.parse(text_of(module))).items():
            if not isinstance(node, CONSTANT):
                for number in dict.fromkeys(EQUATION.findall(signature(node, lines) + docstring(node))):
                    computed.setdefault(number, []).append((module, name))
    return computed


def equations_page(all_sections: list[Section]) -> str:
    "Each numbered equation: its formula, the sections that explain it, the functions that compute it."
    computed, explained = functions_by_equation(), {}
    for section in all_sections:
        names = set(section.names)
        called = {number for number, uses in computed.items() if names & {name for _, name in uses}}
        for number in {*EQUATION.findall("\n".join(section.prose)), *called}:
            explained.setdefault(number, []).append(section)
    parts = ["---\ntitle: The equations\n---", ABOUT_EQUATIONS]
    for number in sorted(explained, key=int):
        places = [section for section in explained[number] if section.page != "index.ipynb"]
        shown = (formula(place.prose, number) for place in places)
        parts += [f"## Eq. ({number}) {{#equation-{number}}}", next(filter(None, shown), "")]
        parts.append("Explained in " + ", ".join(section.link("") for section in places) + ".")
        if number in computed:
            links = [f"[`{module}.{name}`](api/{module}.qmd#{name})" for module, name in computed[number]]
            parts.append(f"Computed by {', '.join(links)}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def link_equations(page: Path) -> None:
    "Lead each Eq. (n) of a prepared notebook to the page of equations."
    notebook = json.loads(page.read_text(encoding="utf-8"))
    up = "../" * (len(page.relative_to(ROOT / "_proc").parts) - 1)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), up)
    page.write_text(json.dumps(notebook), encoding="utf-8")


def write(to: Path = ROOT / "_proc") -> None:
    "Write the pages of the modules and of the equations."
    everything = sections()
    homes = {name: in_site(path) for path in notebooks() for name in exports_to(path)}
    (to / "api").mkdir(parents=True, exist_ok=True)
    for module in modules():
        page = api_page(module, [section for section in everything if section.page == homes[module]])
        (to / "api" / f"{module}.qmd").write_text(page, encoding="utf-8")
    (to / "equations.qmd").write_text(equations_page(everything), encoding="utf-8")


def main() -> None:
    "Write all pages that Quarto renders."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)
    for page in (ROOT / "_proc").rglob("*.ipynb"):
        link_equations(page)
    write()


if __name__ == "__main__":
    main()
