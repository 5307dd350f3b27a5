"Trunks: the pretrained one, what a network says about its images, and models on a network of your own."

import hashlib
import importlib.util
import io
import os
import pickle
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from mice.clustering.estimator import MiCE
from mice.training import trunks
from mice.training.trunks import (
    EfficientNetLite0,
    Trunk,
    as_trunk,
    folded,
    load_efficientnet_lite0,
    read_weights,
    trunk_hash,
)

pytestmark = pytest.mark.usefixtures("cache")

LITE0 = "efficientnet_lite0"
PACKAGED = trunks.weights_path(LITE0)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
IMAGES = np.random.RandomState(0).randint(256, size=(40, 12, 12, 3)).astype(np.uint8)
QUICK = dict(n_clusters=2, epochs=1, dim=8, cached_views=1, random_state=0, verbose=False)


def network(features: int = 6, **attributes) -> nn.Sequential:
    "A small network from images of any size to features, always the same one."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Sequential(nn.Conv2d(3, features, 3, 2, bias=False), nn.BatchNorm2d(features))
        net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        conv[1].running_mean.normal_()
        conv[1].running_var.uniform_(0.5, 2)
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def bits(net: nn.Module) -> dict[str, bytes]:
    return {name: x.detach().contiguous().numpy().tobytes() for name, x in net.state_dict().items()}


# ---- the pretrained trunk ----


@pytest.fixture(scope="module")
def pretrained():
    return load_efficientnet_lite0()


@torch.no_grad()
def test_it_agrees_with_the_package_its_weights_are_from(pretrained):
    ours, classifier = pretrained
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(read_weights(LITE0))
    theirs.eval()
    rng = torch.Generator().manual_seed(0)
    for side in (224, 192, 160):
        x = torch.randn(2, 3, side, side, generator=rng)
        expected = theirs.extract_features(x).mean((2, 3))  # (2, 1280)
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)
        if side == 224:
            torch.testing.assert_close(classifier(ours(x)), theirs(x), atol=1e-4, rtol=0)
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 49 and {norm.eps for norm in norms} == {1e-3}


@torch.no_grad()
def test_it_knows_a_palace_when_images_are_scaled_as_it_says(pretrained):
    net, classifier = pretrained
    china = load_sample_images().images[0]  # (427, 640, 3)
    square = Image.fromarray(china[:, 106:533]).resize((224, 224), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (net.mean, net.std))
    assert classifier(net((x - mean) / std)).argmax() == 698


@torch.no_grad()
def test_small_images_are_enlarged_and_larger_ones_are_not(pretrained):
    net, _ = pretrained
    seen = []
    handle = net.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    for side in (1, 32, 47, 159, 160, 161):
        net(torch.zeros(1, 3, side, side))
    handle.remove()
    assert seen == [160, 160, 160, 160, 160, 161]


class Trap:
    "Makes a folder when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def weights_file(tmp_path, monkeypatch):
    "A place for a file that is taken for the pretrained weights."
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    path = tmp_path / trunks.PRETRAINED[LITE0].file
    path.parent.mkdir()
    return path


def test_weights_of_another_content_are_refused_and_never_executed(weights_file, tmp_path, monkeypatch):
    content = bytearray(PACKAGED.read_bytes())
    weights_file.write_bytes(content)
    assert len(read_weights(LITE0)) > 100
    content[len(content) // 2] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(ValueError, match="must have the SHA-256 579344248a93e230.*install the package anew"):
        read_weights(LITE0)

    torch.save(Trap(tmp_path / "executed"), weights_file)
    with pytest.raises(ValueError, match="SHA-256"):
        read_weights(LITE0)
    sha256 = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    known = trunks.PRETRAINED[LITE0]._replace(sha256=sha256)
    monkeypatch.setitem(trunks.PRETRAINED, LITE0, known)  # even with the right hash
    with pytest.raises(pickle.UnpicklingError):
        read_weights(LITE0)
    assert not (tmp_path / "executed").exists()
    torch.load(io.BytesIO(weights_file.read_bytes()), weights_only=False)
    assert (tmp_path / "executed").exists(), "the trap works"


def test_without_the_package_the_message_says_what_to_install(weights_file, monkeypatch):
    for find_spec in (importlib.util.find_spec, lambda name: None):  # a package without the file, and none
        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        with pytest.raises(ValueError, match=r"pip install 'mice-clustering\[photos\]'"):
            load_efficientnet_lite0()


# ---- what a network says about its images ----

TIMM = dict(mean=MEAN, std=STD, input_size=(3, 64, 64))


@pytest.mark.parametrize(
    "says, given, expected",
    [
        ({}, {}, (None, None, None)),
        (dict(pretrained_cfg=TIMM), {}, (MEAN, STD, 64)),
        (dict(default_cfg=TIMM), {}, (MEAN, STD, 64)),
        (dict(image_mean=MEAN, image_std=STD, image_size=(64, 64)), {}, (MEAN, STD, 64)),
        (dict(image_mean=MEAN, image_std=STD, image_size=64), {}, (MEAN, STD, 64)),
        (dict(preprocess_cfg=dict(size=(64, 64), mode="RGB", mean=MEAN, std=STD)), {}, (MEAN, STD, 64)),
        (dict(mean=MEAN, std=STD, size=64), {}, (MEAN, STD, 64)),
        (dict(pretrained_cfg=dict(mean=MEAN, std=STD), preprocess_cfg=dict(size=64)), {}, (MEAN, STD, 64)),
        (dict(pretrained_cfg=TIMM), dict(mean=STD, std=MEAN, size=32), (STD, MEAN, 32)),
        (dict(pretrained_cfg=TIMM), dict(size=(3, 32, 32)), (MEAN, STD, 32)),
        ({}, dict(mean=MEAN, std=STD), (MEAN, STD, None)),
    ],
)
def test_a_trunk_reads_what_the_network_says_and_arguments_win(says, given, expected):
    found = Trunk(network(**says), **given)
    assert (found.mean, found.std, found.size, found.n_features) == (*expected, 6)
    sizes = []
    found.net[0].register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[-1]))
    found(torch.rand(2, 3, 20, 20))
    assert sizes == [found.size or 20]
    assert as_trunk(found) is found


class Numbers(nn.Module):
    "Standardises by itself: mean and std are tensors of the network."

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_network_may_hold_its_mean_and_std_as_tensors(frozen):
    assert MiCE(**QUICK, trunk=Numbers(), frozen=frozen).fit(IMAGES).labels_.shape == (40,)


class Gives(nn.Module):
    "Turns images into something."

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5))


@pytest.mark.parametrize(
    "net, given, says",
    [
        (network(), dict(size=(64, 32)), "images of a trunk must be square, got"),
        (network(image_size=(3, 64, 32)), {}, "images of a trunk must be square, got"),
        (network(), dict(mean=MEAN), "give both the mean and the std"),
        (network(image_std=STD), {}, "give both the mean and the std"),
        (network()[:1], {}, r"got \(2, 6, 47, 47\): average over the image, nn.Sequential"),
        (Gives(lambda x: (x, x)), {}, "got tuple"),
        (Gives(lambda x: x[:1, :, 0, 0]), {}, r"2 images into features \(2, F\), got \(1, 3\)"),
        (Gives(lambda x: x[:, :, 0, 0].long()), {}, r"2 images into features"),
        (FLAT, {}, r"take images \(N, 3, 96, 96\), got RuntimeError: .*if it needs another size, name it"),
        (lambda x: x, {}, "must be a torch.nn.Module, got function"),
    ],
)
def test_what_is_no_trunk_is_refused_in_one_line(net, given, says):
    with pytest.raises(ValueError, match=says) as refusal:
        Trunk(net, **given)
    assert "\n" not in str(refusal.value)


def test_a_network_of_another_size_can_be_used_if_it_is_named():
    for given, size in ((dict(), 64), (dict(image_size=12), 12)):  # the size of the trunk, or the user's
        found = MiCE(**QUICK, **given, trunk=Trunk(FLAT, size=64)).fit(IMAGES)
        assert found.config_.image_size == size and found.predict(IMAGES).shape == (40,)


def test_a_trunk_leaves_the_network_as_it_is():
    net = network()
    net[0][1].eval()
    net[0].train(False)
    modes, before = [module.training for module in net.modules()], bits(net)
    assert len(set(modes)) == 2
    for size in (None, 64):
        Trunk(net, size=size)
    with pytest.raises(ValueError):
        Trunk(net[:1])
    assert [module.training for module in net.modules()] == modes and bits(net) == before


class StandardisedConv(nn.Conv2d):
    "Weights of mean 0 and deviation 1, whatever is stored."

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "shared", "no affine", "subclass", "parametrised", LITE0])
def test_folding_keeps_the_features(kind, pretrained):
    net = pretrained[0] if kind == LITE0 else network()
    if kind == "shared":
        net.insert(0, nn.Sequential(net[0][0], nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)))
    elif kind == "no affine":
        net[0][1] = nn.BatchNorm2d(6, affine=False)
    elif kind == "subclass":
        net[0][0] = StandardisedConv(3, 6, 3)
    elif kind == "parametrised":
        net[0][0] = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    before = bits(net)
    x = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(net)(x), deepcopy(net).eval()(x), atol=1e-4, rtol=1e-4)
    assert bits(net) == before


def test_the_hash_tells_trunks_apart():
    same = {trunk_hash(Trunk(net)) for net in (network(), network().eval(), deepcopy(network()))}
    changed, statistics = network(), network()
    changed[0][0].weight.data[0, 0, 0, 0] += 1e-6
    statistics[0][1].running_var[0] += 1e-6
    layer = network()
    layer[1] = nn.SiLU()
    others = [Trunk(changed), Trunk(statistics), Trunk(layer), Trunk(network(), size=32)]
    others += [Trunk(network(), size=64), Trunk(network(), MEAN, STD), Trunk(network(), STD, MEAN)]
    assert len(same) == 1
    assert len(same | {trunk_hash(trunk) for trunk in others}) == 8


# ---- models on it ----


def test_a_trunk_of_your_own_is_frozen_unless_it_shall_learn_as_a_copy():
    net = network()
    before = bits(net)
    learns = MiCE(**QUICK, trunk=net, frozen=False, lr=0.1).fit(IMAGES)
    frozen = MiCE(**QUICK, trunk=net, lr=0.1).fit(IMAGES)
    assert bits(net) == before and net.training
    found = bits(learns.model_.student.trunk)
    assert all(found[f"net.{name}"] != before[name] for name in before)
    assert bits(frozen.model_.student.trunk) == {}
    assert (learns.config_.arch, learns.config_.frozen, frozen.config_.frozen) == ("module", False, True)
    np.testing.assert_array_equal(frozen.predict(IMAGES), frozen.labels_)
    again = MiCE(**QUICK, trunk=network(), frozen=True, lr=0.1).fit(IMAGES)
    np.testing.assert_array_equal(again.predict_proba(IMAGES), frozen.predict_proba(IMAGES))


def test_a_trunk_sees_images_on_the_scale_it_asks_for():
    for trunk, mean in ((Trunk(network(), MEAN, STD), MEAN), (network(), IMAGES.mean((0, 1, 2)) / 255)):
        found = MiCE(**QUICK, image_size=IMAGES.shape[1], trunk=trunk, frozen=False).fit(IMAGES)
        np.testing.assert_allclose(found.model_.mean, mean, atol=1e-6)


def test_the_pretrained_trunk_may_learn_and_starts_from_its_weights(pretrained, tmp_path):
    images = np.random.RandomState(0).randint(256, size=(16, 32, 32, 3)).astype(np.uint8)
    found = MiCE(**QUICK, trunk=LITE0, frozen=False, batch_size=8, lr=1e-9).fit(images)
    assert (found.config_.arch, found.config_.frozen) == (LITE0, False)
    expected = pretrained[0].state_dict()
    for name, x in found.model_.student.trunk.net.named_parameters():
        torch.testing.assert_close(x, expected[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.model_.mean, torch.tensor(EfficientNetLite0.mean))
    found.save(tmp_path / "model")
    again = MiCE.load(tmp_path / "model", "cpu")
    np.testing.assert_array_equal(again.predict_proba(images), found.predict_proba(images))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_model_on_a_trunk_of_your_own_is_loaded_with_it_and_not_without(frozen, tmp_path):
    path, trunk = tmp_path / "model", Trunk(network(), MEAN, STD, size=16)
    found = MiCE(**QUICK, trunk=trunk, frozen=frozen).fit(IMAGES)
    found.save(path)
    again = MiCE.load(path, "cpu", trunk=deepcopy(trunk))
    np.testing.assert_array_equal(again.predict_proba(IMAGES), found.predict_proba(IMAGES))
    assert again.config_ == found.config_ and again.trunk.size == 16

    refused = [(None, r"a network of your own: MiCE.load\(path, trunk=network\)"), (network(7), "")]
    if frozen:
        changed = deepcopy(trunk)
        changed.net[0][0].weight.data += 0.01
        refused += [(changed, "hash"), (Trunk(network(), STD, MEAN, size=16), "hash")]
        refused += [(Trunk(network(), MEAN, STD, size=32), "hash")]
    for other, says in refused:
        with pytest.raises(ValueError, match=f"model is not a model that can be used: .*{says}") as refusal:
            MiCE.load(path, "cpu", trunk=other)
        assert "\n" not in str(refusal.value)


def test_a_trunk_that_does_not_belong_to_a_model_is_refused(tmp_path):
    MiCE(**QUICK, trunk="small").fit(IMAGES).save(tmp_path / "model")
    with pytest.raises(ValueError, match="its trunk is small, no network of your own"):
        MiCE.load(tmp_path / "model", trunk=network())
    for name, says in (("module", "give it as trunk"), ("smal", "arch must be one of small")):
        with pytest.raises(ValueError, match=says):
            MiCE(**QUICK, trunk=name).fit(IMAGES)


def test_a_warm_start_keeps_the_trunk():
    found = MiCE(**QUICK, trunk=network(), frozen=True).fit(IMAGES)
    found.set_params(warm_start=True).fit(IMAGES)
    other = network()
    other[0][0].weight.data += 0.01
    with pytest.raises(ValueError, match="trunk_hash must stay"):
        found.set_params(trunk=other).fit(IMAGES)
    with pytest.raises(ValueError, match="frozen must stay"):
        found.set_params(trunk=network(), frozen=False).fit(IMAGES)
