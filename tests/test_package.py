"""The wheel and the source archive: what is in them, and that a wheel works with what it declares and nothing else."""

import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tarfile
import typing
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from house import NBS, ROOT, copy_sources, modules, run, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OPTIONAL = {"figures": "reproduce", "results": "reproduce"}  # modules that need an extra to be imported
COMMAND = "nbdev fastcore IPython jupyterlab papermill nbclient matplotlib seaborn pandas tensorboard".split()


def build(kind: str, source: Path, to: Path) -> Path:
    "Without a network, and without another environment."
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", to, cwd=source)
    (built,) = to.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    "The source archive of the project, unpacked."
    folder = tmp_path_factory.mktemp("sdist")
    copy = copy_sources(folder / "mice")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else []
    for name in tracked:
        if (ROOT / name).is_file() and not (copy / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "MANIFEST.in").write_bytes((ROOT / "MANIFEST.in").read_bytes())
    with tarfile.open(build("sdist", copy, folder / "dist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    "The wheel of the project, built as a packager would: from its source archive."
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel") / "dist")


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


def empty_environment(folder: Path, wheel: Path, *extras: str) -> Path:
    "A Python that sees the standard library, what the wheel requires, and the wheel, installed by pip."
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = {path.resolve() for path in folder.glob("[Ll]ib*/**/site-packages")}
    for distribution in closure(metadata(wheel).get_all("Requires-Dist"), *extras).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists() and link.suffix != ".pth":
                link.symlink_to(distribution.locate_file(top))
    python = next(p for p in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if p.exists())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel)
    return python


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory) -> Path:
    "The Python of an environment with the wheel and its core requirements."
    return empty_environment(tmp_path_factory.mktemp("core") / "env", wheel)


def imported(python: Path, names: list[str]) -> subprocess.CompletedProcess:
    program = f"import {', '.join('mice.' + name for name in names)}; print(mice.__file__)"
    return subprocess.run([python, "-I", "-c", program], cwd=python.parent, capture_output=True, text=True, timeout=300)


def command(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python.parent / "mice", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_source_archive_is_complete(sdist):
    "It holds every file that git keeps, apart from git's own; and a wheel can be built from it."
    left_out = {".gitignore"}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else ["setup.py", "tests/house.py"]
    missing = [name for name in tracked if (ROOT / name).exists() and not (sdist / name).exists()]
    assert set(missing) <= left_out, "see MANIFEST.in"
    written = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert not [name for name in written if re.search(r"__pycache__|\.pyc$|checkpoints/|_proc/", name)]
    assert f"Version: {settings()['version']}\n" in (sdist / "PKG-INFO").read_text(encoding="utf-8")


def test_the_source_archive_can_be_tested(sdist):
    done = run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_house.py", "tests/test_site.py", cwd=sdist)
    assert "test_one_notebook_per_module" in done


def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mice").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    brought = {f"mice/reproduction/{p.name}" for p in (NBS / "reproduction").iterdir() if p.suffix == ".yaml" or p.name == "reproduce.ipynb"}
    assert {n for n in names if ".dist-info/" not in n} == files | brought and "mice/py.typed" in files and len(brought) > 20
    assert any(n.endswith("licenses/LICENSE") for n in names)
    meta, cfg = metadata(wheel), settings()
    assert f"[console_scripts]\n{cfg['console_scripts'].replace('=', ' = ')}\n" in entry_points
    assert (meta["Name"], meta["Version"], meta["License-Expression"]) == ("mice", cfg["version"], cfg["license"])
    assert meta["Requires-Python"] == f">={cfg['min_python']}"
    assert set(meta.get_all("Provides-Extra")) == {"reproduce", "tensorboard", "dev", "all"}
    assert not [line for line in meta.get_all("Requires-Dist") if "://" in line or "file:" in line]


def test_the_core_imports_with_what_it_declares(core):
    done = imported(core, [name for name in modules() if name not in OPTIONAL])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(core.parent.parent), "the wheel's own files must be the ones imported"
    program = f"import importlib.util as u; print([n for n in {COMMAND} if u.find_spec(n)])"
    assert run(core, "-I", "-c", program).strip() == "[]", "the core must not bring these"


def test_all_imports_with_the_extra(wheel, tmp_path):
    done = imported(empty_environment(tmp_path / "env", wheel, "reproduce"), modules())
    assert done.returncode == 0, done.stderr


def test_the_command_of_the_core(core, tmp_path):
    "Outside a checkout, with nothing but the core: help, version, the list of experiments, and a clear word about the extra."
    done = {words: command(core, *words.split(), cwd=tmp_path) for words in ("--help", "--version", "reproduce", "reproduce digits", "results")}
    assert "reproduce" in done["--help"].stdout and done["--version"].stdout.split()[-1] == settings()["version"]
    assert re.search(r"^digits ", done["reproduce"].stdout, flags=re.M), done["reproduce"].stderr
    for words in ("reproduce digits", "results"):
        assert done[words].returncode == 2 and "pip install 'mice[reproduce]'" in done[words].stderr, done[words].stderr
        assert len(done[words].stderr.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "what was refused leaves nothing behind"


def test_training_with_the_core(core, tmp_path):
    program = """
from mice.data import digits
from mice.estimator import MiCE
model = MiCE(10, epochs=1, verbose=False, random_state=0).fit(digits(12).images[:200])
model.save("m"), print(len(MiCE.load("m").predict(digits(12).images[:7])))
"""
    assert run(core, "-I", "-c", program, cwd=tmp_path).split()[-1] == "7"


def test_an_undeclared_import_fails(wheel, tmp_path):
    python = empty_environment(tmp_path / "env", wheel)
    core = next((tmp_path / "env").glob("[Ll]ib*/**/site-packages/mice/core.py"))
    core.write_text(core.read_text(encoding="utf-8") + "\nimport fastcore\n", encoding="utf-8")
    assert "No module named 'fastcore'" in imported(python, ["core"]).stderr


def callables(module):
    "Name -> public functions, methods and properties of a module, and None for a class, whose fields count."
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing):
            yield name, thing
            for method, found in vars(thing).items():
                function = getattr(found, "__func__", found.fget if isinstance(found, property) else found)
                if inspect.isfunction(function) and function.__module__ == module.__name__ and (method == "__init__" or method[0] != "_"):
                    yield f"{name}.{method}", function
        elif inspect.isfunction(thing):
            yield name, inspect.unwrap(thing)


def untyped(module) -> list[str]:
    "What a type checker would not know: parameters and results without an annotation, or with one that names nothing."
    found = []
    for name, thing in callables(module):
        try:
            hints = typing.get_type_hints(thing)
        except (NameError, AttributeError, TypeError) as error:
            found.append(f"{module.__name__}.{name}: {error}")
            continue
        if inspect.isfunction(thing):
            wanted = [p for i, p in enumerate(inspect.signature(thing).parameters) if i or "." not in name or p not in ("self", "cls")]
            missing = [p for p in [*wanted, "return"] if p not in hints and (p, name.split(".")[-1]) != ("return", "__init__")]
            found += [f"{module.__name__}.{name}: {', '.join(missing)}"] * bool(missing)
    return found


@pytest.mark.parametrize("name", modules())
def test_the_public_interface_is_typed(name):
    found = untyped(importlib.import_module(f"mice.{name}"))
    assert not found, "py.typed promises annotations\n" + "\n".join(found)


def test_the_check_of_types_can_fail():
    import types

    module = types.ModuleType("made_up")
    source = "def a(x: int) -> str: ...\ndef b(x, y: int) -> str: ...\ndef c(x: int): ...\ndef d(x: 'Nobody') -> int: ...\n"
    source += "class E:\n    def __init__(self, x: int): ...\n    def f(self, x) -> int: ...\n    @property\n    def g(self): ...\n"
    exec(source, vars(module))
    module.__all__ = ["a", "b", "c", "d", "E"]
    assert [line.split(":")[0] for line in untyped(module)] == [f"made_up.{name}" for name in ("b", "c", "d", "E.f", "E.g")]
