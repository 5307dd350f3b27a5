"""Properties of the mathematics on random sizes, against oracles in Python's own floats and loops."""

import math
import random
from collections import deque
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from mice.attention import QueueLogSumExp, attend_fused, attend_in_chunks, queue_parts
from mice.config import Config, config_from
from mice.core import check_positive, toy, unit
from mice.elbo import elbo, log_marginal, loss_bounds, mice_objective
from mice.estep import log_posterior
from mice.experts import log_partition, log_phi
from mice.gating import log_gate, simplex_prototypes
from mice.mstep import PrototypeSum
from mice.normalizer import Queue, log_partition_hat

# ---- The oracles: lists of floats, one number at a time. ----


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def lse(scores):
    top = max(scores)
    return top + math.log(math.fsum(math.exp(s - top) for s in scores)) if top > -math.inf else top


def direction(x):
    top = max(map(abs, x)) or 1.0
    x = [a / top for a in x]  # also subnormal numbers then have all their digits
    norm = math.hypot(*x) or 1.0
    return [a / norm for a in x]


def log_softmax_by_loops(scores):
    return [s - lse(scores) for s in scores]


def phi_by_loops(f, v, mu, tau):
    def score(n, k):
        query = [a + b for a, b in zip(f[n][k], direction(mu[k]), strict=True)]
        return dot(v[n][k], query) / tau

    return [[score(n, k) for k in range(len(mu))] for n in range(len(f))]


def partition_by_loops(f, bank, mu, tau):
    "log Z: over a bank whose m-th entry plays the teacher of every image."
    scores = [[phi_by_loops([row], [entry], mu, tau)[0] for entry in bank] for row in f]  # (N, M, K)
    return [[lse([entry[k] for entry in entries]) for k in range(len(mu))] for entries in scores]


def partition_hat_by_loops(f, v, queue, mu, tau):
    return [partition_by_loops([f[n]], [v[n], *queue], mu, tau)[0] for n in range(len(f))]


def gate_by_loops(g, omega, kappa):
    return [log_softmax_by_loops([dot(row, w) / kappa for w in omega]) for row in g]


def objective_by_loops(f, v, g, mu, omega, queue, tau, kappa):
    "Loss, log posterior, log gate: Eq. (4)-(11) as they stand in the paper."
    log_pi, phi = gate_by_loops(g, omega, kappa), phi_by_loops(f, v, mu, tau)
    z = partition_hat_by_loops(f, v, queue, mu, tau)
    joint = [[log_pi[n][k] + phi[n][k] - z[n][k] for k in range(len(mu))] for n in range(len(f))]
    return -math.fsum(map(lse, joint)) / len(f), list(map(log_softmax_by_loops, joint)), log_pi


def objective_in_float64(f, v, g, mu, omega, queue, tau, kappa):
    "The same with whole tensors, for sizes at which loops take too long; differentiable."
    f, v, g, mu, omega, queue = (x.double() for x in (f, v, g, mu, omega, queue))
    query = f + mu / mu.norm(dim=-1, keepdim=True)
    positive, negatives = (query * v).sum(-1, keepdim=True), torch.einsum("nkd,vkd->nkv", query, queue)
    log_p = torch.log_softmax(torch.cat([positive, negatives], -1) / tau, -1)[..., 0]
    return -(torch.log_softmax(g @ omega.T / kappa, -1) + log_p).logsumexp(-1).mean()


# ---- Random problems. ----


class Problem(NamedTuple):
    "Sizes, temperatures, and how the vectors lie; the tensors follow from these."

    N: int = 2
    K: int = 3
    D: int = 4
    V: int = 5
    tau: float = 1.0
    kappa: float = 1.0
    seed: int = 0
    kind: str = "generic"

    def tensors(self, dtype=torch.float64) -> list[Tensor]:
        "f, v, g, mu, omega, queue"
        rng = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)

        N, K, D, V = self[:4]
        f, v, g = draw(N, K, D), draw(N, K, D), draw(N, D)
        mu, omega, queue = 3 * draw(K, D), draw(K, D), draw(V, K, D)
        if self.kind == "ties":  # every image and every cluster alike, negatives in pairs
            f, v, queue = (x[:, :1].expand_as(x) for x in (f, v, queue))
            f, v, g, mu, omega = (x[:1].expand_as(x) for x in (f, v, g, mu, omega))
            queue = queue[torch.arange(V) // 2]
        if self.kind == "equal":  # the queue holds nothing but one positive
            queue = v[:1].expand_as(queue)
        if self.kind == "easy":  # student = teacher = prototype, the queue opposite
            f, mu, queue = v, 3 * v[0], -v[:1].expand_as(queue)
        if self.kind == "hard":  # the other way round
            f, mu, queue = -v, -3 * v[0], v[:1].expand_as(queue)
        return [x.clone().to(dtype) for x in (f, v, g, mu, omega, queue)]


KINDS = ["generic", "ties", "equal", "easy", "hard"]
temperature = st.floats(0.05, 3)
seeds = st.integers(0, 2**31)
kinds = st.sampled_from(KINDS)
sizes = st.integers(1, 6), st.integers(2, 6), st.integers(1, 8), st.integers(1, 12)
problems = st.builds(Problem, *sizes, temperature, temperature, seeds, kinds)
small_sizes = st.integers(1, 3), st.integers(2, 3), st.integers(1, 4), st.integers(1, 5)
small = st.builds(Problem, *small_sizes, st.floats(0.2, 3), st.floats(0.2, 3), seeds, kinds)


def corners(test):
    "Always also these: K = 2, N = 1, nu = 1, ties, all-equal queues, sharp temperatures."
    for kind in KINDS:
        test = example(p=Problem(1, 2, 1, 1, 0.05, 0.05, 0, kind))(test)
        test = example(p=Problem(2, 2, 3, 4, 3.0, 0.05, 1, kind))(test)
    return test


def assert_close(got: Tensor, wanted, tol: float = 1e-10) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert got.shape == wanted.shape and torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), wanted, rtol=tol, atol=tol)


# ---- Each equation against its oracle. ----


@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 3), min_size=1, max_size=4), st.integers(-150, 150))
@example([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]], 0)
@example([[0.0, 5e-324, 0.0]], 0)
def test_unit(rows, power):
    x = torch.tensor(rows, dtype=torch.float64).mul(10.0**power).requires_grad_()
    y = unit(x)
    assert_close(y.detach(), [direction(row) for row in x.tolist()], tol=1e-12)
    y.sum().backward()
    largest = x.detach().abs().amax(-1)
    assert torch.isfinite(x.grad[largest > 1e-300]).all() and (x.grad[largest == 0].abs() <= 1).all()


@corners
@given(p=problems)
def test_gate(p):
    g, omega = p.tensors()[2], p.tensors()[4]
    log_pi = log_gate(g, omega, p.kappa)
    assert_close(log_pi, gate_by_loops(g.tolist(), omega.tolist(), p.kappa))
    assert_close(log_pi.logsumexp(-1), [0.0] * p.N)


@corners
@given(p=problems)
def test_experts_and_normaliser(p):
    f, v, _, mu, _, queue = p.tensors()
    lists = [x.tolist() for x in (f, v, mu, queue)]
    assert_close(log_phi(f, v, mu, p.tau), phi_by_loops(*lists[:3], p.tau))
    assert_close(log_partition(f, queue, mu, p.tau), partition_by_loops(lists[0], lists[3], lists[2], p.tau))
    log_z_hat = log_partition_hat(f, v, queue, mu, p.tau)
    assert_close(log_z_hat, partition_hat_by_loops(lists[0], lists[1], lists[3], lists[2], p.tau))
    assert (log_phi(f, v, mu, p.tau) < log_z_hat + 1e-12).all()


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 60), seeds, st.booleans())
def test_bound_and_posterior(N, K, scale, seed, certain):
    rng = torch.Generator().manual_seed(seed)
    log_pi, log_p, log_q = (scale * torch.randn(N, K, generator=rng, dtype=torch.float64) for _ in range(3))
    log_pi, log_q = log_pi.log_softmax(-1), log_q.log_softmax(-1)
    if certain:  # all on one cluster: the others have log_q = -inf
        log_q = torch.where(torch.arange(K) == K - 1, 0.0, -math.inf).expand(N, K).double()
    pi, p, q = log_pi.tolist(), log_p.tolist(), log_q.tolist()
    joint = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(pi, p, strict=True)]
    bound = [
        math.fsum(math.exp(c) * (b - c) for b, c in zip(*rows, strict=True) if c > -math.inf)
        for rows in zip(joint, q, strict=True)
    ]
    assert_close(elbo(log_pi, log_p, log_q), bound, tol=1e-9)
    assert_close(log_marginal(log_pi, log_p), [lse(row) for row in joint])
    posterior = log_posterior(log_pi, log_p)
    assert_close(posterior, [log_softmax_by_loops(row) for row in joint])
    assert (elbo(log_pi, log_p, log_q) <= log_marginal(log_pi, log_p) + 1e-9).all()
    assert_close(elbo(log_pi, log_p, posterior), log_marginal(log_pi, log_p), tol=1e-9)


@given(st.integers(2, 40), st.integers(0, 30))
@example(2, 0)
def test_simplex(K, spare):
    D = K - 1 + spare
    omega = simplex_prototypes(K, D)
    corner = [[0.0] * D for _ in range(K)]  # the Max-Mahalanobis recursion, row by row
    for k in range(K):
        for j in range(min(k, K - 1)):
            corner[k][j] = -(1 / (K - 1) + dot(corner[k][:j], corner[j][:j])) / corner[j][j]
        if k < K - 1:
            corner[k][k] = math.sqrt(1 - dot(corner[k], corner[k]))
    assert omega.dtype == torch.float32
    assert_close(omega, corner, tol=1e-6)
    cosines = torch.full((K, K), -1 / (K - 1), dtype=torch.float64).fill_diagonal_(1)
    assert_close(omega.double() @ omega.double().T, cosines, tol=1e-6)


queue_sizes = st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)


@given(*queue_sizes, st.lists(st.integers(0, 20), max_size=8), seeds)
@example(1, 1, 1, [1, 2, 0, 3], 0)
@example(4, 2, 2, [3, 3, 8, 9, 4], 1)
def test_queue(size, K, D, batches, seed):
    "A deque of the same length; also after some batches and a new queue restored from the state."
    queue, rng = Queue(size, K, D), torch.Generator().manual_seed(seed)
    model = deque(queue.embeddings.clone(), maxlen=size)
    for i, N in enumerate(batches):
        v = torch.randn(N, K, D, generator=rng)
        if i == seed % 4:
            state = {name: x.clone() for name, x in queue.state_dict().items()}
            queue = Queue(size, K, D, seed=1)
            queue.load_state_dict(state)
        queue.enqueue(v)
        model.extend(v)
        oldest_first = queue.embeddings.roll(-int(queue.position), 0)
        assert torch.equal(oldest_first, torch.stack(list(model)))


batch_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(st.integers(1, 5), st.integers(1, 4), batch_sizes, seeds, st.booleans())
def test_prototype_sum(K, D, batches, seed, soft):
    rng, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    sums = PrototypeSum(K, D).double()
    previous = unit(torch.randn(K, D, generator=rng, dtype=torch.float64))
    oracle = [[0.0] * D for _ in range(K)]
    empty = chance.randrange(K)  # nothing goes to this cluster, unless there is only one
    for N in batches:
        v = unit(torch.randn(N, K, D, generator=rng, dtype=torch.float64))
        if soft:
            assignment = torch.rand(N, K, generator=rng, dtype=torch.float64)
            assignment[:, empty] = 0
        else:
            others = [k for k in range(K) if k != empty or K == 1]
            assignment = torch.tensor([chance.choice(others) for _ in range(N)])
        sums.add(v, assignment)
        for n in range(N):
            for k in range(K):
                weight = assignment[n, k].item() if soft else float(assignment[n] == k)
                oracle[k] = [s + weight * x for s, x in zip(oracle[k], v[n, k].tolist(), strict=True)]
    wanted = [direction(row) if any(row) else previous[k].tolist() for k, row in enumerate(oracle)]
    assert_close(sums.prototypes(previous), wanted, tol=1e-9)
    sums.reset()
    assert torch.equal(sums.prototypes(previous), unit(previous)) and sums.counts.sum() == 0


# ---- The objective. ----


@corners
@example(p=Problem(3, 1, 2, 4))
@given(p=problems)
def test_objective(p):
    tensors = p.tensors()
    loss, posterior, log_pi = objective_by_loops(*[x.tolist() for x in tensors], p.tau, p.kappa)
    got = mice_objective(*tensors, p.tau, p.kappa)
    assert_close(got.loss, loss)
    assert_close(got.log_posterior, posterior, tol=1e-9)
    assert_close(got.log_pi, log_pi)
    low, high = loss_bounds(p.V, p.tau)
    assert low - 1e-9 <= got.loss <= high + 1e-9
    assert_close(objective_in_float64(*tensors, p.tau, p.kappa), loss)  # the oracle for large sizes, below


@given(*sizes, temperature, seeds)
def test_objective_of_equal_embeddings(N, K, D, V, tau, seed):
    "If positive and negatives are alike, the loss is log(nu + 1), whatever the experts and the gate."
    f, v, g, mu, omega, _ = Problem(N, K, D, V, seed=seed).tensors()
    v = v[:1].expand_as(v)
    assert_close(mice_objective(f, v, g, mu, omega, v[:1].expand(V, K, D), tau).loss, math.log(V + 1))


def gradients(objective, tensors, *rest) -> list[Tensor]:
    "Of the loss with respect to f, g, mu, in that order."
    inputs = [x.clone().requires_grad_() for x in tensors]
    loss = objective(*inputs, *rest)
    loss = getattr(loss, "loss", loss)
    return list(torch.autograd.grad(loss, [inputs[i] for i in (0, 2, 3)]))


@corners
@given(p=problems)
@settings(max_examples=40)
def test_gradient_is_that_of_the_oracle(p):
    "Central differences of the loops, along random directions."
    tensors, chance = p.tensors(), random.Random(p.seed)
    lists, h = [x.tolist() for x in tensors], 1e-5 * p.tau
    found = gradients(mice_objective, tensors, p.tau, p.kappa)
    for i, gradient in zip((0, 2, 3), found, strict=True):
        signs = [chance.choice([-1.0, 1.0]) for _ in range(gradient.numel())]
        step = torch.tensor(signs).double().view_as(gradient)
        ends = [(tensors[i] + s * step).tolist() for s in (h, -h)]
        up, down = (objective_by_loops(*lists[:i], x, *lists[i + 1 :], p.tau, p.kappa)[0] for x in ends)
        slope = (up - down) / (2 * h)
        assert (gradient * step).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


@given(p=small)
@settings(max_examples=15)
def test_gradcheck(p):
    f, v, g, mu, omega, queue = p.tensors()
    inputs = [x.requires_grad_() for x in (f, g, mu)]

    def objective(f: Tensor, g: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
        return tuple(mice_objective(f, v, g, mu, omega, queue, p.tau, p.kappa))

    assert torch.autograd.gradcheck(objective, inputs)


def test_no_gradient_reaches_teacher_and_queue():
    f, v, g, mu, omega, queue = (x.requires_grad_() for x in Problem().tensors())
    mice_objective(f, v, g, mu, omega, queue).loss.backward()
    assert v.grad is None and queue.grad is None
    assert all(x.grad.abs().sum() > 0 for x in (f, g, mu))


def test_float32_is_accurate():
    "200 random problems: 1e-6 in the loss, 1e-5 in the gradients, relative to float64."
    chance = random.Random(0)
    sizes = [Problem(64, 10, 64, 1000), Problem(256, 10, 128, 500), Problem(1, 2, 1, 1)]
    while len(sizes) < 200:
        kind = chance.choice(KINDS)
        sharpest = 0.05 if kind == "generic" else 0.25  # scores of size 4/tau have rounding errors in float32
        tau, kappa = chance.uniform(sharpest, 3), chance.uniform(sharpest, 3)
        K, D = chance.randint(2, 20), chance.randint(1, 128)
        N, V = chance.choice([1, 2, 7, 32]), chance.choice([1, 2, 65, 300])
        sizes.append(Problem(N, K, D, V, tau, kappa, len(sizes), kind))
    for p in sizes:
        tensors = p.tensors(torch.float32)
        wanted = objective_in_float64(*tensors, p.tau, p.kappa).item()
        loss = mice_objective(*tensors, p.tau, p.kappa).loss.item()
        assert abs(loss - wanted) <= 1e-6 * max(1, abs(wanted)), p
        exact = gradients(objective_in_float64, tensors, p.tau, p.kappa)
        found = gradients(mice_objective, tensors, p.tau, p.kappa)
        for got, true, scale in zip(found, exact, (p.tau, p.kappa, p.tau), strict=True):
            floor = 0.2 / scale  # gradients are sums of terms of size 1/tau that may cancel to nothing
            assert (got - true).norm() <= 1e-5 * max(true.norm().item(), floor), p


@given(p=problems)
def test_temperatures_may_be_tensors(p):
    "The same numbers as with floats, and a change in place counts for the next call."
    tensors = p.tensors()
    tau, kappa = (torch.tensor(x, dtype=torch.float64) for x in (p.tau, p.kappa))
    for _ in range(2):
        got = mice_objective(*tensors, tau, kappa)
        for a, b in zip(got, mice_objective(*tensors, tau.item(), kappa.item()), strict=True):
            assert torch.equal(a, b)
        found = gradients(mice_objective, tensors, tau, kappa)
        for a, b in zip(found, gradients(mice_objective, tensors, tau.item(), kappa.item()), strict=True):
            assert torch.equal(a, b)
        tau.mul_(1.5)
        kappa.mul_(0.5)


def test_temperature_may_change_between_loss_and_gradient():
    "The gradient is that of the temperature the loss was computed with."
    query, bank, tau = torch.randn(3, 2, 4).requires_grad_(), torch.randn(5, 2, 4), torch.tensor(0.5)
    (wanted,) = torch.autograd.grad(QueueLogSumExp.apply(query, bank, 0.5).sum(), query)
    total = QueueLogSumExp.apply(query, bank, tau).sum()
    tau.fill_(7.0)
    assert torch.equal(torch.autograd.grad(total, query)[0], wanted)


# ---- Attention. ----


@given(st.integers(1, 20000), st.integers(1, 300))
@example(16384, 10)
def test_parts_of_the_queue(V, K):
    "A power of two that divides V and, with K experts, makes at most 160 blocks; the largest such."
    powers = [2**i for i in range(20)]
    assert queue_parts(V, K) == max(s for s in powers if s == 1 or (V % s == 0 and s * K <= 160))


@given(*sizes, seeds, st.sampled_from([1, 2, 4, 8]))
def test_attention_in_parts(N, K, D, V, seed, parts):
    "torch's kernel on parts of the bank, merged, gives what all scores in memory give."
    r = toy(N, K, max(D, 2), V * parts, noise=1.0, seed=seed)
    scores = torch.einsum("nkd,vkd->nkv", r.f, r.queue)
    for lse, mean in (attend_fused(r.f, r.queue, parts), attend_in_chunks(r.f, r.queue)):
        assert_close(lse, scores.logsumexp(-1))
        assert_close(mean, torch.einsum("nkv,vkd->nkd", scores.softmax(-1), r.queue))


class Largest(TorchDispatchMode):
    "Remembers the size of the largest tensor any operation makes."

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, Tensor))])
        return result


LARGE = [Problem(256, 10, 16, 4096), Problem(2, 3, 8, 5000), Problem(300, 2, 4, 300)]


@pytest.mark.parametrize("p", LARGE, ids=str)
def test_memory_stays_below_the_promise(p):
    "O(N K D + K V D), and nothing of size N K V, forward or backward."
    N, K, D, V = p[:4]
    inputs = [x.requires_grad_() for x in p.tensors(torch.float32)]
    with Largest() as largest:
        mice_objective(*inputs).loss.backward()
    assert 0 < largest.elements <= 2 * max(N * K * D, K * V * D)


# ---- Bad input is refused, and the message says what was expected and what came. ----

GOOD = dict(zip("f v g mu omega queue".split(), Problem(2, 3, 4, 5).tensors(), strict=True))
f, v, g, mu, omega, queue = GOOD.values()
NAN, INF = torch.full_like(f, math.nan), torch.full_like(queue, math.inf)
LEARNED = torch.ones((), requires_grad=True)


def objective(**changed):
    return mice_objective(**(GOOD | changed))


BAD = {
    "tau zero": (lambda: objective(tau=0), "tau must be", "got 0"),
    "tau negative": (lambda: log_phi(f, v, mu, tau=-1.5), "tau must be", "got -1.5"),
    "tau nan": (lambda: log_partition_hat(f, v, queue, mu, tau=math.nan), "tau must be", "got nan"),
    "tau tensor": (lambda: objective(tau=torch.tensor(-2.0)), "tau must be", "got -2.0"),
    "tau shape": (lambda: log_phi(f, v, mu, torch.ones(2)), "tau must be a single number", "got shape (2,)"),
    "tau learned": (lambda: objective(tau=LEARNED), "tau must not require a gradient"),
    "kappa negative": (lambda: objective(kappa=-1), "kappa must be", "got -1"),
    "kappa infinite": (lambda: log_gate(g, omega, kappa=math.inf), "kappa must be", "got inf"),
    "scalar": (lambda: check_positive(nu=0), "nu must be", "above 0", "got 0"),
    "K below 2": (lambda: simplex_prototypes(1, 4), "K must be at least 2", "got 1"),
    "D below K - 1": (lambda: simplex_prototypes(10, 8), "D must be at least K - 1 = 9", "got 8"),
    "n_clusters": (lambda: Config(n_clusters=1), "n_clusters must be at least 2", "got 1"),
    "dim": (lambda: Config(n_clusters=10, dim=8), "dim must be at least n_clusters - 1 = 9", "got 8"),
    "type": (lambda: Config(tau="1e-3"), "tau must be float", "'1e-3'"),
    "name": (lambda: config_from({"n_cluster": 3}), "unknown parameter 'n_cluster'", "mean 'n_clusters'"),
    "v shape": (lambda: objective(v=v[:1]), "v must have shape (N=2, K=3, D=4)", "(1, 3, 4)"),
    "g shape": (lambda: objective(g=g[:, :2]), "g must have shape (N=2, D=4)", "(2, 2)"),
    "mu shape": (lambda: log_phi(f, v, mu[:2]), "mu must have shape (K=3, D=4)", "(2, 4)"),
    "omega shape": (lambda: log_gate(g, omega[:, :1]), "omega must have shape (K, D=4)", "(3, 1)"),
    "bank shape": (lambda: log_partition(f, queue[:, :2], mu), "bank must have shape (M, K=3, D=4)", "(5, 2"),
    "queue shape": (lambda: objective(queue=queue[0]), "queue must have shape (V, K=3, D=4)", "(3, 4)"),
    "enqueue shape": (lambda: Queue(5, 3, 4).enqueue(f[..., :2]), "v must have shape (N, K=3, D=4)", "3, 2)"),
    "queue size": (lambda: Queue(0, 3, 4), "size must be", "got 0"),
    "weights": (lambda: PrototypeSum(3, 4).add(v, torch.ones(2, 2)), "assignment must have shape (N=2, K=3)"),
    "previous": (lambda: PrototypeSum(3, 4).prototypes(mu[:2]), "previous must have shape (K=3, D=4)", "(2,"),
    "no negatives": (lambda: objective(queue=queue[:0]), "V must be", "got 0"),
    "no images": (lambda: objective(f=f[:0], v=v[:0], g=g[:0]), "N must be", "got 0"),
    "log_q shape": (lambda: elbo(f[..., 0], f[..., 0], f[0]), "log_q must have shape (N=2, K=3)", "(3, 4)"),
    "log_p shape": (lambda: log_posterior(f[..., 0], f[0]), "log_p must have shape (N=2, K=3)", "(3, 4)"),
    "f nan": (lambda: objective(f=NAN), "f must be finite", "got 24 NaN or infinite of 24"),
    "inf": (lambda: objective(queue=INF), "queue must be finite", "got 60 NaN or infinite of 60"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, *fragments = BAD[case]
    with pytest.raises(ValueError) as refusal:
        call()
    assert all(fragment in str(refusal.value) for fragment in fragments), str(refusal.value)
