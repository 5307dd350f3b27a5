"""The tables: quoted numbers against the source text, measured ones against the rows, links against files."""

import json
import re
import statistics
import subprocess

import pytest
from house import NBS, ROOT

from mice.config import config_from
from mice.metrics import METRICS
from mice.reproduction import plots, tables
from mice.reproduction.ledger import read_rows
from mice.reproduction.runner import experiment_settings, experiments

SOURCE = ROOT.parent / "shared" / "seeds" / "000_3b24b807adbc959b.txt"
OUT = ROOT / "results"
needs_source = pytest.mark.skipif(not SOURCE.is_file(), reason="the source text is not in the repository")


def printed_table() -> dict:
    "Method and line -> twelve numbers as text, as the source prints them."
    names, lines = {"MoCo": "MoCo†", "MiCE": "MiCE"}, {}
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        name, *cells = line.split("\t")
        if len(cells) == 12 and not name.startswith(("Datasets", "Methods")):
            kind = re.search(r"\((Mean|Std|Best)", name)
            word = re.match(r"[\w-]+", name)[0]
            method = names.get(word, f"{word}†" if "†" in name else word)
            lines[method, f"quoted {kind[1].lower()}" if kind else "quoted"] = cells
    return lines


@needs_source
def test_every_quoted_number_is_the_paper_s():
    source, ours = printed_table(), tables.paper_table1()
    assert sorted(source) == sorted(ours.index) and len(source) == 22
    for key, cells in source.items():
        for printed, kept in zip(cells, ours.loc[key], strict=True):
            assert printed == kept or float(printed) == float(kept), key


@needs_source
def test_ablations_and_maps_are_the_paper_s():
    text = SOURCE.read_text(encoding="utf-8")
    column = re.findall(r"\t([\d.]+)$", text[text.index("(a) No analytical") :], flags=re.M)
    assert column == [tables.ABLATIONS[name].paper for name in ("a", "b", "c", "d", "full")]
    maps = {int(epoch): float(acc) for epoch, acc in re.findall(r"Epoch (\d+) \(([\d.]+)%\)", text)}
    assert maps == plots.PAPER_MAPS


def test_experiments_are_what_the_tables_take_them_for():
    "The settings of the paper's datasets and the switches of its ablations stand in the YAML files, too."
    for dataset, paper in tables.PAPER_DATASETS.iterrows():
        cfg = config_from(experiment_settings(dataset))
        for name in ("n_clusters", "image_size", "arch", "epochs"):
            assert getattr(cfg, name) == paper[name], (dataset, name)
    full, changes = experiment_settings("cifar100-20"), []
    for name in experiments():
        if name.startswith("cifar100-20-"):
            settings = experiment_settings(name)
            changes.append({key: value for key, value in settings.items() if full.get(key) != value})
    for name, ablation in tables.ABLATIONS.items():
        assert name == "full" or ablation.change in changes, name


def made_up(seed: int, acc: float | None, **config) -> dict:
    "A row with the required keys alone, as a file holds it."
    config = dict(dataset="cifar10", method="mice", seed=seed, epochs=20) | config
    numbers = dict(seconds=1.0, images_per_second=1.0, peak_memory_bytes=1, seed=seed, epochs=20)
    words = dict(dataset="cifar10", dataset_sha256="", protocol="", device="cpu", commit="made up")
    results = dict(metrics=dict.fromkeys(METRICS, acc), loss_curve=[1.0] * 20, environment={})
    finished = "2026-01-01T00:00:00+00:00"
    return dict(**words, **numbers, **results, method=config["method"], config=config, finished=finished)


@pytest.fixture
def ledger(tmp_path):
    "A folder of results, written file by file."

    def write(*rows):
        (tmp_path / "ledger").mkdir()
        for i, row in enumerate(rows):
            name = f"run{i}-seed{row['seed']}-0000{i:04d}.json"
            (tmp_path / "ledger" / name).write_text(json.dumps(row))
        return tmp_path

    return write


def test_runs_that_cannot_be_compared_stay_out_of_table_1(ledger):
    changes = [dict(subset=100), dict(split="test"), dict(n_clusters=12), dict(mu_gradient=False)]
    changes += [dict(omega_gradient=True), dict(released=True, mu_gradient=False), dict(dataset="digits")]
    changes += [dict(arch="efficientnet_lite0", frozen=frozen) for frozen in (True, False)]
    out = ledger(*(made_up(0, 0.99, **change) for change in changes))
    text = tables.as_text(tables.all_tables(out)["table1"])
    assert "99.0" not in text and "not run" in text
    said = " ".join(tables.comparison_lines(read_rows(out)))
    assert all(reason in said for reason in ("100 images", "test split", "K = 12"))


@pytest.mark.parametrize("field", ["released", "official"])
def test_runs_of_the_official_code_have_one_variant_under_either_name(field, ledger):
    out = ledger(made_up(0, 0.5, **{field: True}, mu_gradient=False, dataset="digits"))
    (group,) = tables.group_runs(read_rows(out))
    assert (group.variant, tables.method_title(group)) == ("official", "MiCE, official")
    line = tables.all_tables(out)["ablations digits"].xs("official", level="variant")
    assert line["ACC"].tolist() == ["50.0"]


def test_runs_without_labels_are_shown_as_such(ledger):
    out = ledger(made_up(0, None), made_up(1, None), made_up(0, None, dataset="photos"))
    text = tables.results_text(out)
    assert "no labels" in text and "photos" in text
    assert plots.ablation_figure(read_rows(out), "cifar10") is not None
    assert plots.learning_figure(read_rows(out), "cifar10") is not None


def test_names_come_from_the_files(ledger):
    out = ledger(made_up(0, 0.5), made_up(1, 0.6))
    (names,) = tables.source_rows(tables.all_tables(out)["table1"])
    assert names == ("run0-seed0-00000000", "run1-seed1-00000001")


def test_bash_expands_names_of_several_seeds():
    names = tuple(f"digits-mice-seed{seed}-ab12" for seed in (0, 1, 10)) + ("cifar10-kmeans-seed0-cd34",)
    command = ["bash", "-c", f"echo {tables.brace_seeds(names)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == list(names)


def test_our_tables_agree_with_our_rows():
    "Every group of runs in the ledger of the repository, its numbers computed anew from the files."
    rows = {path.stem: json.loads(path.read_text()) for path in (OUT / "ledger").glob("*.json")}
    assert not [name for name, row in rows.items() if row["commit"] == "made up"]
    found, used = tables.all_tables(OUT), set()
    for name in ("runs", "digits", "pretrained", "ablations cifar100-20", "ablations digits"):
        for labels, line in found[name].iterrows():
            if line["ACC"] == tables.NOT_RUN:
                continue
            feature = re.search(r"^MoCo \((\w+)\)", str(labels[1]))
            scores = [scores_of(rows[row], feature and feature[1]) for row in line["ACC"].rows]
            used |= set(line["ACC"].rows)
            for score in METRICS:
                if scores[0][score] is None:
                    assert line[score.upper()] == "not recorded"
                    continue
                values = [100 * row[score] for row in scores]
                deviation = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
                assert line[score.upper()] == f"{statistics.mean(values):.1f}{deviation}"
            assert line["n"] == str(len(values))
            if name != "pretrained":
                assert line["best ACC"] == f"{max(row['acc'] for row in scores) * 100:.1f}"
    costs = {row for names in tables.source_rows(found["costs"]) for row in names}
    assert costs == set(rows) >= used


def scores_of(row: dict, feature: str | None) -> dict:
    "The scores of a run; of a two-stage one for the features that a line of a table names."
    if feature is None or feature == row["config"]["features"]:
        return row["metrics"]
    return row["other_features"][feature]


def test_links_lead_to_rows_and_lists():
    "All tables on one page: every link is a file of the ledger, or a list on that page; names are unique."
    page = "".join(tables.as_html(table, f"t{i}") for i, table in enumerate(tables.all_tables(OUT).values()))
    ids, links = re.findall(r' id="([^"]+)"', page), re.findall(r'href="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (NBS / "reproduction" / link).resolve().is_file(), link
