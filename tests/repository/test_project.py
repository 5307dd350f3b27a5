"""What is said about the project, in files that no notebook makes, is so."""

import re

import pytest
import yaml
from house import ROOT, settings

def text_of(name: str) -> str:
    "The text of a file of the project."
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_is_named_exists(name):
    "Names in backticks: targets of make, files and folders."
    text = text_of(name)
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.M)
    unknown = [f"make {target}" for target in re.findall(r"`make ([a-z-]+)", text) if target not in targets]
    ending = r"(?:/|\.(?:py|md|ini|toml|yml|lock|cff|ipynb))"
    paths = re.findall(rf"`((?:\.?[\w-]+/)*\.?[\w-]+{ending})`", text)
    products = ["_docs/", "dist/"]
    unknown += [path for path in paths if path not in products and not (ROOT / path).exists()]
    assert not unknown


def test_citation():
    cited, cfg = yaml.safe_load(text_of("CITATION.cff")), settings()
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (cfg["version"], cfg["license"])
    paper = cited["preferred-citation"]
    authors = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    assert f"{authors}: *{paper['title']}*, ICLR {paper['year']}" in text_of("README.md")


def test_changelog():
    "Unreleased, then versions with dates, newest first; that of settings.ini is the newest, or to come."
    text, version = text_of("CHANGELOG.md"), settings()["version"]
    first, *heads = re.findall(r"^## (.*)$", text, flags=re.M)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads)
    versions = [tuple(map(int, re.findall(r"\d+", head)[:3])) for head in heads]
    assert versions == sorted(versions, reverse=True)
    newest = ".".join(map(str, versions[0])) if versions else ""
    assert version == newest or f"will become {version}" in text
