"""The wheel and the source archive: what is in them, and that the wheel works with what it declares alone."""

import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import tarfile
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
from house import NBS, ROOT, copy_sources, modules, notebooks, run, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OPTIONAL = ["figures", "reproduction.plots", "reproduction.tables"]  # modules that need the extra `reproduce`
TOOLS = "nbdev fastcore IPython jupyterlab papermill nbclient matplotlib seaborn pandas tensorboard".split()
INSTALL = "pip install 'mice-clustering[reproduce]'"


def build(kind: str, source: Path, to: Path) -> Path:
    "Without a network, and without another environment."
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", to, cwd=source)
    (built,) = to.iterdir()
    return built


def build_both(folder: Path) -> None:
    "The source archive of the project, unpacked, and the wheel, built from it as a packager would."
    archive = build("sdist", copy_sources(folder / "mice"), folder / "dist")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build("wheel", unpacked, folder / "wheel")


@pytest.fixture(scope="session")
def sdist(made_once) -> Path:
    (unpacked,) = (made_once("package", build_both) / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="session")
def wheel(made_once) -> Path:
    (wheel,) = (made_once("package", build_both) / "wheel").iterdir()
    return wheel


def metadata(wheel: Path) -> importlib.metadata.PackageMetadata:
    "What the wheel says about itself."
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        folder = zipfile.Path(archive, f"{PurePosixPath(name).parent}/")
        return importlib.metadata.PathDistribution(folder).metadata


def closure(requirements: list[str], *extras: str) -> dict[str, importlib.metadata.Distribution]:
    "The installed distributions that these requirements bring, directly and indirectly."
    todo = [(requirement, extra) for requirement in requirements for extra in ("", *extras)]
    found, seen = {}, set()
    while todo:
        text, extra = todo.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, importlib.metadata.distribution(name))
        for wanted in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, wanted))
            todo += [(needed, wanted) for needed in found[name].requires or []]
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
    (python,) = [*folder.glob("bin/python"), *folder.glob("Scripts/python.exe")]
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    return python


def test_the_source_archive_is_complete(sdist):
    "It holds every file that git keeps, apart from git's own; the wheel of the other tests is built from it."
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", cwd=ROOT).splitlines()
        missing = [name for name in tracked if (ROOT / name).exists() and not (sdist / name).exists()]
        assert set(missing) <= {".gitignore"}, "see MANIFEST.in"
    names = [path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()]
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|checkpoints/|_proc/", name)]
    assert f"Version: {settings()['version']}\n" in (sdist / "PKG-INFO").read_text(encoding="utf-8")


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    "Besides the modules: data files, and what `mice reproduce` needs without a checkout."
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    library = (path for path in (ROOT / "mice").rglob("*") if "__pycache__" not in path.parts)
    wanted = {path.relative_to(ROOT).as_posix() for path in library if path.is_file()}
    home = NBS / "reproduction"
    for path in (home / "reproduce.ipynb", *home.glob("experiments/*.yaml")):
        wanted.add(f"mice/reproduction/{path.relative_to(home).as_posix()}")
    assert {name for name in names if ".dist-info/" not in name} == wanted
    data = {"py.typed", "clustering/page/report.html", "reproduction/experiments/digits.yaml"}
    assert {f"mice/{name}" for name in data} <= wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_describes_itself(wheel):
    about, cfg = metadata(wheel), settings()
    assert (about["Name"], about["Version"]) == ("mice-clustering", cfg["version"])
    assert about["License-Expression"] == cfg["license"]
    assert about["Requires-Python"] == f">={cfg['min_python']}"
    assert set(about.get_all("Provides-Extra")) == {"photos", "reproduce", "tensorboard", "dev", "all"}
    assert not [line for line in about.get_all("Requires-Dist") if "://" in line or "file:" in line]


CORE = """
import sys
from importlib import import_module
from importlib.util import find_spec
import mice
for name in {modules}: import_module("mice." + name)
print(mice.__file__)
print([name for name in {tools} if find_spec(name)])

from click.testing import CliRunner
for words in (["reproduce"], ["reproduce", "digits"], ["results"]):
    done = CliRunner().invoke(mice.cli.main, words, prog_name="mice")
    print(done.exit_code, done.output.splitlines()[:3])

images = mice.digits(12).images
model = mice.MiCE(10, epochs=1, verbose=False, random_state=0).fit(images[:200])
model.save("m")
print(len(mice.MiCE.load("m").predict(images[:7])))
"""


def test_the_core_works_with_what_it_declares(wheel, tmp_path):
    "Outside a checkout: modules import, the command answers or names the extra it needs, a model is trained."
    python = empty_environment(tmp_path / "env", wheel)
    work = tmp_path / "work"
    work.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = python.parent / "mice"
    assert "reproduce" in run(command, "--help", cwd=work, env=env)
    assert run(command, "--version", cwd=work, env=env).split()[-1] == settings()["version"]

    names = [name for name in modules() if name not in OPTIONAL]
    program = CORE.format(modules=names, tools=TOOLS)
    origin, tools, experiments, *refused, predicted = run(python, "-I", "-c", program, cwd=work).splitlines()
    assert Path(origin).is_relative_to(tmp_path), "the wheel's own files must be the ones imported"
    assert tools == "[]", "the core must not bring these"
    assert experiments.startswith("0 ") and "cifar10 " in experiments
    for line in refused:
        assert line.startswith("2 ") and INSTALL in line and line.count("mice:") == 1, line
    assert predicted == "7"
    left = [path.name for path in work.rglob("*") if path.is_file()]
    assert left == ["m"], "what was refused leaves nothing behind"


def test_the_extra_brings_what_the_other_modules_need(wheel, tmp_path):
    python = empty_environment(tmp_path / "env", wheel, "reproduce")
    names = [*(f"mice.{name}" for name in OPTIONAL), "papermill", "psutil"]
    run(python, "-I", "-c", f"import {', '.join(names)}", cwd=tmp_path)


def test_nobody_is_sent_to_another_project():
    "On the package index `mice` is somebody else's; ours is `mice-clustering`."
    quote = r"""[\\'"`]"""  # in a notebook's JSON a backslash stands before it
    old = [
        rf"install (?:-\S+ )*{quote}*mice(?![\w-])",
        rf"{quote}mice\[",
        rf"version\({quote}+mice{quote}",
        rf"package_name={quote}+mice{quote}",
    ]
    pattern = re.compile("|".join(old))
    found = []
    for path in (*ROOT.glob("*.md"), *notebooks(), *(ROOT / "mice").rglob("*.py")):
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not found, "\n".join(found)


def callables(module: ModuleType) -> Iterator[tuple[str, object]]:
    "Public functions, classes (their fields have types, too), methods and properties of a module, by name."
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield name, inspect.unwrap(thing)
        elif inspect.isclass(thing):
            yield name, thing
            for method, found in vars(thing).items():
                function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
                own = inspect.isfunction(function) and function.__module__ == module.__name__
                if own and (method == "__init__" or method[0] != "_"):
                    yield f"{name}.{method}", function


def untyped(module: ModuleType) -> list[str]:
    "What a type checker would not know: parameters and results without annotations, or with unknown ones."
    found = []
    for name, thing in callables(module):
        try:
            hints = typing.get_type_hints(thing)
        except (NameError, AttributeError, TypeError) as error:
            found.append(f"{module.__name__}.{name}: {error}")
            continue
        if inspect.isfunction(thing):
            wanted = list(inspect.signature(thing).parameters)
            if "." in name and wanted[:1] in (["self"], ["cls"]):
                wanted = wanted[1:]
            if not name.endswith(".__init__"):
                wanted.append("return")
            missing = [parameter for parameter in wanted if parameter not in hints]
            if missing:
                found.append(f"{module.__name__}.{name}: {', '.join(missing)}")
    return found


@pytest.mark.parametrize("name", modules())
def test_the_public_interface_is_typed(name):
    found = untyped(importlib.import_module(f"mice.{name}"))
    assert not found, "py.typed promises annotations\n" + "\n".join(found)
