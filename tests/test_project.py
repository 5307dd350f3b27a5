"""What is said about the project, in files that no notebook makes, is so."""

import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import yaml
from house import BIN, NBS, ROOT, settings

MAKE = shutil.which("make") or "make"
said = lambda name: (ROOT / name).read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", said("Makefile"), flags=re.M))


def unknown(text: str) -> list[str]:
    "Names in backticks that do not exist: targets of make, and files of the project."
    found = [f"make {name}" for name in re.findall(r"`make ([a-z-]+)", text) if name not in make_targets()]
    paths = re.findall(r"`((?:\.?[\w-]+/)*\.?[\w-]+(?:/|\.(?:py|md|ini|yml|lock|cff|ipynb)))`", text)
    return found + [path for path in paths if path != "_docs/" and not (ROOT / path).exists()]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_all_names_exist(name):
    assert not unknown(said(name).replace("`dist/`", ""))


def test_this_check_can_fail():
    text = "`make test`, `make tea`, `nbs/`, `nbs/99.ipynb`, `.ci/run`, `settings.ini`, `nowhere/x.md`"
    assert unknown(text) == ["make tea", "nbs/99.ipynb", "nowhere/x.md"]


def test_every_target_is_listed_and_phony():
    listed = subprocess.run([MAKE, "help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", said("Makefile"), flags=re.M)
    assert set(re.findall(r"^make ([a-z-]+)", listed, flags=re.M)) == make_targets() - {"help"} | {"help"} == set(phony.split())


def test_the_workflow_is_ci_run():
    "The workflow does nothing of its own: a clean checkout, the oldest Python, and the one command."
    (job,) = yaml.safe_load(said(".github/workflows/ci.yml"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert [step["uses"].split("@")[0] for step in job["steps"] if "uses" in step] == ["actions/checkout", "actions/setup-python"]
    assert job["steps"][1]["with"]["python-version"] == settings()["min_python"]
    assert not {"env", "if", "continue-on-error"} & {*job, *(key for step in job["steps"] for key in step)}


def test_citation():
    cited, cfg = yaml.safe_load(said("CITATION.cff")), settings()
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (cfg["version"], cfg["license"])
    paper = cited["preferred-citation"]
    authors = ", ".join(f"{person['given-names']} {person['family-names']}" for person in paper["authors"])
    assert f"{authors}: *{paper['title']}*, ICLR {paper['year']}" in said("README.md")


def test_changelog():
    "Its sections are Unreleased, then versions with dates, newest first; the version of settings.ini is one of them, or to come."
    heads = re.findall(r"^## (.*)$", said("CHANGELOG.md"), flags=re.M)
    assert heads[0] == "[Unreleased]" and all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    versions = [tuple(map(int, re.findall(r"\d+", head)[:3])) for head in heads[1:]]
    now = tuple(map(int, settings()["version"].split(".")))
    assert versions == sorted(versions, reverse=True) and (now in versions[:1] or f"will become {settings()['version']}" in said("CHANGELOG.md"))


def get(url: str, **headers) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def test_lab_starts_and_has_the_index(tmp_path):
    "The command of `make lab`, with a token known here and no browser."
    dry = subprocess.run([MAKE, "--no-print-directory", "-n", "-o", ".venv/.ready", f"BIN={BIN}", "lab"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    words = [*shlex.split(dry.stdout.splitlines()[-1]), "--no-browser", "--port=0", "--allow-root", "--IdentityProvider.token=known"]
    with open(tmp_path / "log", "w+") as log:
        lab = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        try:
            address = None
            for _ in range(600):
                address = re.search(r"http://127\.0\.0\.1:(\d+)(\S*)\?token", (tmp_path / "log").read_text())
                if address or lab.poll() is not None:
                    break
                time.sleep(0.1)
            assert address, (tmp_path / "log").read_text()
            assert address[2].endswith("/tree/nbs/index.ipynb"), "it opens at the index"
            home, known = f"http://127.0.0.1:{address[1]}", dict(Authorization="token known")
            while get(home)[0] == 0 and lab.poll() is None:  # it prints its address before it listens to it
                time.sleep(0.5)
            assert get(f"{home}/api/contents/nbs/index.ipynb")[0] == 403, "nobody else gets in"
            status, index = get(f"{home}/api/contents/nbs/index.ipynb", **known)
            assert status == 200
            for page in sorted({*re.findall(r"\]\(([\w/]+\.ipynb)\)", index)}):
                assert (NBS / page).is_file() and get(f"{home}/api/contents/nbs/{page}?content=0", **known)[0] == 200, page
            assert get(f"{home}{address[2]}", **known)[0] == 200
        finally:
            lab.terminate()
            lab.wait(20)
