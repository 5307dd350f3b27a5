"Choosing K: what a cell cannot show."

import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from mice.choosing import Comparison, Row, agreement, candidates, compare, held_out, merge_tree, merged, overlap, recommend, silhouette, stability, summary, table, unsure
from mice.core import config_from
from mice.data import digits
from mice.estimator import MiCE
from mice.forecast import Forecast
from mice.metrics import evaluate
from mice.training import fit

FEW = digits(8).images[:120]
QUICK = dict(n_clusters="2..3", epochs=3, batch_size=40, image_size=8, dim=8, random_state=0, verbose=False)
CFG = config_from(dict(arch="small", n_clusters=3, dim=8, image_size=8, views="affine", nu=32, ema=0.9, epochs=1, warmup=0, batch_size=30, device="cpu", lr=0.1))


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


@pytest.mark.parametrize("wish", [[3, 2], range(2, 4), (np.int64(2), 3), np.array([2, 3]), " 2 .. 3"])
def test_every_way_to_say_several_can_be_saved(chosen, wish, tmp_path):
    est, found = clone(MiCE(**QUICK | dict(n_clusters=wish))), chosen.comparison_
    est.adopt(chosen.config_, chosen.model_, chosen.history_, None).comparison_ = found
    est.save(tmp_path / "model.safetensors")
    again = MiCE.load(tmp_path / "model.safetensors")
    assert again.comparison_.rows == found.rows and table(again.comparison_) == table(found)
    assert candidates(again.n_clusters, 120) == [2, 3]


def test_said_before_and_after(capsys, monkeypatch):
    monkeypatch.setattr("mice.estimator.forecast", lambda images, cfg: Forecast(1.0, 1.0, 1, 0, 1, 0))
    MiCE(**QUICK | dict(verbose=True, epochs=1)).fit(FEW)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("MiCE: comparing 2, 3 clusters: 6 runs of 1 epochs") and "clusters are recommended" in said[1], said


def test_callback_hears_the_fit_alone(chosen):
    heard = []
    MiCE(**QUICK | dict(callback=lambda model, epoch: heard.append((epoch.epoch, len(model.mu))))).fit(FEW)
    assert heard == [(epoch, chosen.config_.n_clusters) for epoch in (1, 2, 3)]


def test_wishes_that_cannot_be_met():
    for change, expected in ((dict(n_clusters="3..500", dim=None), "n_clusters = 500"), (dict(n_clusters="5..3"), "'5..3'"), (dict(warm_start=True), "n_clusters must be one number")):
        with pytest.raises(ValueError, match=expected) as refusal:
            MiCE(**QUICK | change).fit(FEW)
        assert "\n" not in str(refusal.value)


KILLED = """
import os, sys, mice.estimator as e
from dataclasses import replace
from mice.data import digits
decide, train, starts = e.config_of, e.train, []
e.config_of = lambda *facts, **decided: replace(decide(*facts, **decided), checkpoint=1e-9)  # seconds
def begun(*work, **more):
    starts.append(work)
    if len(starts) == 5: os.kill(os.getpid(), 9)
    return train(*work, **more)
e.train = begun
e.MiCE(n_clusters='2..3', epochs=3, batch_size=40, image_size=8, dim=8, random_state=0, verbose=False, checkpoint=sys.argv[1]).fit(digits(8).images[:120])
"""


def test_a_killed_comparison_goes_on(chosen, tmp_path, capsys):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sorted(path.name for path in (tmp_path / "trials").iterdir())
    assert len(kept) == 5 and all(name.startswith("k") for name in kept), kept
    again = MiCE(**QUICK, checkpoint=tmp_path).fit(FEW)
    assert capsys.readouterr().out.count("goes on from") >= 4
    np.testing.assert_array_equal(again.comparison_.clusters, chosen.comparison_.clusters)
    np.testing.assert_array_equal(again.predict_proba(FEW), chosen.predict_proba(FEW))


def test_held_out_sees_no_view_of_training(monkeypatch):
    model, _ = fit(FEW, CFG, progress=False)
    drawn = []
    from mice import choosing

    look = choosing.augment
    monkeypatch.setattr(choosing, "augment", lambda images, *parts, views: drawn.append(parts) or look(images, *parts, views=views))
    before = torch.random.get_rng_state()
    held_out(model, FEW, CFG, draws=2)
    assert len(set(drawn)) == len(drawn) == 6 and all(parts[0] == "held out" for parts in drawn)
    assert torch.equal(before, torch.random.get_rng_state())


partitions = st.integers(2, 30).flatmap(lambda M: st.lists(st.lists(st.integers(0, 5), min_size=M, max_size=M), min_size=2, max_size=4))


@given(partitions, st.permutations(range(6)))
def test_agreement_and_stability_know_no_names(runs, names):
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
    cuts = [merged(tree, clusters, k) for k in range(1, K + 1)]
    assert set(cuts[0]) == {0} and evaluate(clusters, cuts[-1])["acc"] == 1
    for coarse, fine in zip(cuts, cuts[1:]):
        assert all(len(set(coarse[fine == k])) == 1 for k in set(fine)), "a cluster of the finer cut lies in one of the coarser"


def test_a_dead_cluster_disturbs_nothing():
    posterior = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(overlap(posterior), np.eye(3))
    assert np.isfinite(merge_tree(posterior)).all()


@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_doubts_are_sorted_and_true(M, K, count, seed):
    posterior = np.random.default_rng(seed).dirichlet(np.ones(K), M)
    doubts = unsure(posterior, count)
    assert len({doubt.image for doubt in doubts}) == len(doubts) == min(M, count)
    assert [doubt.confidence for doubt in doubts] == sorted(posterior.max(1))[:count]
    for doubt in doubts:
        assert sorted(posterior[doubt.image])[-2:] == [posterior[doubt.image, doubt.runner_up], posterior[doubt.image, doubt.cluster]]


@settings(max_examples=30)
@given(st.dictionaries(st.integers(2, 40), st.tuples(st.floats(-0.5, 1), st.floats(-1, 1)), min_size=1, max_size=6))
def test_the_sentence_names_the_best(scores):
    rows = [Row(K, seed, 6.0, -6.0, s, a, [1] * K) for K, (a, s) in scores.items() for seed in (0, 1)]
    K, sentence = recommend(Comparison(rows, np.zeros((len(rows), 3), int)))
    assert sum(scores[K]) >= max(map(sum, scores.values())) - 1e-9 and "\n" not in sentence
    assert [one.n_clusters for one in summary(Comparison(rows, np.zeros((len(rows), 3), int)))] == sorted(scores)
    assert ("suggestion" in sentence) == (scores[K][0] < 0.5 - 1e-9)


def test_collapsed_runs_do_not_win():
    found = compare(FEW, [replace(CFG, n_clusters=K, seed=seed, lr=1e-9, kappa=1e-3) for K in (2, 3) for seed in (0, 1)])
    assert all(row.agreement <= 0.2 for row in found.rows)
    assert silhouette(torch.zeros(5, 3), np.zeros(5, int)) == 0
    json.dumps([row._asdict() for row in found.rows])
