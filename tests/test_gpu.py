"""What only a CUDA GPU can show: its kernels, its recorded step, and that the program never waits for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mice import training
from mice.core import Config, toy
from mice.elbo import attend, attend_in_chunks, kernel_agrees, mice_objective
from mice.engine import Recorded, cpu_threads
from mice.training import MiCEModel, batch_of, begin, em_step, fast, fit, looking, m_step, predict, train_epoch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CFG = Config(device="cuda", arch="small", image_size=16, n_clusters=5, dim=64, nu=512, ema=0.95, epochs=4, batch_size=64, warmup=1, lr=0.2)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (640, 5, 5, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return np.ascontiguousarray(smooth[:, 1:17, 1:17])


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("N, K, D, V", [(256, 10, 128, 16384), (7, 3, 64, 1000), (64, 20, 128, 4096)])
def test_attention(dtype, near, N, K, D, V):
    r = toy(N, K, D, V, spread=3.0)
    query, bank = (x.to("cuda", dtype) for x in (r.f, r.queue))
    exact = attend_in_chunks(query.double(), bank.double(), 0.5)
    for found, wanted in zip(attend(query, bank, 0.5), exact):
        assert (found.double() - wanted).norm() <= near * wanted.norm()
    assert kernel_agrees(query.device, torch.bfloat16, 128), "torch's attention kernel is expected here"


def test_objective_takes_little_memory():
    r = toy(256, 10, 128, 16384, dtype=torch.float32)
    f, v, g, mu, omega, queue = (x.cuda() for x in r[:-1])
    for bank in (queue, queue.bfloat16()):
        mice_objective(f.requires_grad_(), v, g, mu, omega, bank, check=False).loss.backward()
        torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mice_objective(f.requires_grad_(), v, g, mu, omega, bank, check=False).loss.backward()
        assert torch.cuda.max_memory_allocated() - before <= 2 * queue.nbytes


def test_recorded_step_is_the_plain_one(images):
    ends = []
    for recorded in (False, True):
        run = begin(MiCEModel, images, replace(CFG, precision="float32", deterministic=True))
        data = torch.from_numpy(images).cuda()
        plain = looking(em_step, run.model, run.optimizer, run.cfg)
        state = [*run.model.state_dict().values(), *(s["momentum_buffer"] for s in run.optimizer.state.values())]
        work = Recorded(plain, state, batch_of(data, torch.arange(64), run.model, run.cfg, 0, 0)) if recorded else plain
        for _ in range(2):  # two learning rates
            train_epoch(run, data, em_step, m_step, work=work)
        ends.append((run.history, {name: x.cpu() for name, x in run.model.state_dict().items()}))
    (one, a), (two, b) = ends
    assert [e.loss for e in one] == pytest.approx([e.loss for e in two], rel=1e-5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3, msg=lambda text: f"{name}: {text}")
    assert torch.equal(a["queue.position"], b["queue.position"])
    tracked = [name for name in a if name.endswith("num_batches_tracked")]
    assert tracked and all(torch.equal(a[name], b[name]) for name in tracked)


@pytest.mark.parametrize("how", ["off", "networks", "step"])
def test_no_step_waits_and_nothing_is_compiled_again(images, how):
    run = begin(MiCEModel, images, replace(CFG, compile=how))
    data = torch.from_numpy(images).cuda()
    work = fast(run, data, em_step)
    batches = [batch_of(data, torch.arange(64) + i, run.model, run.cfg, 1, i) for i in range(20)]
    for batch in batches[:3]:
        work(batch)
    torch.cuda.synchronize()
    from torch._dynamo.utils import counters

    compiled = counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [work(batch) for batch in batches[3:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and counters["stats"]["unique_graphs"] == compiled


def test_views_are_those_of_the_cpu(images):
    cpu, gpu = begin(MiCEModel, images, replace(CFG, device="cpu")), begin(MiCEModel, images, CFG)
    x, y = (batch_of(torch.from_numpy(images), torch.arange(64), run.model, CFG, 1, 2) for run in (cpu, gpu))
    for a, b in zip(x.draws, y.draws):
        near = (training.render(x.pixels, a) - training.render(y.pixels, b).cpu()).abs()
        assert near.max() < 1e-3


def test_the_fast_way_learns_like_the_plain_one(images):
    curves = []
    for settings in (dict(precision="float32", compile="off"), dict()):
        with cpu_threads(1):
            model, history = fit(images, replace(CFG, **settings), progress=False)
        curves.append([e.loss for e in history])
        assert predict(model, images, CFG).log_posterior.shape == (640, 5)
    assert np.allclose(*curves, rtol=0.01)
