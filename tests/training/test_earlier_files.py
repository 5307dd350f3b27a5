"""Checkpoints and models written before names were changed: they are read, and lead to the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import CFG as SMALL
from small_run import IMAGES

from mice.clustering.estimator import MiCE, model_hash
from mice.clustering.selection import Comparison, RunScores
from mice.reproduction.two_stage import fit_moco
from mice.training.checkpoints import Checkpointer, Terminated, manifests, read_checkpoint, write_checkpoint
from mice.training.health import Health
from mice.training.loop import Callback, fit, warnings_by_epoch

CONFIG = dict(official="released", n_init="restarts", checkpoint_seconds="checkpoint")
HEALTH = dict(
    dispersion="spread",
    warmed_up="settled",
    gate_dispersion="gate_spread",
    gate_saturation="decided",
    largest_share="largest",
    dead_experts="dead",
)
FACTS = dict(images_hash="data", max_value="white")
SCORES = dict(fresh_view="held_out")
CFG = replace(SMALL, epochs=3)


def renamed(values: dict, names: dict) -> dict:
    "A dictionary with other names; every one of them must be there."
    assert names.keys() <= values.keys()
    return {names.get(name, name): value for name, value in values.items()}


def as_earlier(tensors: dict, facts: dict) -> tuple[dict, dict]:
    "Tensors and facts as the earlier version wrote them: other names, and no temperatures."
    history = [epoch | dict(health=renamed(epoch["health"], HEALTH)) for epoch in facts["history"]]
    changed = dict(config=renamed(facts["config"], CONFIG), history=history)
    facts = renamed(facts | changed, {name: FACTS[name] for name in FACTS.keys() & facts.keys()})
    return {name: x for name, x in tensors.items() if name not in ("model.tau", "model.kappa")}, facts


def interrupt(method, images, cfg, folder: Path, place: tuple) -> None:
    "A run that is stopped after a step; (3, 0) is the end of the second epoch."
    keeper = Checkpointer(folder, notify=str)

    class Ask(Callback):
        def on_step_end(self, run):
            if (run.epoch, run.step) == place:
                keeper.request_stop(15)

        on_epoch_end = on_step_end

    with pytest.raises(Terminated, match="and saved"):
        method(images, cfg, [Ask(), keeper], progress=False)


def healths(history) -> list[Health]:
    return [Health.read(done.health) for done in history]


@pytest.mark.parametrize("place", [(2, 2), (3, 0)])
@pytest.mark.parametrize("case", ["mice", "moco", "official", "collapsed"])
def test_earlier_checkpoint_is_resumed_to_the_same_bits(tmp_path, capsys, case, place):
    method = fit_moco if case == "moco" else fit
    cfg = replace(CFG, official=True, mu_gradient=False, tau=0.7, kappa=0.6) if case == "official" else CFG
    images = np.full_like(IMAGES, 128) if case == "collapsed" else IMAGES
    whole, expected = method(images, cfg, progress=False)
    interrupt(method, images, cfg, tmp_path / "new", place)
    (manifest,) = manifests(tmp_path / "new")
    write_checkpoint(tmp_path / "old", *as_earlier(*read_checkpoint(manifest)))
    with pytest.raises(ValueError, match="of another run: n_init was 10, is 3;"):
        method(images, replace(cfg, n_init=3), [Checkpointer(tmp_path / "old")], progress=False)

    capsys.readouterr()
    resumed, history = method(images, cfg, [Checkpointer(tmp_path / "old")], progress=False)
    captured = capsys.readouterr()
    assert captured.out == "resumed from epoch {}, step {}\n".format(*place)
    for (name, x), y in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert [done[:4] for done in history] == [done[:4] for done in expected]
    assert healths(history) == healths(expected)
    warnings = warnings_by_epoch(history)
    assert warnings == warnings_by_epoch(expected) and bool(warnings) == (case == "collapsed")
    repeated = [f"epoch {epoch}: {text}\n" for epoch, text in warnings if epoch >= place[0]]
    assert captured.err == "".join(repeated), "only what is due after the resumed epochs"


def test_earlier_model_gives_the_same_answers(tmp_path):
    given = dict(trunk="small", image_size=8, dim=8, nu=64, batch_size=32, epochs=2, tau=0.7, kappa=0.6)
    model = MiCE(3, **given, random_state=0, verbose=False).fit(IMAGES)
    scores = RunScores(3, 0, 4.5, 4.25, 0.5, 1.0, [50, 40, 10])
    model.comparison_ = Comparison([scores], model.labels_[None].copy())
    model.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        facts = json.loads(file.metadata()["mice"])
        tensors, facts = as_earlier({name: file.get_tensor(name) for name in file.keys()}, facts)
    del facts["sha256"]
    facts["parameters"]["arch"] = facts["parameters"].pop("trunk")
    facts |= dict(format=1, comparison=[renamed(row, SCORES) for row in facts["comparison"]])
    facts["sha256"] = model_hash(tensors, facts)
    save_file(tensors, tmp_path / "old", {"mice": json.dumps(facts)})

    old = MiCE.load(tmp_path / "old")
    assert old.config_ == model.config_ and old.health_ == model.health_
    assert old.comparison_.rows == [scores] and (old.comparison_.clusters == model.labels_).all()
    assert old.model_.tau == model.model_.tau and old.model_.kappa == model.model_.kappa
    assert old.warnings_ == model.warnings_ and (old.labels_ == model.labels_).all()
    np.testing.assert_array_equal(old.predict_proba(IMAGES), model.predict_proba(IMAGES))
    old.save(tmp_path / "again")
    np.testing.assert_array_equal(MiCE.load(tmp_path / "again").transform(IMAGES), model.transform(IMAGES))
