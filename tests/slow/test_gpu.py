"""What only a CUDA GPU can show: its kernels, its captured step, and that the program never waits for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mice.attention import attend, attend_in_chunks, kernel_agrees
from mice.config import Config
from mice.core import toy
from mice.data.views import channel_stats, render
from mice.elbo import mice_objective
from mice.training.engine import CapturedStep, cpu_threads
from mice.training.loop import (
    Callback,
    MiCEModel,
    Run,
    accelerate_step,
    fit,
    init_run,
    make_batch,
    make_step_fn,
    predict,
    train_epoch,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda")
CFG = Config(
    device="cuda",
    arch="small",
    image_size=16,
    n_clusters=5,
    dim=64,
    nu=512,
    ema=0.95,
    epochs=4,
    batch_size=64,
    warmup=1,
    lr=0.2,
)
FLOAT32 = replace(CFG, precision="float32")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    "What other tests compiled does not count against the compiler's limit."
    torch.compiler.reset()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (640, 5, 5, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return np.ascontiguousarray(smooth[:, 1:17, 1:17])


def new_run(images: np.ndarray, cfg: Config) -> Run:
    run = init_run(MiCEModel(cfg, *channel_stats(images)), images, cfg)
    run.model.train()
    return run


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("N, K, D, V", [(256, 10, 128, 16384), (7, 3, 64, 1000), (64, 20, 128, 4096)])
def test_attention(dtype, near, N, K, D, V):
    r = toy(N, K, D, V, noise=3.0)
    query, bank = (x.to(GPU, dtype) for x in (2 * r.f, r.queue))
    exact = attend_in_chunks(query.double(), bank.double())
    for found, wanted in zip(attend(query, bank), exact, strict=True):
        assert (found.double() - wanted).norm() <= near * wanted.norm()
    assert kernel_agrees(query.device, torch.bfloat16, 128), "torch's attention kernel is expected here"


def test_objective_takes_little_memory():
    r = toy(256, 10, 128, 16384, dtype=torch.float32)
    f, v, g, mu, omega, queue = (x.to(GPU) for x in r[:-1])
    f.requires_grad_()

    def forward_and_backward(bank):
        mice_objective(f, v, g, mu, omega, bank, check=False).loss.backward()
        torch.cuda.synchronize()

    for bank in (queue, queue.bfloat16()):
        forward_and_backward(bank)  # a warm-up
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_and_backward(bank)
        assert torch.cuda.max_memory_allocated() - before <= 2 * queue.nbytes


def test_captured_step_is_the_plain_one(images):
    ends, data = [], torch.from_numpy(images).to(GPU)
    for capture in (False, True):
        run = new_run(images, FLOAT32)
        step_fn = make_step_fn(run.model)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            if capture:
                momentum = [state["momentum_buffer"] for state in run.model.optimizer.state.values()]
                state = [*run.model.state_dict().values(), *momentum]
                step_fn = CapturedStep(step_fn, state, make_batch(data, torch.arange(64), run.model, 0, 0))
                assert step_fn.graph is not None
            for _ in range(2):  # two learning rates
                train_epoch(run, data, step_fn)
        weights = {name: x.cpu() for name, x in run.model.state_dict().items()}
        ends.append(([epoch.loss for epoch in run.history], weights))
    (plain_losses, plain), (losses, captured) = ends
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for name, wanted in plain.items():
        found = captured[name]
        if wanted.is_floating_point():
            assert torch.allclose(found, wanted, atol=1e-3, rtol=1e-3), name
        else:  # the queue's position, and the batches that batch-norm has seen
            assert torch.equal(found, wanted), name


class Cooling(Callback):
    "The temperature of the gate is halved in each epoch, in place."

    def on_epoch_start(self, run: Run) -> None:
        run.model.kappa.fill_(0.5**run.epoch)


@pytest.mark.filterwarnings("error:training continues without")  # the step is to be captured
def test_captured_step_follows_a_temperature_that_changes(images):
    def train(mode, callbacks):
        with cpu_threads(1):
            settings = replace(FLOAT32, tau=0.3, lr=0.05, compile=mode)
            model, history = fit(images, settings, callbacks, progress=False)
        assert model.kappa.item() == (0.5**CFG.epochs if callbacks else 1)
        return [epoch.loss for epoch in history], np.array([epoch.sizes for epoch in history])

    plain_losses, plain_sizes = train("off", [Cooling()])
    losses, sizes = train("step", [Cooling()])
    assert losses == pytest.approx(plain_losses, rel=2e-3)
    assert abs(sizes - plain_sizes).max() <= 60, "of 640 images"
    _, sizes = train("off", [])
    assert abs(sizes - plain_sizes).max() > 120, "a constant temperature would give other clusters"


@pytest.mark.parametrize("mode", ["off", "networks", "step"])
def test_no_step_waits_and_nothing_is_compiled_again(images, mode):
    run, data = new_run(images, replace(CFG, compile=mode)), torch.from_numpy(images).to(GPU)
    step_fn = accelerate_step(run, data)
    batches = [make_batch(data, torch.arange(64) + i, run.model, 1, i) for i in range(20)]
    for batch in batches[:3]:
        step_fn(batch)
    torch.cuda.synchronize()
    compiled = counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step_fn(batch) for batch in batches[3:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and counters["stats"]["unique_graphs"] == compiled


def test_views_are_those_of_the_cpu(images):
    pixels = torch.from_numpy(images)
    batches = []
    for device in ("cpu", "cuda"):
        run = new_run(images, replace(CFG, device=device))
        batches.append(make_batch(pixels, torch.arange(64), run.model, 1, 2))
    cpu, gpu = batches
    assert gpu.pixels.is_cuda and torch.equal(cpu.pixels, gpu.pixels.cpu())
    for a, b in zip(cpu.params, gpu.params, strict=True):
        difference = render(cpu.pixels, a) - render(gpu.pixels, b).cpu()
        assert difference.abs().max() < 1e-3


def test_the_fast_way_learns_like_the_plain_one(images):
    curves = []
    for settings in (dict(precision="float32", compile="off"), dict()):
        with cpu_threads(1):
            model, history = fit(images, replace(CFG, **settings), progress=False)
        curves.append([epoch.loss for epoch in history])
        assert predict(model, images, CFG).log_posterior.shape == (640, 5)
    assert np.allclose(*curves, rtol=0.01)
