"""What Quarto renders: `python tests/pages.py` writes _proc/, the notebooks as nbdev prepares them, a page for each
module with its signatures as they are written, and the equations of the paper with the functions that compute them."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

from house import ROOT, directives, exported, in_site, modules, notebooks, read

EQUATION = re.compile(r"\bEqs?\. \((\d+)\)")
DISPLAYED = re.compile(r"\$\$.*?\$\$", flags=re.S)
CONSTANT = ast.Assign, ast.AnnAssign
OTHER = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`|\[[^]\n]*\]\([^)\n]*\)|^#.*$", flags=re.S | re.M)  # no place for a link


class Section(NamedTuple):
    "A heading of a notebook, and what stands below it."
    page: str  # such as '01_gating.ipynb'
    title: str
    anchor: str  # with its #; empty for what stands above the first heading
    prose: list  # markdown cells
    names: list  # exported

    def link(self, up: str) -> str:
        return f"[{self.title}]({up}{self.page}{self.anchor})"


def anchor(title: str) -> str:
    "As pandoc makes it of a heading."
    words = re.sub(r"[^\w\s.-]", "", title.replace("$", "").replace("\\", "").lower())
    return "#" + re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words.strip()))


def sections() -> list[Section]:
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
    "The names a module or a cell defines, with their definitions; what starts with _ is nobody's business."
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, CONSTANT):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name: node for name, node in found.items() if name[0] != "_"}


def documented() -> list[str]:
    return [name for name in modules() if name[0] != "_"]


def text_of(name: str) -> str:
    return (ROOT / "mice" / f"{name}.py").read_text(encoding="utf-8")


def head(node: ast.AST, lines: list[str]) -> list[str]:
    "The lines of a definition up to its body, decorators and comments included."
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return lines[first - 1 : max(node.body[0].lineno - 1, node.lineno)]


def signature(node: ast.AST, lines: list[str]) -> str:
    "What a user of a function or a class needs of its text: parameters, fields and methods, as they are written."
    if isinstance(node, CONSTANT):
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])
    shown = head(node, lines)
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(part, ast.AnnAssign):
            shown += lines[part.lineno - 1 : part.end_lineno]
        elif isinstance(part, ast.FunctionDef) and (part.name == "__init__" or part.name[0] != "_"):
            shown += ["", *head(part, lines)]
            shown += [f'        "{ast.get_docstring(part)}"'] * bool(ast.get_docstring(part))
    return "\n".join(shown).rstrip()


def with_links(text: str, up: str = "") -> str:
    "Each Eq. (n) of a text leads to its place on the page of equations; formulas, code, links and headings stay as they are."
    link = lambda part: EQUATION.sub(lambda m: f"[{m[0]}]({up}equations.qmd#equation-{m[1]})", part)
    ends = [0, *(end for found in OTHER.finditer(text) for end in found.span()), len(text)]
    parts = [text[start:end] for start, end in zip(ends, ends[1:])]
    return "".join(part if i % 2 else link(part) for i, part in enumerate(parts))


def api_page(module: str, home: list[Section]) -> str:
    "The page of a module; `home` are the sections of its notebook."
    text = text_of(module)
    tree, lines = ast.parse(text), text.splitlines()
    parts = [f"---\ntitle: mice.{module}\n---", ast.get_docstring(tree), f"Explained in [{home[0].title}](../{home[0].page})."]
    for name, node in public(tree).items():
        said = "" if isinstance(node, CONSTANT) else ast.get_docstring(node) or ""
        origin = next((s.link("../") for s in home if name in s.names), "")
        cited = " · ".join(dict.fromkeys(with_links(m[0], "../") for m in EQUATION.finditer(signature(node, lines) + said)))
        parts += [f"## `{name}` {{#{name}}}", " · ".join(filter(None, [origin, cited]))]
        parts += [f"```python\n{signature(node, lines)}\n```", with_links(said, "../")]
    return "\n\n".join(filter(None, parts)) + "\n"


def formula(prose: list[str], number: str) -> str | None:
    "The displayed formula that stands nearest to the first Eq. (number): after it in its cell, or else before it."
    before = ""
    for cell in prose:
        for found in EQUATION.finditer(cell):
            if found[1] == number:
                after, earlier = DISPLAYED.search(cell[found.end() :]), DISPLAYED.findall(before + cell[: found.start()])
                return after[0] if after else earlier[-1] if earlier else None
        before += cell
    return None


def equations_page(all_sections: list[Section]) -> str:
    "Each numbered equation: its formula, the sections that speak of it, the functions that say they compute it."
    computed, explained = {}, {}
    for module in documented():
        lines = text_of(module).splitlines()
        for name, node in public(ast.parse(text_of(module))).items():
            said = "" if isinstance(node, CONSTANT) else signature(node, lines) + (ast.get_docstring(node) or "")
            for number in dict.fromkeys(EQUATION.findall(said)):
                computed.setdefault(number, []).append((module, name))
    for section in all_sections:
        called = {number for number, names in computed.items() if {name for _, name in names} & set(section.names)}
        for number in {*EQUATION.findall("\n".join(section.prose)), *called}:
            explained.setdefault(number, []).append(section)
    parts = ["---\ntitle: The equations\n---", "The numbers follow the order in which the authors present the equations; of the paper's own only (13) is confirmed, by the released code. Each formula stands as the notebook shows it that derives it; below it, where it is explained, and which functions compute it."]
    for number in sorted(explained, key=int):
        places = [s for s in explained[number] if s.page != "index.ipynb"]
        shown = (formula(s.prose, number) or next(iter(DISPLAYED.findall("".join(s.prose))), None) for s in places)
        functions = ", ".join(f"[`{module}.{name}`](api/{module}.qmd#{name})" for module, name in computed.get(number, []))
        parts += [f"## Eq. ({number}) {{#equation-{number}}}", next(filter(None, shown), ""), "Explained in " + ", ".join(s.link("") for s in places) + "."]
        parts += [f"Computed by {functions}."] * bool(functions)
    return "\n\n".join(filter(None, parts)) + "\n"


def link_equations(page: Path) -> None:
    "In a prepared notebook, whose JSON is nbdev's."
    notebook, up = json.loads(page.read_text(encoding="utf-8")), "../" * (len(page.relative_to(ROOT / "_proc").parts) - 1)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), up)
    page.write_text(json.dumps(notebook), encoding="utf-8")


def write(to: Path = ROOT / "_proc") -> None:
    "All generated pages."
    everything = sections()
    homes = {d.split()[1]: in_site(p) for p in notebooks() for c in read(p).cells for d in directives(c) if d.startswith("default_exp ")}
    (to / "api").mkdir(parents=True, exist_ok=True)
    for module in documented():
        page = api_page(module, [s for s in everything if s.page == homes[module]])
        (to / "api" / f"{module}.qmd").write_text(page, encoding="utf-8")
    (to / "equations.qmd").write_text(equations_page(everything), encoding="utf-8")


if __name__ == "__main__":
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)
    for page in (ROOT / "_proc").rglob("*.ipynb"):
        link_equations(page)
    write()
