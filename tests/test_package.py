"""The wheel: what is in it, and that what it declares is enough to import it."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from house import copy_sources, modules, run, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel of the project, built from a copy of its sources."
    folder = tmp_path_factory.mktemp("wheel")
    copy = copy_sources(folder / "mice")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, copy)
    (built,) = folder.glob("*.whl")
    return built


def metadata(wheel: Path) -> importlib.metadata.PackageMetadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        folder = zipfile.Path(archive, f"{PurePosixPath(name).parent}/")
        return importlib.metadata.PathDistribution(folder).metadata


def closure(requirements: list[str], *extras: str) -> dict[str, importlib.metadata.Distribution]:
    "The installed distributions that these requirements bring, directly and indirectly."
    todo, found, seen = [(r, e) for r in requirements for e in ("", *extras)], {}, set()
    while todo:
        requirement, extra = todo.pop()
        requirement = Requirement(requirement)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, importlib.metadata.distribution(name))
        for wanted in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, wanted))
            todo += [(r, wanted) for r in found[name].requires or []]
    return found


def empty_environment(folder: Path, wheel: Path, distributions) -> Path:
    "A Python that sees the standard library, these distributions and the wheel, and nothing else."
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = {path.resolve() for path in folder.glob("[Ll]ib*/**/site-packages")}
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists() and link.suffix != ".pth":
                link.symlink_to(distribution.locate_file(top))
    zipfile.ZipFile(wheel).extractall(site)
    return next(p for p in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if p.exists())


def imported(python: Path, names: list[str]) -> subprocess.CompletedProcess:
    program = f"import {', '.join('mice.' + name for name in names)}; print(mice.__file__)"
    return subprocess.run([python, "-I", "-c", program], cwd=python.parent, capture_output=True, text=True, timeout=300)


def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    code = sorted(n for n in names if ".dist-info/" not in n)
    assert code == sorted(f"mice/{m}.py" for m in [*modules(), "__init__", "_modidx"])
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert re.search(r"\[console_scripts\]\nmice ?= ?mice\.cli:main\n", entry_points)
    meta, cfg = metadata(wheel), settings()
    assert (meta["Name"], meta["Version"], meta["License-Expression"]) == ("mice", cfg["version"], cfg["license"])
    assert meta["Requires-Python"] == f">={cfg['min_python']}"
    assert not [line for line in meta.get_all("Requires-Dist") if "://" in line or "file:" in line]


@pytest.mark.parametrize("extras", [(), ("reproduce",)], ids=["core", "reproduce"])
def test_imports_with_what_it_declares(wheel, tmp_path, extras):
    names = [name for name in modules() if extras or name not in ("figures", "results")]
    required = closure(metadata(wheel).get_all("Requires-Dist"), *extras)
    python = empty_environment(tmp_path / "env", wheel, required.values())
    done = imported(python, names)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), "the wheel's own files must be the ones imported"


def test_the_command_exists():
    "What the console script `mice = mice.cli:main` promises."
    run(sys.executable, "-c", "from mice.cli import main; assert callable(main)")


def test_an_undeclared_import_fails(wheel, tmp_path):
    required = closure(metadata(wheel).get_all("Requires-Dist"))
    python = empty_environment(tmp_path / "env", wheel, required.values())
    core = next((tmp_path / "env").glob("[Ll]ib*/**/site-packages/mice/core.py"))
    core.write_text(core.read_text(encoding="utf-8") + "\nimport fastcore\n", encoding="utf-8")
    assert "No module named 'fastcore'" in imported(python, ["core"]).stderr
