"""Data that are damaged, missing, mistaken for others or read twice; and the real data beside the repository."""

import hashlib
import os
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from house import ROOT, run
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

import mice.cache
from mice import datasets, folders
from mice.cache import on_disk
from mice.core import Config
from mice.data import duplicates, from_npz
from mice.datasets import DOGS, NAMES, SOURCES, imagenet_dogs, load, report
from mice.folders import find_images, fingerprint, from_folder, layout, read_images

UNPACK = ROOT.parent / "shared" / "data" / "unpack.py"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "Every test has a cache of its own."
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MICE_CACHE", str(folder))
    return folder


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def photo(path, seed=0, size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


# Official archives: small stand-ins with checksums of their own


def checksum(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def stand_in(kind, root, monkeypatch, n=6):
    "Official-looking CIFAR files of n images each, packed too; torchvision is told their checksums."
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    prefixes = ("",) if kind is CIFAR10 else ("fine_", "coarse_")
    pixels, parts = noise(6, n, 3, 32, 32), [[], []]
    for i, (name, _) in enumerate(kind.train_list + kind.test_list):
        labels = {f"{prefix}labels": [(i + j + len(prefix)) % 2 for j in range(n)] for prefix in prefixes}
        (folder / name).write_bytes(pickle.dumps({"data": pixels[i].reshape(n, -1), **labels}))
        parts[i >= len(kind.train_list)].append([name, checksum(folder / name)])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({f"{prefix}label_names": [f"{prefix}cat", f"{prefix}dog"] for prefix in prefixes}))
    with tarfile.open(root / kind.filename, "w:gz") as tar:
        tar.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "train_list", parts[0])
    monkeypatch.setattr(kind, "test_list", parts[1])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": checksum(meta)})
    monkeypatch.setattr(kind, "tgz_md5", checksum(root / kind.filename))
    for name, source in SOURCES.items():
        if source.kind is kind:
            M = n * len(parts[0] + parts[1])
            monkeypatch.setitem(SOURCES, name, source._replace(shape=(M, 32, 32, 3), train=0))
    return pixels.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)


def test_official_cifar10(tmp_path, monkeypatch):
    pixels = stand_in(CIFAR10, tmp_path, monkeypatch)
    for data in (tmp_path, tmp_path / CIFAR10.base_folder, tmp_path / CIFAR10.filename):
        fitted, judged = load(Config(dataset="cifar10", data=str(data)))
        assert fitted is judged and fitted.classes == ("cat", "dog")
        assert fitted.protocol == "train+test pooled: all 36 images clustered and judged"
        np.testing.assert_array_equal(fitted.images, pixels)
        np.testing.assert_array_equal(fitted.labels, [(i + j) % 2 for i in range(6) for j in range(6)])
    train, test = load(Config(dataset="cifar10", data=str(tmp_path), split="test"))
    np.testing.assert_array_equal(test.images, pixels[30:])
    np.testing.assert_array_equal(train.images, pixels[:30])
    assert train.protocol == test.protocol == "all 30 train images clustered; 6 test images judged"


@pytest.mark.parametrize("name, level", [("cifar100", "fine"), ("cifar100-20", "coarse")])
def test_official_cifar100_has_both_levels(name, level, tmp_path, monkeypatch):
    pixels = stand_in(CIFAR100, tmp_path, monkeypatch)
    data, _ = load(Config(dataset=name, data=str(tmp_path)))
    np.testing.assert_array_equal(data.images, pixels[:12])
    assert data.classes == (f"{level}_cat", f"{level}_dog")
    np.testing.assert_array_equal(data.labels, [(i + j + len(level) + 1) % 2 for i in range(2) for j in range(6)])


def test_an_archive_beside_is_unpacked_without_a_download(tmp_path, monkeypatch):
    pixels = stand_in(CIFAR10, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "url", "http://nowhere.invalid/x.tar.gz")
    np.testing.assert_array_equal(load(Config(dataset="cifar10", data=str(tmp_path)))[0].images, pixels)


@pytest.fixture
def serve():
    "A function that offers bytes at an address of this machine; some bytes at the end may be lost on the way."
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
    np.testing.assert_array_equal(load(cfg)[0].images, pixels)
    assert f"cifar10: 170 MB from {CIFAR10.url}" in capsys.readouterr().err
    monkeypatch.setattr(CIFAR10, "url", "http://nowhere.invalid/x.tar.gz")
    load(cfg)  # what is there is not fetched again


def one_line(call) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


def test_wrong_checksum(tmp_path, monkeypatch):
    stand_in(CIFAR10, tmp_path, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / "data_batch_3"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("opened before it was verified"))
    line = one_line(lambda: load(Config(dataset="cifar10", data=str(tmp_path))))
    assert "cifar-10-batches-py is damaged or incomplete, a checksum is wrong" in line and "--download" in line


def test_truncated_archive(tmp_path, monkeypatch):
    stand_in(CIFAR10, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    line = one_line(lambda: load(Config(dataset="cifar10", data=str(tmp_path))))
    assert "cifar-10-python.tar.gz is damaged or incomplete, a checksum is wrong: delete it" in line and "--download" in line


def test_truncated_download(tmp_path, monkeypatch, serve):
    stand_in(CIFAR10, tmp_path / "server", monkeypatch)
    content = (tmp_path / "server" / CIFAR10.filename).read_bytes()
    cfg = Config(dataset="cifar10", data=str(tmp_path / "here"), download=True)
    monkeypatch.setattr(CIFAR10, "url", serve(content, lost=100))
    line = one_line(lambda: load(cfg))
    assert "cifar-10-python.tar.gz is damaged or incomplete, a checksum is wrong: delete it" in line and "--download" in line
    monkeypatch.setattr(CIFAR10, "url", serve(content))
    assert len(load(cfg)[0].images) == 36  # the next try mends it


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens there
    line = one_line(lambda: load(Config(dataset="cifar10", data=str(tmp_path), download=True)))
    assert line.startswith("cifar10 could not be read or fetched") and CIFAR10.url in line


@pytest.mark.parametrize(
    "name, says",
    [
        ("cifar10", "neither cifar-10-batches-py/ nor cifar10.npz: --download fetches it from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (170 MB), or --data PATH names the folder or .npz file where it lies"),
        ("cifar100-20", "neither cifar-100-python/ nor cifar100.npz: --download fetches it from https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (169 MB), or --data PATH names the folder or .npz file where it lies"),
        ("stl10", "neither stl10_binary/ nor stl10.npz: --download fetches it from http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz (2.6 GB), or --data PATH names the folder or .npz file where it lies"),
    ],
)
def test_missing_data(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load(Config(dataset=name))
    assert str(caught.value) == f"{name} was not found in 'data', {says}"


def test_unknown_name():
    line = one_line(lambda: load(Config(dataset="cifar-10")))
    assert all(name in line for name in NAMES) and ".npz" in line and "folder" in line
    assert line.endswith("got 'cifar-10': did you mean 'cifar10'?")


def stl(root, monkeypatch, sizes=(4, 6, 10)):
    "STL-10 with so few images; its checksums are waived."
    folder = root / STL10.base_folder
    folder.mkdir()
    pixels = noise(sum(sizes), 96, 96, 3)
    for name, images in zip(("train", "test", "unlabeled"), np.split(pixels, np.cumsum(sizes)[:2])):
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())  # column by column
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(i % 2 + 1 for i in range(len(images))))
    (folder / "class_names.txt").write_text("bird\ncar\n")
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    for name, M in (("stl10", sum(sizes[:2])), ("stl10-unlabeled", sum(sizes))):
        monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(shape=(M, 96, 96, 3)))
    return pixels


def test_stl10(tmp_path, monkeypatch):
    pixels = stl(tmp_path, monkeypatch)
    at = dict(data=str(tmp_path), image_size=96)
    fitted, judged = load(Config(dataset="stl10", **at))
    assert fitted is judged and fitted.classes == ("bird", "car")
    np.testing.assert_array_equal(fitted.images, pixels[:10])
    np.testing.assert_array_equal(fitted.labels, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    fitted, judged = load(Config(dataset="stl10-unlabeled", **at))
    np.testing.assert_array_equal(fitted.images, pixels)
    np.testing.assert_array_equal(judged.images, pixels[:10])
    assert fitted.labels is None and (judged.labels >= 0).all()
    assert fitted.protocol == judged.protocol == "train+test+unlabelled pooled: all 20 images clustered, the 10 of them with a label judged"
    train, test = load(Config(dataset="stl10-unlabeled", split="test", **at))
    np.testing.assert_array_equal(train.images, pixels[[*range(4), *range(10, 20)]])
    np.testing.assert_array_equal(test.images, pixels[4:10])


def test_an_npz_in_place_of_an_official_dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "cifar100-20", SOURCES["cifar100-20"]._replace(shape=(8, 32, 32, 3)))
    arrays = dict(images=noise(8, 32, 32, 3), fine=np.arange(8), coarse=np.arange(8) % 3, coarse_names=np.array(["a", "b", "c"]))
    np.savez(tmp_path / "cifar100.npz", **arrays)
    for data in (tmp_path, tmp_path / "cifar100.npz"):
        cfg = Config(dataset="cifar100-20", data=str(data))
        fitted, judged = load(cfg)
        assert fitted.classes == ("a", "b", "c") and fitted.labels.dtype == np.int64
        assert fitted.notes == ("which images are the official test part is not known for this copy",)
        assert "cifar100-20 has none" in one_line(lambda: load(Config(dataset="cifar100-20", data=str(data), split="test")))
    del arrays["coarse"]
    np.savez(tmp_path / "cifar100.npz", **arrays)
    assert "must have an array `coarse`" in one_line(lambda: load(cfg))


# ImageNet-Dogs


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
    monkeypatch.setattr(imagenet_dogs, "__defaults__", (*imagenet_dogs.__defaults__[:-1], 2))
    data, judged = load(Config(dataset="imagenet-dogs", data=str(tmp_path), image_size=8))
    assert data is judged and data.images.shape == (30, 8, 8, 3) and np.bincount(data.labels).tolist() == [2] * 15
    assert any("without cropping" in note for note in data.notes)
    with Image.open(folder / "n02086646" / "n02086646_1.JPEG") as image:
        np.testing.assert_array_equal(data.images[3], np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)))
    assert data.classes[data.labels[3]] == "Blenheim spaniel"


def test_imagenet_dogs_have_19500_images():
    assert len(DOGS) * datasets.DOGS_EACH == 19_500


@pytest.mark.parametrize("below", ["", "Images"])
def test_stanford_dogs_are_refused(below, tmp_path):
    photo(tmp_path / below / "n02085936-Maltese_dog" / "n02085936_1.jpg")
    line = one_line(lambda: load(Config(dataset="imagenet-dogs", data=str(tmp_path))))
    assert "is Stanford Dogs (folders such as n02085936-Maltese_dog)" in line and "--data PATH" in line


def test_wrong_dogs_are_counted(tmp_path):
    kennel(tmp_path)
    assert "exactly 1300 images in each of its 15 synset folders, got 2 in n02085936" in one_line(lambda: imagenet_dogs(str(tmp_path), 8))
    shutil.rmtree(tmp_path / "n02112137")
    assert "got 0 in n02112137:" in one_line(lambda: imagenet_dogs(str(tmp_path), 8, each=2))
    kennel(tmp_path)
    (tmp_path / "n02112137" / "n02112137_0.JPEG").write_bytes(b"half a file")
    assert "needs all of its 30 images, 1 of 30 files could not be read" in one_line(lambda: imagenet_dogs(str(tmp_path), 8, each=2))


def test_missing_dogs(tmp_path):
    line = one_line(lambda: load(Config(dataset="imagenet-dogs", data=str(tmp_path), download=True)))
    assert "https://image-net.org/download" in line and "138 GB" in line and "--data PATH" in line


# Folders


def test_order_is_that_of_the_names(tmp_path, monkeypatch):
    for i, name in enumerate(("b/2.png", "a/10.png", "a/9.png", "B/1.png", "a/x/1.png", "0.png")):
        photo(tmp_path / name, seed=i)
    listdir, orders = os.listdir, (sorted, lambda names: sorted(names, reverse=True))
    found = []
    for order in orders:
        monkeypatch.setattr(os, "listdir", lambda folder, order=order: order(listdir(folder)))
        found.append((find_images(tmp_path), from_folder(tmp_path, 8)))
    assert found[0][0][0] == ["0.png", "B/1.png", "a/10.png", "a/9.png", "a/x/1.png", "b/2.png"]
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1].images, found[1][1].images)
    assert found[0][1].labels.tolist() == [-1, 0, 1, 1, 1, 2] and found[0][1].classes == ("B", "a", "b")


def test_links_in_a_circle_end(tmp_path):
    photo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    names, notes = find_images(tmp_path)
    assert names == ["a/1.png", "b/1.png"]
    assert "circle" in notes[0] and "self" in notes[1]


def test_what_cannot_be_read_is_skipped_and_named(tmp_path):
    for i in range(3):
        photo(tmp_path / f"good{i}.png", seed=i)
    for i in range(5):
        (tmp_path / f"words{i}.jpg").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "post.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start another program
    (tmp_path / ".hidden.png").write_text("")
    data = from_folder(tmp_path, 8)
    assert len(data.images) == 3 and data.labels is None
    (note,) = data.notes
    assert note.startswith("7 of 10 files could not be read: pipe.jpg (not a file), post.jpg (not an image), words0.jpg (not an image)")
    assert note.endswith("and 2 more")


def test_a_bomb_is_not_opened(tmp_path, monkeypatch):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", size=(30, 40))
    photo(tmp_path / "c.png", size=(40, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above it, refuses above twice as many
    data = from_folder(tmp_path, 8)
    assert len(data.images) == 1 and "b.png (too many pixels), c.png (too many pixels)" in data.notes[0]


def test_nothing_readable(tmp_path):
    assert "must hold images" in one_line(lambda: from_folder(tmp_path, 8))
    (tmp_path / "a.jpg").write_text("words")
    assert "at least one image that can be read, got none of 1 file: a.jpg (not an image)" in one_line(lambda: from_folder(tmp_path, 8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B"])
def test_every_mode_is_decoded(mode, tmp_path):
    grey = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 4, 1).repeat(8, 0))
    if mode.startswith("I"):
        kind = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        image = Image.fromarray((np.asarray(grey).astype(np.int64) * 257).astype(kind))
    else:
        image = grey.convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as opened:
        assert opened.mode == mode
    pixels = from_folder(tmp_path, 8).images[0].astype(int)
    assert (pixels[:, :4].max(), pixels[:, 4:].min()) == (0, 255)


def test_tiny_imagenet(tmp_path):
    for wnid in ("n1", "n2"):
        for i in range(2):
            photo(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=i)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1")
    for i in range(3):
        photo(tmp_path / "val" / "images" / f"val_{i}.JPEG", seed=10 + i)
        photo(tmp_path / "test" / "images" / f"test_{i}.JPEG", seed=20 + i)
    cfg = Config(dataset=str(tmp_path), image_size=8)
    fitted, judged = load(cfg)
    assert (len(fitted.images), judged.labels.tolist()) == (10, [0, 0, 1, 1])
    assert "6 images in no class folder: clustered, never judged" in fitted.notes
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn2\t0\t0\t1\t1\nval_1.JPEG\tn1\t0\t0\t1\t1\nval_2.JPEG\tn2\t0\t0\t1\t1\n")
    train, val = load(Config(dataset=str(tmp_path), image_size=8, split="test"))
    assert val.labels.tolist() == [1, 0, 1] and len(train.images) == 7
    assert val.classes == ("n1", "n2")


def test_one_class_is_none():
    labels, test = layout(["photos/1.jpg", "photos/2.jpg"])
    assert set(labels) == {""} and test is None


def test_train_alone_is_no_split():
    labels, test = layout(["train/cat/1.jpg", "train/dog/1.jpg"])
    assert labels.tolist() == ["cat", "dog"] and test is None


# The cache


@pytest.fixture
def album(tmp_path):
    for i in range(6):
        photo(tmp_path / "album" / f"{i}.png", seed=i)
    (tmp_path / "album" / "3.png").write_text("no image")
    return tmp_path / "album"


def test_second_start_decodes_nothing(album, monkeypatch):
    first = from_folder(album, 8)
    monkeypatch.setattr(folders, "decode", lambda *_: pytest.fail("decoded again"))
    again = from_folder(album, 8)
    assert first.images.tobytes() == again.images.tobytes() and first.notes == again.notes
    again.images[0] = 0  # the array may be written to, the file does not change
    assert from_folder(album, 8).images.tobytes() == first.images.tobytes()


def test_threads_change_nothing(album, cache):
    one = from_folder(album, 8, threads=1)
    shutil.rmtree(cache)
    assert from_folder(album, 8, threads=4).images.tobytes() == one.images.tobytes()


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(how(content))


@pytest.mark.parametrize(
    "ending, how",
    [
        (".npy", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (".npy", lambda content: content[:200]),
        (".npy", lambda content: b""),
        (".json", lambda content: content[: len(content) // 2]),
        (".json", lambda content: b"[]"),
        (".json", lambda content: b'{"shape": [5, 8, 8, 3]}'),
    ],
    ids=["a bit", "truncated", "empty", "half a record", "another record", "no digest"],
)
def test_damaged_cache_is_rebuilt(ending, how, album, cache):
    first = from_folder(album, 8).images.tobytes()
    (file,) = cache.glob(f"*{ending}")
    sound = file.read_bytes()
    damage(file, how)
    assert from_folder(album, 8).images.tobytes() == first
    assert file.read_bytes() == sound and len(list(cache.iterdir())) == 2


def test_a_changed_file_is_noticed(album):
    first = from_folder(album, 8).images[0].copy()
    stamp = (album / "0.png").stat()
    photo(album / "0.png", seed=99)
    os.utime(album / "0.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (from_folder(album, 8).images[0] != first).any()


def test_unwritable_cache_costs_only_speed(album, cache, monkeypatch):
    first = from_folder(album, 8).images.tobytes()
    def full(file, shape):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    shutil.rmtree(cache)
    monkeypatch.setattr(mice.cache, "header", full)
    again = from_folder(album, 8)
    assert again.images.tobytes() == first and not on_disk(again.images)
    assert "could not be cached (No space left on device)" in again.notes[0]
    assert list(cache.iterdir()) == []


def test_two_starts_at_once(album, cache):
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: read_images(album, find_images(album)[0], 8).images.tobytes(), range(4)))
    assert len(set(arrays)) == 1 and len(list(cache.iterdir())) == 2


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    found = []
    for name in ("MICE_CACHE", "XDG_CACHE_HOME", None):
        found.append(mice.cache.cache_folder())
        monkeypatch.delenv(name) if name else None
    assert [path.as_posix() for path in found[1:]] == ["/x/mice", "/h/.cache/mice"]


def test_announced_before_decoding(album, capsys, monkeypatch):
    monkeypatch.setattr(folders, "fingerprint", lambda *_: pytest.fail("read"))
    with pytest.raises(pytest.fail.Exception):
        from_folder(album, 100)
    assert capsys.readouterr().err.strip() == "album: 6 image files, 180 kB at 100 x 100 x 3"


def test_the_key_has_a_recipe(album):
    names = find_images(album)[0]
    assert fingerprint(album, names, [8, True]) != fingerprint(album, names, [8, False])


# Labels, subsets, reports


@pytest.mark.parametrize("labels", [np.arange(4), np.zeros((5, 1), int), np.zeros(5), np.array([[1]])])
def test_labels_of_the_wrong_length_or_kind(labels, tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(5, 8, 8), labels=labels)
    assert "labels must be 5 whole numbers or names, one for each image" in one_line(lambda: from_npz(tmp_path / "a.npz"))


def test_subset_of_an_npz(tmp_path):
    images = noise(50, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50) % 4)
    cfg = dict(dataset=str(tmp_path / "a.npz"), image_size=8, subset=20)
    fitted, judged = load(Config(**cfg))
    assert fitted is judged and fitted.protocol == "20 of 50 images, drawn without labels, clustered and judged"
    places = [int(np.flatnonzero((images == image).all((1, 2, 3)))[0]) for image in fitted.images]
    assert places == sorted(set(places)) and (fitted.labels == np.array(places) % 4).all()
    np.testing.assert_array_equal(load(Config(**cfg, seed=5))[0].images, fitted.images)
    assert "subset must be at most 50" in one_line(lambda: load(Config(**cfg | dict(subset=51))))


@pytest.mark.parametrize("K, says", [(10, []), (12, ["2 of the clusters"]), (7, ["3 of the classes"])])
def test_other_numbers_of_clusters_are_reported(K, says):
    cfg = Config(n_clusters=K)
    lines = report(load(cfg)[0], cfg)
    assert lines[:2] == ["digits: 1797 images of 32 x 32 x 1, 1.8 MB in memory", "protocol: all 1797 images clustered and judged"]
    assert len(lines) == 2 + len(says) and all(any(word in line for line in lines) for word in says)


# The real data beside the repository


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
    fitted, judged = load(Config(dataset="cifar10", data=str(real)))
    assert fitted is judged and fitted.images.shape == (60_000, 32, 32, 3)
    assert np.bincount(fitted.labels).tolist() == [6000] * 10 and fitted.classes[0] == "airplane"
    assert fitted.notes == ("141 of 60000 images come from a lossy copy",)  # and no duplicates
    assert fitted.protocol == "train+test pooled: all 60000 images clustered and judged"
    train, test = load(Config(dataset="cifar10", data=str(real / "cifar10.npz"), split="test", subset=10_000))
    assert train.images.shape == test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.protocol == "10000 of 50000 train images, drawn without labels, clustered; 10000 test images judged"
    assert duplicates(np.concatenate([train.images, test.images])) == 0


def test_clothing10(real):
    data = from_folder(real / "clothing10", 32, threads=2)
    assert data.images.shape == (3781, 32, 32, 3) and len(data.classes) == 10
    assert (np.bincount(data.labels).min(), np.bincount(data.labels).max(), data.test.sum()) == (136, 928, 372)
    assert data.protocol == "train+test pooled: all 3781 images clustered and judged"
