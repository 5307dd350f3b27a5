"""The ledger: names of runs that never change, rows of any age, and files that stay as they are."""

import json
from dataclasses import asdict, replace

import pytest
from house import ROOT

from mice.config import RENAMED, Config
from mice.reproduction import ledger
from mice.reproduction.ledger import Row, read_rows, row_path, run_name, write_row

LEDGER = ROOT / "results" / "ledger"
FILES = sorted(LEDGER.glob("*.json"))
KEYS = """
    commit compile config dataset dataset_sha256 device diagnostics environment epochs feature_seconds
    finished health images_per_second loss_curve method metrics notes other_features peak_memory_bytes
    precision processes protocol seconds seed stages warnings
""".split()


@pytest.fixture(scope="module")
def rows() -> dict:
    "Name of the file -> row, of the repository's ledger."
    return {row.name: row for row in read_rows(ROOT / "results")}


def test_every_file_of_the_repository_is_read(rows):
    assert list(rows) == [path.stem for path in FILES] and rows


def test_the_name_of_a_file_is_that_of_its_run(rows):
    "Checkpoints and rows are found by name, so the name must survive every renaming of a field."
    for name, row in rows.items():
        stored = json.loads((LEDGER / f"{name}.json").read_text())["config"]
        assert run_name(row.config, row.method) == run_name(stored, row.method) == name
        assert row_path(row.config, row.method, ROOT / "results") == LEDGER / f"{name}.json"


def test_earlier_names_of_fields_are_translated(rows):
    assert not [name for name, row in rows.items() if RENAMED.keys() & row.config.keys()]
    official = [name for name, row in rows.items() if row.config["official"]]
    stored = [path.stem for path in FILES if '"released": true' in path.read_text()]
    assert official == stored and official


def test_a_name_that_was_published():
    "Computed by the code before any field was renamed."
    cfg = Config(epochs=5)
    assert run_name(asdict(cfg), "mice") == "digits-mice-seed0-36261012"
    renamed = dict(official=True, mu_gradient=False, n_init=3, checkpoint_seconds=1.0)
    changed = replace(cfg, dataset="a/faces", **renamed)
    assert run_name(asdict(changed), "mice") == "faces-mice-seed0-42e8195a"


def test_old_and_new_rows_have_the_same_keys(rows, tmp_path):
    "The newest files have every key that is written today; older ones lack those that came later."
    stored = [set(json.loads(path.read_text())) for path in FILES]
    assert set(KEYS) in stored and all(keys <= set(KEYS) for keys in stored)
    for row in rows.values():
        written = json.loads(write_row(row, tmp_path).read_text())
        assert sorted(written) == KEYS


def test_a_row_survives_being_written_and_read(rows, tmp_path):
    for row in rows.values():
        write_row(row, tmp_path)
    assert read_rows(tmp_path) == list(rows.values())
    for path in FILES:
        before = json.loads(path.read_text())
        after = json.loads((tmp_path / "ledger" / path.name).read_text())
        before["config"] = {RENAMED.get(name, name): value for name, value in before["config"].items()}
        if "gate_start" in before["config"]:
            start = before["config"].pop("gate_start")
            before["config"]["start"] = "discriminant" if start == "kmeans" else start
        before["protocol"] = before["protocol"].replace("judged", "evaluated")
        assert all(after[name] == value for name, value in before.items())


def test_a_score_and_a_field_may_be_added(rows, monkeypatch):
    "Rows that lack a score have None for it; a new field at its default changes no name."
    monkeypatch.setattr(ledger, "METRICS", (*ledger.METRICS, "ami"))
    assert {row.metrics["ami"] for row in read_rows(ROOT / "results")} == {None}
    monkeypatch.setattr(ledger, "ADDED", ("lr_drop",))
    new = asdict(Config())
    old = {name: value for name, value in new.items() if name != "lr_drop"}
    assert run_name(old, "mice") == run_name(new, "mice") != run_name(new | dict(lr_drop=0.5), "mice")


def test_a_key_of_a_later_version_is_ignored(rows):
    row = next(iter(rows.values()))
    assert Row.from_dict(row.as_dict() | dict(mood="good"), row.name) == row


def test_a_damaged_file_is_named(tmp_path):
    text = FILES[0].read_text()
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / FILES[0].name).write_text(text)
    (tmp_path / "ledger" / "half-seed0-00000000.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="^half-seed0-00000000.json is not a complete row"):
        read_rows(tmp_path)
