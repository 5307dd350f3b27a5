"""Where things are, and how to run them: shared by the tests and by the other programs of tools/."""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
FOLDERS = ".ci .github mice nbs results tests tools".split()  # sources; all other folders are products
PRODUCTS = "__pycache__ .ipynb_checkpoints _proc nbdev.yml kernel-ipc* checkpoints notebooks".split()


def settings() -> dict:
    "The entries of settings.ini, as text."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def notebooks() -> list[Path]:
    "All notebooks of the project; names that start with _ or . are drafts and backups."
    found = (path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    return sorted(NBS / path for path in found if not any(part[0] in "._" for part in path.parts))


def in_site(path: Path) -> str:
    "The name of a notebook on the site and in test reports, such as paper/03_gate.ipynb."
    return path.relative_to(NBS).as_posix()


@cache
def read(path: Path) -> "NotebookNode":
    "A notebook, read once; do not change it."
    import nbformat  # takes seconds, and most tests read no notebook

    return nbformat.read(path, as_version=4)


def directives(cell: "NotebookNode") -> list[str]:
    "The `#|` lines of a code cell: '#| export' gives 'export'."
    return re.findall(r"^#\|\s*(.+?)\s*$", cell.source, flags=re.M) if cell.cell_type == "code" else []


def exported(cell: "NotebookNode") -> bool:
    "Whether nbdev writes this cell into a module."
    return any(line.split()[0] in ("export", "exports", "exporti") for line in directives(cell))


def exports_to(path: Path) -> list[str]:
    "The modules a notebook names in `#| default_exp`, such as ['training.loop']; at most one is right."
    lines = [line.split() for cell in read(path).cells for line in directives(cell)]
    return [words[1] for words in lines if words[0] == "default_exp"]


def modules() -> list[str]:
    "Dotted names of the modules made from notebooks, seen from `mice`: core, training.loop, ..."
    library = ROOT / "mice"
    paths = (path for path in library.rglob("*.py") if not path.stem.startswith("_"))
    return sorted(".".join(path.relative_to(library).with_suffix("").parts) for path in paths)


def module_path(name: str) -> Path:
    "The file of a module: 'training.loop' is mice/training/loop.py."
    return (ROOT / "mice" / Path(*name.split("."))).with_suffix(".py")


def copy_sources(to: Path) -> Path:
    "The project in another folder, without what running it leaves behind."
    to.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, to)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns(*PRODUCTS))
    return to


def run(*command, cwd: Path = ROOT, **kwargs) -> str:
    "Standard output of a command; if it fails, all of its output is shown."
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, f"{' '.join(words)} exited {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def sets(**values) -> list[str]:
    "Parameters as options of `mice reproduce`."
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def run_process(*words, timeout=600) -> subprocess.CompletedProcess:
    "Run a command as a user would: a kernel that knew of pytest would not catch what is written past Python."
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def mice(*words) -> subprocess.CompletedProcess:
    "Run the command `mice` of this environment."
    return run_process(BIN / "mice", *words)
