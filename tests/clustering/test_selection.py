"Choosing the number of clusters: what a cell cannot show."

import json
import signal
import subprocess
import sys
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mice.clustering import selection
from mice.clustering.estimator import MiCE
from mice.clustering.selection import (
    Comparison,
    RunScores,
    agreement,
    candidates,
    compare_runs,
    comparison_table,
    cut_tree_at,
    fresh_view_likelihood,
    merge_tree,
    overlap,
    recommend,
    scores_by_k,
    silhouette,
    stability,
    uncertain_images,
)
from mice.config import config_from
from mice.data.images import digits
from mice.metrics import evaluate
from mice.training.forecast import Forecast
from mice.training.loop import Callback, fit

FEW = digits(8).images[:120]
QUICK = dict(n_clusters="2..3", epochs=3, batch_size=40, image_size=8, dim=8, random_state=0, verbose=False)
SMALL = dict(arch="small", n_clusters=3, dim=8, image_size=8, views="affine", nu=32, ema=0.9, device="cpu")
CFG = config_from(SMALL | dict(epochs=1, warmup=0, batch_size=30, lr=0.1))


@pytest.fixture(scope="module")
def chosen():
    return MiCE(**QUICK).fit(FEW)


def test_the_recommended_one_is_trained_as_if_it_had_been_asked_for(chosen):
    K, sentence = recommend(chosen.comparison_)
    assert chosen.config_.n_clusters == K and sentence.startswith(f"{K} clusters are recommended")
    asked = MiCE(**QUICK | dict(n_clusters=K)).fit(FEW)
    np.testing.assert_array_equal(asked.predict_proba(FEW), chosen.predict_proba(FEW))
    assert asked.comparison_ is None and asked.loss_curve_ == chosen.loss_curve_


def test_comparing_alone_gives_what_a_fit_compares(chosen):
    found = MiCE(**QUICK | dict(n_clusters=[3, 2])).compare(FEW)
    np.testing.assert_array_equal(found.clusters, chosen.comparison_.clusters)
    assert found.rows == chosen.comparison_.rows


@pytest.mark.parametrize("several", [[3, 2], range(2, 4), (np.int64(2), 3), np.array([2, 3]), " 2 .. 3"])
def test_a_comparison_is_saved_however_it_was_asked_for(chosen, several, tmp_path):
    est, found = copy(chosen), chosen.comparison_
    est.n_clusters = several
    est.save(tmp_path / "model.safetensors")
    again = MiCE.load(tmp_path / "model.safetensors")
    assert again.comparison_.rows == found.rows
    assert comparison_table(again.comparison_) == comparison_table(found)
    assert candidates(again.n_clusters, 120) == [2, 3]


def test_the_plan_and_the_choice_are_printed(capsys, monkeypatch):
    quick = Forecast(1.0, 1.0, 1, 0, 1, 0)
    monkeypatch.setattr("mice.clustering.estimator.forecast", lambda images, cfg, trunk: quick)
    MiCE(**QUICK | dict(verbose=True, epochs=1)).fit(FEW)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MiCE: comparing 2, 3 clusters: 6 runs, about 6 seconds")
    assert "clusters are recommended" in lines[1]


class Listener(Callback):
    def __init__(self):
        self.epochs = []

    def on_epoch_end(self, run):
        self.epochs.append((run.history[-1].epoch, len(run.model.mu)))


def test_callbacks_hear_of_the_fit_alone(chosen):
    listener = Listener()
    MiCE(**QUICK, callbacks=[listener]).fit(FEW)
    assert listener.epochs == [(epoch, chosen.config_.n_clusters) for epoch in (1, 2, 3)]


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(n_clusters="3..500", dim=None), "n_clusters = 500"),
        (dict(n_clusters="5..3"), "'5..3'"),
        (dict(warm_start=True), "n_clusters must be one number"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, expected):
    with pytest.raises(ValueError, match=expected) as refusal:
        MiCE(**QUICK | change).fit(FEW)
    assert "\n" not in str(refusal.value)


KILLED = """
import os, sys
import mice.clustering.estimator as e
from mice.data.images import digits

class Deadly(e.Checkpointer):
    runs = 0

    def __init__(self, folder, every, **how):
        super().__init__(folder, every=1e-9, **how)

    def on_train_start(self, run):
        super().on_train_start(run)
        Deadly.runs += 1

    def on_epoch_end(self, run):
        super().on_epoch_end(run)
        if Deadly.runs == 5:
            self.wait()
            os.kill(os.getpid(), 9)

e.Checkpointer = Deadly
quick = dict(epochs=3, batch_size=40, image_size=8, dim=8, random_state=0, verbose=False)
e.MiCE(n_clusters='2..3', checkpoint_dir=sys.argv[1], **quick).fit(digits(8).images[:120])
"""


def test_a_killed_comparison_goes_on_with_the_trial_under_way(chosen, tmp_path, capsys):
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    trials = tmp_path / "trials"
    scored, under_way = list(trials.glob("k*.json")), [path for path in trials.iterdir() if path.is_dir()]
    assert (len(scored), len(under_way)) == (4, 1)
    changed = [path.stat().st_mtime_ns for path in scored]
    again = MiCE(**QUICK, checkpoint_dir=tmp_path).fit(FEW)
    assert capsys.readouterr().out.count("resumed from") == 1
    assert [path.stat().st_mtime_ns for path in scored] == changed and len(list(trials.iterdir())) == 6
    np.testing.assert_array_equal(again.comparison_.clusters, chosen.comparison_.clusters)
    np.testing.assert_array_equal(again.predict_proba(FEW), chosen.predict_proba(FEW))


def test_fresh_views_are_no_views_of_the_training(monkeypatch):
    model, _ = fit(FEW, CFG, progress=False)
    drawn, augment = [], selection.augment

    def recorded(images, *parts, **how):
        drawn.append(parts)
        return augment(images, *parts, **how)

    monkeypatch.setattr(selection, "augment", recorded)
    before = torch.random.get_rng_state()
    fresh_view_likelihood(model, FEW, CFG, draws=2)
    assert len(set(drawn)) == len(drawn) == 6, "each view is drawn anew"
    assert all(parts[0] == "held out" for parts in drawn), "training draws by the seed, a number"
    assert torch.equal(before, torch.random.get_rng_state())


def test_scores_of_an_earlier_version_are_read():
    old = dict(n_clusters=2, seed=0, loss=6.0, held_out=-6.5, silhouette=0.1, agreement=0.2, sizes=[1, 2])
    scores = RunScores.read(old)
    assert scores.fresh_view == -6.5 and RunScores.read(scores._asdict()) == scores
    with pytest.raises(KeyError, match="sizes"):
        RunScores.read({name: value for name, value in old.items() if name != "sizes"})


def runs_of(M):
    "Two to four clusterings of M images."
    return st.lists(st.lists(st.integers(0, 5), min_size=M, max_size=M), min_size=2, max_size=4)


@given(st.integers(2, 30).flatmap(runs_of), st.permutations(range(6)))
def test_agreement_and_stability_ignore_names(runs, names):
    runs, names = np.array(runs), np.array(names)
    renamed = [runs[0], *(names[row] for row in runs[1:])]
    np.testing.assert_allclose(agreement(runs), agreement(renamed))
    np.testing.assert_allclose(stability(runs[0], runs[1:]), stability(renamed[0], renamed[1:]))
    found = stability(runs[0], [names[runs[0]]])
    np.testing.assert_array_equal(found, np.bincount(runs[0]) > 0)


@given(st.integers(2, 7), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_trees_are_nested(K, M, seed):
    posterior = np.random.default_rng(seed).dirichlet(np.full(K, 0.3), M)
    tree, clusters = merge_tree(posterior), posterior.argmax(1)
    shared = overlap(posterior)
    np.testing.assert_allclose(shared, shared.T)
    assert (np.diff(tree[:, 2]) >= -1e-12).all() and ((0 <= shared) & (shared <= 1)).all()
    cuts = [cut_tree_at(tree, clusters, k) for k in range(1, K + 1)]
    assert set(cuts[0]) == {0} and evaluate(clusters, cuts[-1])["acc"] == 1
    for coarse, fine in zip(cuts[:-1], cuts[1:], strict=True):
        nested = [len(set(coarse[fine == k])) == 1 for k in set(fine)]
        assert all(nested), "a cluster of the finer cut lies in one of the coarser"


def test_an_empty_cluster_disturbs_nothing():
    posterior = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(overlap(posterior), np.eye(3))
    assert np.isfinite(merge_tree(posterior)).all()


@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_uncertain_images_are_sorted_and_true(M, K, count, seed):
    posterior = np.random.default_rng(seed).dirichlet(np.ones(K), M)
    found = uncertain_images(posterior, count)
    assert len({one.image for one in found}) == len(found) == min(M, count)
    assert [one.confidence for one in found] == sorted(posterior.max(1))[:count]
    for one in found:
        best = [posterior[one.image, one.runner_up], posterior[one.image, one.cluster]]
        assert sorted(posterior[one.image])[-2:] == best


score_pairs = st.tuples(st.floats(-0.5, 1), st.floats(-1, 1))  # agreement, silhouette


@settings(max_examples=30)
@given(st.dictionaries(st.integers(2, 40), score_pairs, min_size=1, max_size=6))
def test_the_sentence_names_the_best(scores):
    rows = [RunScores(K, seed, 6.0, -6.0, s, a, [1] * K) for K, (a, s) in scores.items() for seed in (0, 1)]
    comparison = Comparison(rows, np.zeros((len(rows), 3), int))
    K, sentence = recommend(comparison)
    largest = max(silhouette for _, silhouette in scores.values())
    value = {k: a + (s / largest if largest > 0 else 0) for k, (a, s) in scores.items()}
    assert value[K] >= max(value.values()) - 1e-9 and "\n" not in sentence
    assert [one.n_clusters for one in scores_by_k(comparison)] == sorted(scores)
    assert ("suggestion" in sentence) == (scores[K][0] < 0.5 - 1e-9)


def test_collapsed_runs_do_not_win():
    still = replace(CFG, lr=1e-9, kappa=1e-3)
    found = compare_runs(FEW, [replace(still, n_clusters=K, seed=seed) for K in (2, 3) for seed in (0, 1)])
    assert all(row.agreement <= 0.2 for row in found.rows)
    assert silhouette(torch.zeros(5, 3), np.zeros(5, int)) == 0
    json.dumps([row._asdict() for row in found.rows])
