"""The paper's datasets: files that are damaged, missing or mistaken; and real data beside the repository."""

import hashlib
import pickle
import shutil
import sys
import tarfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hostile import picture
from house import ROOT, run
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from mice.config import Config
from mice.data import datasets
from mice.data.datasets import ARCHIVES, DATASETS, DOGS, describe_dataset, load_dataset, load_imagenet_dogs
from mice.data.folders import load_folder
from mice.data.images import count_duplicates

UNPACK = ROOT.parent / "shared" / "data" / "unpack.py"
pytestmark = pytest.mark.usefixtures("cache")


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def photo(path: Path, seed: int = 0, size: tuple = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def one_line(call) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


# ---- the datasets' own files: small stand-ins with checksums of their own ----


def checksum(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def stand_in(kind, root, monkeypatch, n=6):
    "CIFAR's files with n images each, packed too; torchvision is told their checksums."
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    prefixes = ("",) if kind is CIFAR10 else ("fine_", "coarse_")
    pixels, parts = noise(6, n, 3, 32, 32), [[], []]
    for i, (name, _) in enumerate(kind.train_list + kind.test_list):
        labels = {f"{prefix}labels": [(i + j + len(prefix)) % 2 for j in range(n)] for prefix in prefixes}
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i].reshape(n, -1), **labels}))
        parts[i >= len(kind.train_list)].append([name, checksum(folder / name)])
    meta = folder / kind.meta["filename"]
    names = {f"{prefix}label_names": [f"{prefix}cat", f"{prefix}dog"] for prefix in prefixes}
    meta.write_bytes(pickle.dumps(names))
    with tarfile.open(root / kind.filename, "w:gz") as tar:
        tar.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "train_list", parts[0])
    monkeypatch.setattr(kind, "test_list", parts[1])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": checksum(meta)})
    monkeypatch.setattr(kind, "tgz_md5", checksum(root / kind.filename))
    for name, archive in ARCHIVES.items():
        if archive.kind is kind:
            M = n * len(parts[0] + parts[1])
            monkeypatch.setitem(ARCHIVES, name, archive._replace(shape=(M, 32, 32, 3), train=0))
    return pixels.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)


def test_cifar10_from_its_own_files(tmp_path, monkeypatch):
    pixels = stand_in(CIFAR10, tmp_path, monkeypatch)
    for data in (tmp_path, tmp_path / CIFAR10.base_folder, tmp_path / CIFAR10.filename):
        fit, evaluate = load_dataset(Config(dataset="cifar10", data=str(data)))
        assert fit is evaluate and fit.classes == ("cat", "dog")
        assert fit.protocol == "train+test pooled: all 36 images clustered and evaluated"
        np.testing.assert_array_equal(fit.images, pixels)
        np.testing.assert_array_equal(fit.labels, [(i + j) % 2 for i in range(6) for j in range(6)])
    train, test = load_dataset(Config(dataset="cifar10", data=str(tmp_path), split="test"))
    np.testing.assert_array_equal(test.images, pixels[30:])
    np.testing.assert_array_equal(train.images, pixels[:30])
    assert train.protocol == test.protocol == "all 30 train images clustered; 6 test images evaluated"


@pytest.mark.parametrize("name, level", [("cifar100", "fine"), ("cifar100-20", "coarse")])
def test_cifar100_has_both_levels(name, level, tmp_path, monkeypatch):
    pixels = stand_in(CIFAR100, tmp_path, monkeypatch)
    data, _ = load_dataset(Config(dataset=name, data=str(tmp_path)))
    np.testing.assert_array_equal(data.images, pixels[:12])
    assert data.classes == (f"{level}_cat", f"{level}_dog")
    expected = [(i + j + len(level) + 1) % 2 for i in range(2) for j in range(6)]
    np.testing.assert_array_equal(data.labels, expected)


def test_an_archive_beside_is_unpacked_without_a_download(tmp_path, monkeypatch):
    pixels = stand_in(CIFAR10, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "url", "http://nowhere.invalid/x.tar.gz")
    fit, _ = load_dataset(Config(dataset="cifar10", data=str(tmp_path)))
    np.testing.assert_array_equal(fit.images, pixels)


@pytest.fixture
def serve():
    "A function that offers bytes at an address of this machine; some at the end may be lost on the way."
    servers = []

    def offer(content, lost=0):
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()

            def do_GET(self):
                self.do_HEAD()
                self.wfile.write(content[: len(content) - lost])

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/cifar.tar.gz"

    yield offer
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download(tmp_path, monkeypatch, capsys, serve):
    pixels = stand_in(CIFAR10, tmp_path / "server", monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", serve((tmp_path / "server" / CIFAR10.filename).read_bytes()))
    cfg = Config(dataset="cifar10", data=str(tmp_path / "here"), download=True)
    np.testing.assert_array_equal(load_dataset(cfg)[0].images, pixels)
    assert f"cifar10: 170 MB from {CIFAR10.url}" in capsys.readouterr().err
    monkeypatch.setattr(CIFAR10, "url", "http://nowhere.invalid/x.tar.gz")
    load_dataset(cfg)  # what is there is not fetched again


def test_wrong_checksum(tmp_path, monkeypatch):
    stand_in(CIFAR10, tmp_path, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / "data_batch_3"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("opened before it was verified"))
    line = one_line(lambda: load_dataset(Config(dataset="cifar10", data=str(tmp_path))))
    assert "cifar-10-batches-py is damaged or incomplete, a checksum is wrong" in line
    assert "--download" in line


def test_truncated_archive(tmp_path, monkeypatch):
    stand_in(CIFAR10, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    line = one_line(lambda: load_dataset(Config(dataset="cifar10", data=str(tmp_path))))
    assert "cifar-10-python.tar.gz is damaged or incomplete, a checksum is wrong: delete it" in line
    assert "--download" in line


def test_truncated_download(tmp_path, monkeypatch, serve):
    stand_in(CIFAR10, tmp_path / "server", monkeypatch)
    content = (tmp_path / "server" / CIFAR10.filename).read_bytes()
    cfg = Config(dataset="cifar10", data=str(tmp_path / "here"), download=True)
    monkeypatch.setattr(CIFAR10, "url", serve(content, lost=100))
    line = one_line(lambda: load_dataset(cfg))
    assert "cifar-10-python.tar.gz is damaged or incomplete, a checksum is wrong: delete it" in line
    monkeypatch.setattr(CIFAR10, "url", serve(content))
    assert len(load_dataset(cfg)[0].images) == 36  # the next try succeeds


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens there
    line = one_line(lambda: load_dataset(Config(dataset="cifar10", data=str(tmp_path), download=True)))
    assert line.startswith("cifar10 could not be read or fetched") and CIFAR10.url in line


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar"
STL_URL = "http://ai.stanford.edu/~acoates/stl10"


@pytest.mark.parametrize(
    "name, files, source",
    [
        ("cifar10", "cifar-10-batches-py/ nor cifar10.npz", f"{CIFAR_URL}-10-python.tar.gz (170 MB)"),
        ("cifar100-20", "cifar-100-python/ nor cifar100.npz", f"{CIFAR_URL}-100-python.tar.gz (169 MB)"),
        ("stl10", "stl10_binary/ nor stl10.npz", f"{STL_URL}/stl10_binary.tar.gz (2.6 GB)"),
    ],
)
def test_missing_data(name, files, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(Config(dataset=name))
    fetch = f"--download fetches it from {source}"
    own = "--data PATH names the folder or .npz file where it is"
    assert str(caught.value) == f"{name} was not found in 'data', neither {files}: {fetch}, or {own}"


def test_unknown_name():
    line = one_line(lambda: load_dataset(Config(dataset="cifar-10")))
    assert all(name in line for name in DATASETS) and ".npz" in line and "folder" in line
    assert line.endswith("got 'cifar-10': did you mean 'cifar10'?")


def fill_stl(root, monkeypatch, sizes=(4, 6, 10)):
    "STL-10 with a few images; its checksums are waived."
    folder = root / STL10.base_folder
    folder.mkdir()
    pixels = noise(sum(sizes), 96, 96, 3)
    cuts = np.split(pixels, np.cumsum(sizes)[:2])
    for name, images in zip(("train", "test", "unlabeled"), cuts, strict=True):
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())  # column by column
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(i % 2 + 1 for i in range(len(images))))
    (folder / "class_names.txt").write_text("bird\ncar\n")
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    for name, M in (("stl10", sum(sizes[:2])), ("stl10-unlabeled", sum(sizes))):
        monkeypatch.setitem(ARCHIVES, name, ARCHIVES[name]._replace(shape=(M, 96, 96, 3)))
    return pixels


def test_stl10(tmp_path, monkeypatch):
    pixels = fill_stl(tmp_path, monkeypatch)
    there = dict(data=str(tmp_path), image_size=96)
    fit, evaluate = load_dataset(Config(dataset="stl10", **there))
    assert fit is evaluate and fit.classes == ("bird", "car")
    np.testing.assert_array_equal(fit.images, pixels[:10])
    np.testing.assert_array_equal(fit.labels, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    fit, evaluate = load_dataset(Config(dataset="stl10-unlabeled", **there))
    np.testing.assert_array_equal(fit.images, pixels)
    np.testing.assert_array_equal(evaluate.images, pixels[:10])
    assert fit.labels is None and (evaluate.labels >= 0).all()
    all_images = "train+test+unlabelled pooled: all 20 images"
    protocol = f"{all_images} clustered, the 10 of them with a label evaluated"
    assert fit.protocol == evaluate.protocol == protocol
    train, test = load_dataset(Config(dataset="stl10-unlabeled", split="test", **there))
    np.testing.assert_array_equal(train.images, pixels[[*range(4), *range(10, 20)]])
    np.testing.assert_array_equal(test.images, pixels[4:10])


def test_an_npz_in_place_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "cifar100-20", ARCHIVES["cifar100-20"]._replace(shape=(8, 32, 32, 3)))
    arrays = dict(fine=np.arange(8), coarse=np.arange(8) % 3, coarse_names=np.array(["a", "b", "c"]))
    np.savez(tmp_path / "cifar100.npz", images=noise(8, 32, 32, 3), **arrays)
    for data in (tmp_path, tmp_path / "cifar100.npz"):
        pooled = Config(dataset="cifar100-20", data=str(data))
        parted = replace(pooled, split="test")
        fit, _ = load_dataset(pooled)
        assert fit.classes == ("a", "b", "c") and fit.labels.dtype == np.int64
        assert list(map(str, fit.notes)) == ["which images are the test part is not known for this copy"]
        assert "cifar100-20 has none" in one_line(lambda cfg=parted: load_dataset(cfg))
    np.savez(tmp_path / "cifar100.npz", images=noise(8, 32, 32, 3), fine=arrays["fine"])
    assert "must have an array `coarse`" in one_line(lambda: load_dataset(pooled))


# ---- ImageNet-Dogs ----


def kennel(folder, each=2, ending="JPEG"):
    for i, wnid in enumerate(DOGS):
        for j in range(each):
            photo(folder / wnid / f"{wnid}_{j}.{ending}", seed=100 * i + j, size=(20, 10 + i))
    return folder


@pytest.mark.parametrize("below", ["", "train", "ILSVRC/Data/CLS-LOC/train"])
def test_imagenet_dogs(below, tmp_path, monkeypatch):
    folder = kennel(tmp_path / below)
    photo(folder / "n01440764" / "fish.JPEG")  # ILSVRC has other classes, too
    (folder / "n02085936" / "readme.txt").write_text("no image")
    monkeypatch.setattr(load_imagenet_dogs, "__defaults__", (*load_imagenet_dogs.__defaults__[:-1], 2))
    data, other = load_dataset(Config(dataset="imagenet-dogs", data=str(tmp_path), image_size=8))
    assert data is other and data.images.shape == (30, 8, 8, 3)
    assert np.bincount(data.labels).tolist() == [2] * 15
    assert any("without cropping" in str(note) for note in data.notes)
    with Image.open(folder / "n02086646" / "n02086646_1.JPEG") as image:
        small = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(data.images[3], small)
    assert data.classes[data.labels[3]] == "Blenheim spaniel"


def test_imagenet_dogs_have_19500_images():
    assert len(DOGS) * datasets.DOGS_PER_BREED == 19_500


@pytest.mark.parametrize("below", ["", "Images"])
def test_stanford_dogs_are_refused(below, tmp_path):
    photo(tmp_path / below / "n02085936-Maltese_dog" / "n02085936_1.jpg")
    line = one_line(lambda: load_dataset(Config(dataset="imagenet-dogs", data=str(tmp_path))))
    assert "is Stanford Dogs (folders such as n02085936-Maltese_dog)" in line and "--data PATH" in line


def test_wrong_dogs_are_counted(tmp_path):
    kennel(tmp_path)
    line = one_line(lambda: load_imagenet_dogs(str(tmp_path), 8))
    assert "exactly 1300 images in each of its 15 synset folders, got 2 in n02085936" in line
    shutil.rmtree(tmp_path / "n02112137")
    assert "got 0 in n02112137:" in one_line(lambda: load_imagenet_dogs(str(tmp_path), 8, each=2))
    kennel(tmp_path)
    (tmp_path / "n02112137" / "n02112137_0.JPEG").write_bytes(b"half a file")
    line = one_line(lambda: load_imagenet_dogs(str(tmp_path), 8, each=2))
    assert "needs all of its 30 images, 1 of 30 files could not be read" in line


def test_missing_dogs(tmp_path):
    line = one_line(lambda: load_dataset(Config(dataset="imagenet-dogs", data=str(tmp_path), download=True)))
    assert "https://image-net.org/download" in line and "138 GB" in line and "--data PATH" in line


# ---- subsets and reports ----


def test_a_subset_does_not_depend_on_the_seed(tmp_path):
    images = noise(50, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50) % 4)
    cfg = dict(dataset=str(tmp_path / "a.npz"), image_size=8, subset=20)
    fit, evaluate = load_dataset(Config(**cfg))
    assert fit is evaluate
    assert fit.protocol == "20 of 50 images, drawn without labels, clustered and evaluated"
    places = [int(np.flatnonzero((images == image).all((1, 2, 3)))[0]) for image in fit.images]
    assert places == sorted(set(places)) and (fit.labels == np.array(places) % 4).all()
    np.testing.assert_array_equal(load_dataset(Config(**cfg, seed=5))[0].images, fit.images)
    assert "subset must be at most 50" in one_line(lambda: load_dataset(Config(**cfg | dict(subset=51))))


@pytest.mark.parametrize("K, said", [(10, []), (12, ["2 of the clusters"]), (7, ["3 of the classes"])])
def test_other_numbers_of_clusters_are_reported(K, said):
    cfg = Config(n_clusters=K)
    facts, protocol, *notes = describe_dataset(load_dataset(cfg)[0], cfg)
    assert facts == "digits: 1797 images of 32 x 32 x 1, 1.8 MB in memory"
    assert protocol == "protocol: all 1797 images clustered and evaluated"
    assert len(notes) == len(said) and all(words in note for words, note in zip(said, notes, strict=True))


# ---- the real data beside the repository ----


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not UNPACK.is_file():
        pytest.skip("no ../shared/data")
    folder = tmp_path_factory.mktemp("real")
    for name in ("cifar10", "clothing10"):
        run(sys.executable, UNPACK, name, folder)
    yield folder
    shutil.rmtree(folder)


def test_cifar10(real):
    fit, evaluate = load_dataset(Config(dataset="cifar10", data=str(real)))
    assert fit is evaluate and fit.images.shape == (60_000, 32, 32, 3)
    assert np.bincount(fit.labels).tolist() == [6000] * 10 and fit.classes[0] == "airplane"
    assert list(map(str, fit.notes)) == ["141 of 60000 images come from a lossy copy"]  # and no duplicates
    assert fit.protocol == "train+test pooled: all 60000 images clustered and evaluated"
    parted = Config(dataset="cifar10", data=str(real / "cifar10.npz"), split="test", subset=10_000)
    train, test = load_dataset(parted)
    assert train.images.shape == test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    some = "10000 of 50000 train images, drawn without labels, clustered"
    assert train.protocol == f"{some}; 10000 test images evaluated"
    assert count_duplicates(np.concatenate([train.images, test.images])) == 0


def test_clothing10(real):
    data = load_folder(real / "clothing10", 32, threads=2)
    assert data.images.shape == (3781, 32, 32, 3) and len(data.classes) == 10
    counts = np.bincount(data.labels)
    assert (counts.min(), counts.max(), data.test.sum()) == (136, 928, 372)
    assert data.protocol == "train+test pooled: all 3781 images clustered and evaluated"
