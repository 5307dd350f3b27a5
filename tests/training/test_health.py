"""The health check against real training: ruined runs are announced within two epochs, healthy ones never."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from mice.config import Config
from mice.data.images import digits
from mice.data.views import channel_stats
from mice.reproduction.two_stage import fit_moco
from mice.training.health import Health, diagnose, new_warnings
from mice.training.loop import Callback, MiCEModel, fit, train

SMALL = Config(
    image_size=8,
    views="affine",
    arch="small",
    dim=16,
    tau=2.0,
    kappa=2.0,
    nu=128,
    ema=0.9,
    batch_size=32,
    warmup=3,
    milestones=(),
)


@cache
def images(count=200) -> np.ndarray:
    return digits(8).images[:count]


class After(Callback):
    "Does something to the model after one of the epochs."

    def __init__(self, epoch, change):
        self.epoch, self.change = epoch, change

    def on_epoch_end(self, run):
        if run.history[-1].epoch == self.epoch:
            self.change(run.model)


def run(x, cfg, plant=None, late=None) -> list[Health]:
    "The health after each epoch; `plant` ruins the model before the first one, `late` after the second."
    model = MiCEModel(cfg, *channel_stats(x))
    if plant:
        plant(model)
    _, history = train(model, x, cfg, [After(2, late)] if late else [], progress=False)
    return [Health.read(done.health) for done in history]


def announced(history) -> list[int]:
    "The epochs in which a collapse, or a saturated gate, is announced."
    warnings = ((i, text) for i in range(1, len(history) + 1) for text in new_warnings(history[:i]))
    return sorted({i for i, text in warnings if not text.startswith("note")})


@torch.no_grad()
def dead_trunk(model):
    for net in (model.student, model.teacher):
        for p in net.trunk.parameters():
            p.zero_()


@torch.no_grad()
def one_point(model, experts=10):
    "A bias that drowns what the experts see."
    bias = model.student.heads.bias[: experts * model.student.dim]
    bias += 1e4 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def one_answer(model):
    "A bias that drowns what the gate sees."
    model.student.heads.bias[-model.student.dim :] += 1e4 * model.omega[0]


RUINED = {
    "constant images": lambda x, cfg: run(np.full_like(x, 128), cfg),
    "lr 1000": lambda x, cfg: run(x, replace(cfg, lr=1000.0, warmup=0)),
    "weight decay 1": lambda x, cfg: run(x, replace(cfg, weight_decay=1.0, warmup=0)),
    "dead trunk": lambda x, cfg: run(x, cfg, dead_trunk),
    "experts at a point": lambda x, cfg: run(x, cfg, one_point),
    "one expert at a point": lambda x, cfg: run(x, cfg, partial(one_point, experts=1)),
    "gate with one answer": lambda x, cfg: run(x, cfg, one_answer),
    "cold gate with one answer": lambda x, cfg: run(x, replace(cfg, kappa=0.05), one_answer),
    "frozen gate": lambda x, cfg: run(x, replace(cfg, kappa=0.005)),
}
LATE = {"trunk dies": dead_trunk, "experts go to a point": one_point, "gate goes to one answer": one_answer}
HEALTHY = {
    "as it is": {},
    "two clusters": dict(n_clusters=2),
    "no warm-up": dict(warmup=0),
    "long queue": dict(nu=512),
    "official": dict(official=True, mu_gradient=False),
    "omega uniform and learned": dict(omega_start="uniform", omega_gradient=True),
}


def ruined(name, seed=0, x=None, epochs=2) -> list[int]:
    "When a run that is ruined from the start is announced."
    x = images() if x is None else x
    return announced(RUINED[name](x, replace(SMALL, epochs=epochs, seed=seed)))


def ruined_late(name, seed=0, x=None, epochs=4) -> list[int]:
    "When a run that is ruined after its second epoch is announced."
    x = images() if x is None else x
    return announced(run(x, replace(SMALL, epochs=epochs, seed=seed), late=LATE[name]))


def healthy(name, seed=0, x=None, epochs=3) -> list[int]:
    x = images() if x is None else x
    return announced(run(x, replace(SMALL, **HEALTHY[name], epochs=epochs, seed=seed)))


@pytest.mark.parametrize("name", RUINED)
def test_ruined_run_is_announced_in_its_second_epoch(name):
    assert ruined(name) == [2]


@pytest.mark.parametrize("name", LATE)
def test_run_ruined_on_its_way_is_announced_two_epochs_later(name):
    assert ruined_late(name) == [4]


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_is_left_in_peace(name):
    assert healthy(name) == []


@pytest.mark.long
def test_collapse(record):
    x, seeds = images(400), range(10)
    caught = {name: sum(ruined(name, seed, x, epochs=3) == [2] for seed in seeds) for name in RUINED}
    caught |= {name: sum(ruined_late(name, seed, x, epochs=5) == [4] for seed in seeds) for name in LATE}
    total, of = sum(caught.values()), 10 * len(caught)
    measured = f"{total}/{of}, {len(caught)} kinds"
    record("10 seeds of each kind: warned within 2 epochs", measured, total, of, kinds=caught)


@pytest.mark.long
def test_no_false_alarm(record):
    x, seeds = images(400), range(10)
    quiet = {name: sum(healthy(name, seed, x, epochs=12) == [] for seed in seeds) for name in HEALTHY}
    total, of = sum(quiet.values()), 10 * len(quiet)
    measured = f"{of - total}/{of} warned, {len(quiet)} kinds, 12 epochs each"
    record("10 seeds of each kind of healthy run: no warning", measured, total, of, kinds=quiet)


@pytest.mark.parametrize("constant, expected", [(False, []), (True, [2])])
def test_two_stage_has_a_dispersion_alone(constant, expected):
    x = np.full_like(images(), 128) if constant else images()
    _, history = fit_moco(x, replace(SMALL, epochs=3), progress=False)
    history = [Health.read(done.health) for done in history]
    assert announced(history) == expected and history[-1][2:] == (None,) * 5


def test_sorted_images_are_no_alarm():
    "Of images sorted by class, the sample is drawn from all classes."
    data, model = digits(8), MiCEModel(SMALL, torch.tensor([0.3]), torch.tensor([0.4]))
    order = np.argsort(data.labels, kind="stable")

    def dispersion(rows):
        return diagnose(model, 1, [40] * 10, torch.from_numpy(data.images[rows])).dispersion

    assert dispersion(order) == pytest.approx(dispersion(slice(None)), rel=0.2)
    one_class = dispersion(order[:150])
    assert one_class < 0.8 * dispersion(order), "one class alone differs less: the test could not fail"


def test_diagnosing_changes_nothing():
    class Diagnose(Callback):
        def on_step_end(self, run):
            diagnose(run.model, run.epoch, [40] * 10, torch.from_numpy(run.images[:64]))

    cfg, state = replace(SMALL, epochs=2), torch.get_rng_state()
    alone, history = fit(images(), cfg, progress=False)
    watched, same = fit(images(), cfg, [Diagnose()], progress=False)
    assert [done[:4] for done in history] == [done[:4] for done in same]
    assert torch.equal(state, torch.get_rng_state())
    for x, y in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(x, y)
