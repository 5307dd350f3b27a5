"""The tables: quoted numbers against the source text, live ones against the rows, links against the files."""

import json
import re
import statistics
import subprocess

import pytest
from house import NBS, ROOT

from mice import results

SEED = ROOT.parent / "shared" / "seeds" / "000_3b24b807adbc959b.txt"
OUT = ROOT / "results"
needs_seed = pytest.mark.skipif(not SEED.is_file(), reason="the source text lies beside the repository, not in it")


def printed_table() -> dict:
    "Method and line -> twelve numbers as text, as the source prints them."
    names, lines = {"MoCo": "MoCo†", "MiCE": "MiCE"}, {}
    for line in SEED.read_text(encoding="utf-8").splitlines():
        name, *cells = line.split("\t")
        if len(cells) == 12 and not name.startswith(("Datasets", "Methods")):
            kind = re.search(r"\((Mean|Std|Best)", name)
            word = re.match(r"[\w-]+", name)[0]
            method = names.get(word, word + "†" * ("†" in name))
            lines[method, f"quoted {kind[1].lower()}" if kind else "quoted"] = cells
    return lines


@needs_seed
def test_every_quoted_number_is_the_paper_s():
    source, ours = printed_table(), results.quoted()
    assert sorted(source) == sorted(ours.index) and len(source) == 22
    value = lambda text: None if text == "-" else float(text)
    for key, cells in source.items():
        assert list(map(value, ours.loc[key])) == list(map(value, cells)), key


@needs_seed
def test_ablations_and_maps_are_the_paper_s():
    text = SEED.read_text(encoding="utf-8")
    column = re.findall(r"\t([\d.]+)$", text[text.index("(a) No analytical") :], flags=re.M)
    assert column == [results.ABLATIONS[name][1] for name in ("a", "b", "c", "d", "full")]
    maps = {int(epoch): float(acc) for epoch, acc in re.findall(r"Epoch (\d+) \(([\d.]+)%\)", text)}
    assert maps == results.PAPER_MAPS


def made_up(seed: int, acc: float | None, **config) -> dict:
    scores = dict(acc=acc, nmi=acc, ari=acc)
    config = dict(dataset="cifar10", method="mice", seed=seed, epochs=20) | config
    numbers = dict(seconds=1.0, images_per_second=1.0, peak_memory_bytes=1)
    words = dict(dataset="cifar10", dataset_sha256="", protocol="", device="cpu", commit="made up")
    return words | numbers | dict(
        method=config["method"], config=config, seed=seed, epochs=20, environment={}, metrics=scores,
        loss_curve=[1.0] * 20, stages={"1": acc, "20": acc}, finished="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


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


def test_unfair_runs_stay_out_of_table_1(ledger):
    unfair = [dict(subset=100), dict(split="test"), dict(n_clusters=12), dict(mu_gradient=False), dict(omega_gradient=True)]
    released = dict(released=True, mu_gradient=False)
    out = ledger(*(made_up(0, 0.99, **change) for change in (*unfair, released, dict(dataset="digits"))))
    text = results.as_text(results.tables(out)["table1"])
    assert "99.0" not in text and "not run" in text
    said = " ".join(results.standing(results.named_rows(out)))
    assert all(reason in said for reason in ("100 images", "test split", "K = 12"))


def test_runs_without_labels_are_shown_as_such(ledger):
    out = ledger(made_up(0, None), made_up(1, None), made_up(0, None, dataset="photos"))
    text = results.text(out)
    assert "no labels" in text and "photos" in text
    assert results.ablation_figure(results.named_rows(out), "cifar10") is not None


def test_names_come_from_the_files(ledger):
    out = ledger(made_up(0, 0.5), made_up(1, 0.6))
    ((names),) = results.sources(results.tables(out)["table1"])
    assert names == ("run0-seed0-00000000", "run1-seed1-00000001")


def test_bash_unfolds_what_is_folded():
    names = tuple(f"digits-mice-seed{seed}-ab12" for seed in (0, 1, 10)) + ("cifar10-kmeans-seed0-cd34",)
    command = ["bash", "-c", f"echo {results.fold(names)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == list(names)


def test_our_tables_say_what_our_rows_say():
    "Every group of runs in the ledger of the repository, its numbers computed anew from the files."
    rows = {path.stem: json.loads(path.read_text()) for path in (OUT / "ledger").glob("*.json")}
    assert not [name for name, row in rows.items() if row["commit"] == "made up"]
    found, used = results.tables(OUT), set()
    for name in ("runs", "digits", "ablations cifar100-20", "ablations digits"):
        for labels, line in found[name].iterrows():
            if line["ACC"] == results.NOT_RUN:
                continue
            scores = [rows[row] for row in line["ACC"].rows]
            used |= set(line["ACC"].rows)
            feature = re.search(r"^MoCo \((\w+)\)", str(labels[1]))
            if feature:
                same = lambda row: feature[1] == row["config"]["features"]
                scores = [row["metrics"] if same(row) else row["other_features"][feature[1]] for row in scores]
            else:
                scores = [row["metrics"] for row in scores]
            for score in results.SCORES:
                values = [100 * row[score] for row in scores]
                spread = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
                assert line[score.upper()] == f"{statistics.mean(values):.1f}{spread}"
            assert line["n"] == str(len(values)) and line["best"] == f"{max(row['acc'] for row in scores) * 100:.1f}"
    costs = {row for names in results.sources(found["costs"]) for row in names}
    assert costs == set(rows) >= used


def test_links_lead_to_rows_and_lists():
    "All tables of one page: every link is a file of the ledger, or a list on that page; no list has two names."
    page = "".join(results.as_html(table, f"t{i}") for i, table in enumerate(results.tables(OUT).values()))
    ids, links = re.findall(r' id="([^"]+)"', page), re.findall(r'href="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (NBS / "reproduction" / link).resolve().is_file(), link
