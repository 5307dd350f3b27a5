"""The loop where an error would be silent: who is called when, what a run leaves behind, what numbers do."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from small_run import CFG, IMAGES
from torch import Tensor

from mice.data.views import channel_stats
from mice.reproduction.two_stage import MoCoModel, extract_features
from mice.training.checkpoints import Checkpointer
from mice.training.loop import Callback, MiCEModel, Run, init_run, predict, train

STEPS = 3  # of an epoch


class Stop(Exception):
    pass


def new_model(cfg=CFG, kind=MiCEModel):
    return kind(cfg, *channel_stats(IMAGES))


def learn(model, cfg=CFG, callbacks=()):
    return train(model, IMAGES, cfg, callbacks, progress=False)


def bits(model) -> dict[str, bytes]:
    "All that a model holds, name by name."
    return {name: x.view(torch.uint8).numpy().tobytes() for name, x in flat_state(model).items()}


def flat_state(model) -> dict[str, Tensor]:
    return {name: x.detach().contiguous().reshape(-1) for name, x in model.state_dict().items()}


# who is called when


class Recorder(Callback):
    "Notes each call; one of them may raise."

    def __init__(self, name: str, calls: list, raises: tuple = ()):
        self.name, self.calls, self.raises = name, calls, raises

    def note(self, hook: str, run: Run) -> None:
        place = hook, run.epoch, run.step
        self.calls.append((self.name, *place))
        if place == self.raises:
            raise Stop(self.name)

    def on_train_start(self, run):
        self.note("train start", run)

    def on_epoch_start(self, run):
        self.note("epoch start", run)

    def on_step_end(self, run):
        self.note("step", run)

    def on_epoch_end(self, run):
        assert run.history[-1].epoch == run.epoch - 1
        self.note("epoch end", run)

    def on_train_end(self, run, error):
        self.calls.append((self.name, "train end", error))
        return True  # a mistake that must not swallow the error


def expected_calls(names: str, since=(1, 0), start=None) -> list[tuple]:
    "Those of a run without an error which resumes after a step of an epoch."
    (first, done), calls = since, [("train start", *(start or (1, 0)))]
    for epoch in range(first, CFG.epochs + 1):
        calls += [("epoch start", epoch, done)]
        calls += [("step", epoch, step) for step in range(done + 1, STEPS + 1)]
        calls += [("epoch end", epoch + 1, 0)]
        done = 0
    in_order = [(name, *call) for call in calls for name in names]
    return in_order + [(name, "train end", None) for name in reversed(names)]


def test_callbacks_are_called_in_order():
    calls = []
    learn(new_model(), callbacks=[Recorder("a", calls), Recorder("b", calls)])
    assert calls == expected_calls("ab")


@pytest.mark.parametrize("stop", [(1, 2), (1, STEPS), (2, 1)])
def test_callbacks_are_called_in_order_by_a_run_that_is_resumed(tmp_path, stop):
    calls, keeper = [], Checkpointer(tmp_path, notify=lambda text: None)

    class Ask(Callback):
        def on_step_end(self, run):
            if (run.epoch, run.step) == stop:
                keeper.request_stop(15)

    with pytest.raises(Exception, match=f"stopped in epoch {stop[0]} after step {stop[1]} and saved"):
        learn(new_model(), callbacks=[Ask(), Recorder("a", calls), keeper])
    assert calls[-2] == ("a", "step", *stop), "what the Checkpointer saves, the callbacks before it have seen"
    resumed, _ = learn(new_model(), callbacks=[Recorder("a", calls := []), Checkpointer(tmp_path)])
    assert calls == expected_calls("a", since=stop)
    assert bits(resumed) == bits(learn(new_model())[0])


@pytest.mark.parametrize(
    "place",
    [
        ("train start", 1, 0),
        ("epoch start", 1, 0),
        ("step", 1, 2),
        ("epoch end", 2, 0),
        ("epoch start", 2, 0),
        ("epoch end", CFG.epochs + 1, 0),
    ],
)
def test_an_error_reaches_the_end_of_every_callback_that_was_started(place):
    calls = []
    first, second, third = Recorder("a", calls), Recorder("b", calls, raises=place), Recorder("c", calls)
    with pytest.raises(Stop) as caught:
        learn(new_model(), callbacks=[first, second, third])
    expected = [call for call in expected_calls("abc") if call[1] != "train end"]
    expected = expected[: expected.index(("b", *place)) + 1]
    started = [name for name, hook, *_ in expected if hook == "train start"]
    assert calls == expected + [(name, "train end", caught.value) for name in reversed(started)]


def test_an_end_that_fails_takes_no_other_end_away():
    class Bad(Callback):
        def on_train_end(self, run, error):
            raise Stop

    calls = []
    with pytest.raises(Stop):
        learn(new_model(), callbacks=[Recorder("a", calls), Bad(), Recorder("c", calls)])
    assert [call[:2] for call in calls[-2:]] == [("c", "train end"), ("a", "train end")]


# what a run leaves behind


class StopAt(Callback):
    def __init__(self, epoch, step):
        self.place = epoch, step

    def on_step_end(self, run):
        if (run.epoch, run.step) == self.place:
            raise Stop


@pytest.mark.parametrize("kind", [MiCEModel, MoCoModel])
@pytest.mark.parametrize("stop", [None, StopAt(2, 2)])
def test_a_trained_model_can_be_used_copied_and_trained_again(kind, stop):
    model = new_model(kind=kind)
    if stop is None:
        assert learn(model)[0] is model and not model.training
    else:
        with pytest.raises(Stop):
            learn(model, callbacks=[stop])
    assert model.optimizer is None
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert bits(twin) == bits(model)
    answer = predict(model, IMAGES, CFG)[0] if kind is MiCEModel else extract_features(model, IMAGES)
    assert answer.isfinite().all()

    fresh, again = new_model(kind=kind), replace(CFG, seed=1)
    fresh.load_state_dict(model.state_dict())
    if kind is MiCEModel:
        fresh.sums.reset()
    expected, history = learn(fresh, again)  # without momentum, and without sums of an unfinished epoch
    for twin in [model, *copies]:
        assert bits(learn(twin, again)[0]) == bits(expected)
    assert history[0].sizes is None or sum(history[0].sizes) == STEPS * CFG.batch_size


# what a number acts on


class Temperatures(Callback):
    "Sets them before each epoch."

    def __init__(self, **values: float):
        self.values = values

    def on_epoch_start(self, run):
        for name, value in self.values.items():
            getattr(run.model, name).fill_(value)


@pytest.mark.parametrize(
    "kind, precision, values",
    [
        (MiCEModel, "float32", dict(tau=0.5)),
        (MiCEModel, "float32", dict(kappa=0.02)),
        (MiCEModel, "bfloat16", dict(tau=0.5, kappa=0.02)),
        (MoCoModel, "float32", dict(tau=0.5)),
    ],
)
def test_a_temperature_set_by_a_callback_is_that_of_a_config(kind, precision, values):
    cfg = replace(CFG, precision=precision)
    other = replace(cfg, **values)
    as_config, expected = learn(new_model(other, kind), other)
    as_callback, history = learn(new_model(cfg, kind), cfg, [Temperatures(**values)])
    assert bits(as_callback) == bits(as_config)
    assert [done.loss for done in history] == [done.loss for done in expected]
    if kind is MiCEModel:
        found, wanted = (predict(model, IMAGES, cfg) for model in (as_callback, as_config))
        assert found.log_posterior.equal(wanted.log_posterior)
    if "tau" not in values:
        assert [done.health for done in history] == [done.health for done in expected]
        assert history[-1].health["gate_saturation"] > 0


class Schedule(Callback):
    "A temperature that changes after each step and each epoch."

    def on_step_end(self, run):
        run.model.kappa.mul_(1.1)

    def on_epoch_end(self, run):
        run.model.tau.mul_(0.8)


@pytest.mark.parametrize("stop", [(1, 2), (1, STEPS), "epoch end"])
def test_a_schedule_is_resumed_where_it_was(tmp_path, stop):
    whole, history = learn(new_model(), callbacks=[Schedule()])
    keeper = Checkpointer(tmp_path, notify=lambda text: None)

    class Ask(Callback):
        def on_step_end(self, run):
            if (run.epoch, run.step) == stop:
                keeper.request_stop(15)

        def on_epoch_end(self, run):
            if stop == "epoch end":
                keeper.request_stop(15)

    with pytest.raises(Exception, match="and saved"):
        learn(new_model(), callbacks=[Schedule(), Ask(), keeper])
    resumed, again = learn(new_model(), callbacks=[Schedule(), Checkpointer(tmp_path)])
    assert bits(resumed) == bits(whole)
    assert [done[:4] + (done.health,) for done in again] == [done[:4] + (done.health,) for done in history]


def test_the_official_epoch_0_fills_queue_and_momentum_and_leaves_the_weights_alone():
    class After(Callback):
        def on_epoch_end(self, run):
            if run.history[-1].epoch == 0:
                self.state = copy.deepcopy(flat_state(run.model))
                moments = [state["momentum_buffer"] for state in run.model.optimizer.state.values()]
                self.momentum = torch.cat([x.flatten() for x in moments])

    cfg, after = replace(CFG, official=True, mu_gradient=False, nu=96, warmup=0), After()
    before = copy.deepcopy(flat_state(new_model(cfg)))
    _, history = learn(new_model(cfg), cfg, [after])
    assert [done.epoch for done in history] == [0, 1, 2] and history[0].lr == 0
    parameters = [name for name, _ in new_model(cfg).named_parameters() if not name.startswith("mu")]
    assert all(after.state[name].equal(before[name]) for name in parameters)
    assert after.momentum.count_nonzero() > 0.9 * len(after.momentum)
    queue = after.state["queue.embeddings"].view(96, 3, 8)
    torch.testing.assert_close(queue.norm(dim=-1), torch.ones(96, 3))  # no row is left of the cube


def test_a_run_that_was_complete_stays_as_it_is(tmp_path):
    model, history = learn(new_model(), callbacks=[Checkpointer(tmp_path, every=0)])
    calls = []
    again, same = learn(new_model(), callbacks=[Recorder("a", calls), Checkpointer(tmp_path)])
    assert bits(again) == bits(model) and same == history
    assert calls == [("a", "train start", 1, 0), ("a", "train end", None)]


def test_the_model_may_be_of_another_config_than_the_run():
    "A warm start with other numbers: those of the run count, in the step as in the history."
    other = replace(CFG, lr=0.3, momentum=0.5, weight_decay=0.01, ema=0.5, mu_closed_form=False, seed=3)
    other = replace(other, tau=0.5, kappa=0.4)
    model = new_model()
    run = init_run(new_model(), IMAGES, other)
    assert run.model.cfg is other and run.model.optimizer.param_groups[0]["momentum"] == 0.5
    fresh = new_model(other)
    fresh.load_state_dict(model.state_dict())
    assert bits(learn(model, other)[0]) == bits(learn(fresh, other)[0])
