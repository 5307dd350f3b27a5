"""The collapse monitor against real training: ruined on purpose, it speaks within two epochs; healthy, it is silent."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from mice.core import Config
from mice.data import digits
from mice.health import Health, alarms, look
from mice.training import MiCEModel, em_step, fit, m_step, train
from mice.two_stage import fit_moco

SMALL = Config(image_size=8, views="affine", arch="small", dim=16, tau=2.0, kappa=2.0, nu=128, ema=0.9, batch_size=32, warmup=3, milestones=())


@cache
def images(count: int = 400) -> np.ndarray:
    return digits(8).images[:count]


def watch(x, cfg, plant=None, late=None) -> list[Health]:
    "Train, looking after every epoch; `plant` ruins the model before the first epoch, `late` after the second."
    history, data = [], torch.from_numpy(x)

    def begin(*parts):
        model = MiCEModel(*parts)
        if plant:
            plant(model)
        return model

    def note(model, done):
        history.append(look(model, done.epoch, done.sizes, data, cfg))
        if late and done.epoch == 2:
            late(model)

    train(begin, em_step, m_step, x, cfg, note, progress=False)
    return history


def collapses(history) -> list[int]:
    "The epochs in which a collapse, or a saturated gate, is announced."
    spoken = ((i, text) for i in range(1, len(history) + 1) for text in alarms(history[:i]))
    return sorted({i for i, text in spoken if not text.startswith("note")})


@torch.no_grad()
def dead_trunk(model):
    for net in (model.student, model.teacher):
        for p in net.trunk.parameters():
            p.zero_()


@torch.no_grad()
def one_point(model, experts=10):
    "A bias that drowns what the experts see."
    rows = slice(0, experts * model.student.dim)
    model.student.heads.bias[rows] += 1e4 * torch.randn(model.student.heads.bias[rows].shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def one_answer(model):
    "A bias that drowns what the gate sees."
    model.student.heads.bias[-model.student.dim :] += 1e4 * model.omega[0]


RUINED = {
    "constant images": lambda cfg: watch(np.full_like(images(), 128), cfg),
    "lr 1000": lambda cfg: watch(images(), replace(cfg, lr=1000.0, warmup=0)),
    "weight decay 1": lambda cfg: watch(images(), replace(cfg, weight_decay=1.0, warmup=0)),
    "dead trunk": lambda cfg: watch(images(), cfg, dead_trunk),
    "experts at a point": lambda cfg: watch(images(), cfg, one_point),
    "one expert at a point": lambda cfg: watch(images(), cfg, partial(one_point, experts=1)),
    "gate with one answer": lambda cfg: watch(images(), cfg, one_answer),
    "cold gate with one answer": lambda cfg: watch(images(), replace(cfg, kappa=0.05), one_answer),
    "frozen gate": lambda cfg: watch(images(), replace(cfg, kappa=0.005)),
}
LATE = {"trunk dies": dead_trunk, "experts go to a point": one_point, "gate goes to one answer": one_answer}
HEALTHY = {
    "as it is": lambda cfg: watch(images(), cfg),
    "two clusters": lambda cfg: watch(images(), replace(cfg, n_clusters=2)),
    "no warm-up": lambda cfg: watch(images(), replace(cfg, warmup=0)),
    "long queue": lambda cfg: watch(images(), replace(cfg, nu=512)),
    "released": lambda cfg: watch(images(), replace(cfg, released=True, mu_gradient=False)),
    "omega uniform and learned": lambda cfg: watch(images(), replace(cfg, omega_start="uniform", omega_gradient=True)),
}


def first(name, seed) -> list[int]:
    "When a run that is ruined from the start is announced."
    return collapses(RUINED[name](replace(SMALL, epochs=3, seed=seed)))


def later(name, seed) -> list[int]:
    "When a run that is ruined after its second epoch is announced."
    return collapses(watch(images(), replace(SMALL, epochs=5, seed=seed), late=LATE[name]))


def healthy(name, seed, epochs) -> list[int]:
    return collapses(HEALTHY[name](replace(SMALL, epochs=epochs, seed=seed)))


@pytest.mark.parametrize("name", RUINED)
def test_ruined_run_is_announced_in_its_second_epoch(name):
    assert first(name, seed=0) == [2]


@pytest.mark.parametrize("name", LATE)
def test_run_ruined_on_its_way_is_announced_two_epochs_later(name):
    assert later(name, seed=0) == [4]


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_is_left_in_peace(name):
    assert healthy(name, seed=0, epochs=3) == []


@pytest.mark.long
def test_collapse(record):
    caught = {name: sum(first(name, seed) == [2] for seed in range(10)) for name in RUINED} | {name: sum(later(name, seed) == [4] for seed in range(10)) for name in LATE}
    total, of = sum(caught.values()), 10 * len(caught)
    record("10 seeds of each kind: warned within 2 epochs", f"{total}/{of}, {len(caught)} kinds", total, of, kinds=caught)


@pytest.mark.long
def test_no_false_alarm(record):
    quiet = {name: sum(healthy(name, seed, epochs=12) == [] for seed in range(10)) for name in HEALTHY}
    total, of = sum(quiet.values()), 10 * len(quiet)
    record("10 seeds of each kind of healthy run: no warning", f"{of - total}/{of} warned, {len(quiet)} kinds, 12 epochs each", total, of, kinds=quiet)


def two_stage(x, cfg) -> list[Health]:
    history, data = [], torch.from_numpy(x)
    fit_moco(x, cfg, lambda model, done: history.append(look(model, done.epoch, done.sizes, data, cfg)), progress=False)
    return history


def test_two_stage_has_a_spread_alone():
    cfg = replace(SMALL, epochs=3)
    living, ruined = two_stage(images(), cfg), two_stage(np.full_like(images(), 128), cfg)
    assert (collapses(living), collapses(ruined)) == ([], [2])
    assert living[-1][2:] == (None,) * 5


def test_sorted_images_are_no_alarm():
    "Images sorted by class: the ones looked at are drawn from all of them."
    data = digits(8)
    order = np.argsort(data.labels, kind="stable")
    model = MiCEModel(SMALL, torch.tensor([0.3]), torch.tensor([0.4]))
    seen = [look(model, 1, [40] * 10, torch.from_numpy(data.images[rows]), SMALL).spread for rows in (order, slice(None))]
    assert seen[0] == pytest.approx(seen[1], rel=0.2)
    first = look(model, 1, [40] * 10, torch.from_numpy(data.images[order[:150]]), SMALL).spread
    assert first < 0.8 * seen[0], "one class alone differs less: the test could not fail"


def test_same_bits_whether_anybody_looks_or_not():
    cfg = replace(SMALL, epochs=3)
    data, state = torch.from_numpy(images()), torch.get_rng_state()
    run = lambda note: fit(images(), cfg, note, progress=False)
    (alone, said), (watched, same) = run(lambda model, done: None), run(lambda model, done: look(model, done.epoch, done.sizes, data, cfg))
    assert [e[:4] for e in said] == [e[:4] for e in same] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True))
