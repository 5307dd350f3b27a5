"""Arrays as datasets: labels that do not fit, subsets, and parts that share no image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mice.data.images import Images, load_npz, resize, select, split

def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


WRONG = [np.arange(4), np.zeros((5, 1), int), np.zeros(5), np.array([[1]])]


@pytest.mark.parametrize("labels", WRONG)
def test_labels_of_the_wrong_length_or_kind(labels, tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(5, 8, 8), labels=labels)
    with pytest.raises(ValueError, match="^labels must be 5 whole numbers or names, one for each image"):
        load_npz(tmp_path / "a.npz")


ROWS = st.lists(st.tuples(st.booleans(), st.integers(-1, 3)), min_size=2, max_size=30)  # test part? and label


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(0, 30))
def test_labels_and_parts_stay_with_their_images(rows, n):
    "Pixel (0, 0) of each image is its number, so the images of both sides can be told."
    test, labels = (np.array(column) for column in zip(*rows, strict=True))
    images = np.arange(len(rows), dtype=np.uint8)[:, None, None, None].repeat(4, 1)
    data = Images("some", images, labels, "all", test=test)
    for kind in ("all", "test"):
        pool = np.arange(len(rows)) if kind == "all" else np.flatnonzero(~test)
        try:
            fit, evaluate = split(data, kind, n)
        except ValueError as error:
            assert "subset must be at most" in str(error) or "leaves no labelled image" in str(error)
            continue
        fitted, evaluated = (part.images[:, 0, 0, 0].tolist() for part in (fit, evaluate))
        assert fitted == sorted(set(fitted)) and len(fitted) == (n or len(pool))
        assert set(fitted) <= set(pool.tolist())
        assert evaluate.labels.tolist() == labels[evaluated].tolist() and min(evaluate.labels) >= 0
        if kind == "test":
            assert not set(fitted) & set(evaluated)
            assert evaluated == np.flatnonzero(test & (labels >= 0)).tolist()
        else:
            assert set(evaluated) <= set(fitted)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 19)))
def test_selecting_gives_the_same_rows_however_it_is_done(indices):
    images = noise(20, 3, 3, 1)
    indices = np.array(sorted(indices), dtype=int)
    np.testing.assert_array_equal(select(images, indices), images[indices])


@pytest.mark.parametrize("size", [4, 11, 30])
def test_images_resized_together_are_resized_alone(size, monkeypatch):
    "Chunks are an arrangement, not a result."
    images = noise(7, 9, 12, 3)
    alone = np.concatenate([resize(image[None], size) for image in images])
    monkeypatch.setattr("mice.data.cache.CHUNK_BYTES", 2000)
    np.testing.assert_array_equal(resize(images, size), alone)
