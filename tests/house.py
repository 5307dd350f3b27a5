"""Where things are: shared by the tests and by readme.py."""

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent


def settings() -> dict:
    "The entries of settings.ini, as text."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def notebooks() -> list[Path]:
    "Every notebook of the project; names that start with _ or . are drafts and backups."
    found = (path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    return sorted(NBS / path for path in found if not any(part[0] in "._" for part in path.parts))


def in_site(path: Path) -> str:
    "The name of a notebook as the site and the test report know it, such as reproduction/digits.ipynb."
    return path.relative_to(NBS).as_posix()


@cache
def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def directives(cell: NotebookNode) -> list[str]:
    "The `#|` lines of a code cell: '#| export' gives 'export'."
    return re.findall(r"^#\|\s*(.+?)\s*$", cell.source, flags=re.M) if cell.cell_type == "code" else []


def exported(cell: NotebookNode) -> bool:
    return any(line.split()[0] in ("export", "exports", "exporti") for line in directives(cell))


def copy_sources(to: Path) -> Path:
    "What nbdev and the wheel are made from, without what running them leaves behind."
    to.mkdir()
    left = shutil.ignore_patterns("__pycache__", ".*", "_proc", "kernel-ipc*")
    for name in "LICENSE README.md _quarto.yml settings.ini setup.py".split():
        shutil.copy2(ROOT / name, to)
    for name in "mice nbs tests".split():
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=left)
    return to


def modules() -> list[str]:
    "The modules of the library by name; nbdev's own index and the version file are not among them."
    return sorted(path.stem for path in (ROOT / "mice").glob("*.py") if path.stem not in ("__init__", "_modidx"))


def run(*command, cwd: Path = ROOT, **kwargs) -> str:
    "Standard output of a command; its whole output is shown if it fails."
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))} exited {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def sets(**values) -> list[str]:
    "Parameters as options of `mice reproduce`."
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def run_process(*words, timeout=600) -> subprocess.CompletedProcess:
    "As a user would; a kernel that knew of pytest would not catch what is written past Python."
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def mice(*words) -> subprocess.CompletedProcess:
    return run_process(BIN / "mice", *words)
