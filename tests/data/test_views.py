"""Views against torchvision: the same parameters give the same pixels, from the same distributions."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import ColorJitter, RandomResizedCrop

from mice.core import generator
from mice.data.views import (
    ColourParams,
    Strength,
    affine_matrices,
    apply_colour,
    augment,
    blend_,
    sample_colour_params,
    shift_hue_,
    to_float,
    warp,
)

ADJUST = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
SIZE = 32


def photos(count: int) -> torch.Tensor:
    "Smooth colours with some noise, (count, 32, 32, 3) uint8; grey, black and white pixels among them."
    rng = generator("photos")
    coarse = torch.rand(count, 3, 5, 5, generator=rng)
    x = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    x = (1.6 * x - 0.3 + 0.05 * torch.randn(x.shape, generator=rng)).clamp(0, 1)
    x[:, :, :4, :4] = x[:, :1, :4, :4]
    x[:, :, 4:6, :4], x[:, :, 6:8, :4] = 0, 1
    return (255 * x).round().byte().permute(0, 2, 3, 1)


def unchanged(count: int, **changes) -> ColourParams:
    "Parameters that leave an image alone, but for the changes."
    zero, one, no = torch.zeros(count, dtype=int), torch.ones(count), torch.zeros(count, dtype=bool)
    order = torch.arange(4).expand(count, 4)
    params = ColourParams(zero, zero, zero + SIZE, zero + SIZE, no, no, one, one, one, 0 * one, order)
    return params._replace(**changes)


def by_torchvision(image, p: ColourParams, n: int):
    "One view, one operation after another; of a tensor or of a PIL image."
    box = [side[n].item() for side in (p.top, p.left, p.height, p.width)]
    image = TF.resized_crop(image, *box, (SIZE, SIZE))
    if p.grey[n]:
        image = TF.rgb_to_grayscale(image, 3)
    for op in p.order[n].tolist():
        amount = (p.brightness, p.contrast, p.saturation, p.hue)[op][n].item()
        if amount != (1, 1, 1, 0)[op]:  # even a hue turned by 0 changes bytes, through PIL's HSV
            image = ADJUST[op](image, amount)
    return TF.hflip(image) if p.flip[n] else image


def in_floats(images, params: ColourParams) -> torch.Tensor:
    return torch.stack([by_torchvision(image, params, n) for n, image in enumerate(to_float(images))])


def in_bytes(images, params: ColourParams) -> torch.Tensor:
    pictures = [Image.fromarray(image.numpy()) for image in images]
    views = [np.asarray(by_torchvision(image, params, n)) for n, image in enumerate(pictures)]
    return to_float(torch.from_numpy(np.stack(views)))


def levels(a, b) -> torch.Tensor:
    "Differences in grey levels, after rounding to bytes."
    return ((255 * a).round() - (255 * b).round()).abs()


def only(names: str, count: int) -> ColourParams:
    "One kind of change, as drawn, and no other."
    drawn = sample_colour_params(count, SIZE, SIZE, generator(names))
    return unchanged(count, **{name: getattr(drawn, name) for name in names.split()})


STEPS = "top left height width", "grey", "flip", "brightness", "contrast", "saturation"


@pytest.mark.parametrize("name", STEPS)
def test_each_step_is_torchvisions(name):
    images, params = photos(60), only(name, 60)
    view = apply_colour(to_float(images), params)
    assert not torch.equal(view, to_float(images))
    assert (view - in_floats(images, params)).abs().max() < 1.5e-4  # its red weighs 0.2989, ours 0.299
    assert levels(view, in_bytes(images, params)).max() <= 1


def test_hue_is_torchvisions():
    images, params = photos(60), only("hue", 60)
    view = apply_colour(to_float(images), params)
    assert (view - in_floats(images, params)).abs().max() < 5e-6
    off = levels(view, in_bytes(images, params))  # PIL's hue is a byte, rounded twice
    assert off.mean() < 1 and off.max() <= 20


def test_chain_in_all_orders():
    orders = torch.tensor(list(itertools.permutations(range(4)))).repeat(5, 1)  # (120, 4)
    images = photos(120)
    params = sample_colour_params(120, SIZE, SIZE, generator("chain"))._replace(order=orders)
    view = apply_colour(to_float(images), params)
    assert view.dtype == torch.float32 and 0 <= view.min() and view.max() <= 1
    assert (view - in_floats(images, params)).abs().max() < 0.25 / 255
    off = levels(view, in_bytes(images, params))
    assert off.mean() < 2 and (off <= 3).double().mean() > 0.9
    params = params._replace(hue=torch.zeros(120))
    off = levels(apply_colour(to_float(images), params), in_bytes(images, params))
    assert off.mean() < 2 and off.max() <= 8


def test_extreme_colours_turn_without_trouble():
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))  # black, white, ties of two
    near = (corners + 1e-7 * torch.randn(27, 3, generator=generator("near"))).clamp(0, 1)
    x = torch.cat([corners, near])[:, :, None, None]
    for turn in (-0.4, -1 / 3, -1 / 6, 0.0, 1 / 6, 0.25, 0.4):
        turned = shift_hue_(x.clone(), torch.full((54,), turn))
        assert torch.isfinite(turned).all()
        expected = torch.stack([TF.adjust_hue(image, turn) for image in x])
        torch.testing.assert_close(turned, expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(turned.amax(1), x.amax(1), atol=0, rtol=0)


SHAPES = [(32, 32), (96, 96), (24, 60), (60, 25), (10, 200)]  # attempts fail often in two, always in the last


@pytest.mark.parametrize("H, W", SHAPES)
def test_crops_come_from_torchvisions_distribution(H, W):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        image, get_params = torch.empty(3, H, W), RandomResizedCrop.get_params
        theirs = np.array([get_params(image, (0.2, 1), (3 / 4, 4 / 3)) for _ in range(6000)]).T
    params = sample_colour_params(40000, H, W, generator("crops", H, W))
    ours = np.stack([side.numpy() for side in params[:4]])
    assert ours.dtype == np.int64 and ours[:2].min() >= 0 and ours[2:].min() > 0
    assert (ours[0] + ours[2]).max() <= H and (ours[1] + ours[3]).max() <= W
    features = {
        "top": lambda c: c[0],
        "left": lambda c: c[1],
        "height": lambda c: c[2],
        "width": lambda c: c[3],
        "area": lambda c: c[2] * c[3],
        "ratio": lambda c: c[3] / c[2],
        "top, of where it can be": lambda c: c[0] / (H + 1 - c[2]),
        "left, of where it can be": lambda c: c[1] / (W + 1 - c[3]),
    }
    p = {name: ks_2samp(of(ours), of(theirs)).pvalue for name, of in features.items()}
    assert min(p.values()) > 0.01, p


def test_jitter_comes_from_torchvisions_distribution():
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.4)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = [ColorJitter.get_params(*ranges) for _ in range(6000)]
    params = sample_colour_params(40000, 32, 32, generator("jitter"))
    lowest = dict(brightness=0.6, contrast=0.6, saturation=0.6, hue=-0.4)
    for k, (name, low) in enumerate(lowest.items()):
        ours = getattr(params, name).numpy()
        assert ks_2samp(ours, [draw[1 + k] for draw in theirs]).pvalue > 0.01, name
        assert kstest(ours, "uniform", (low, 0.8)).pvalue > 0.01, name
        assert low <= ours.min() and ours.max() <= low + 0.8 + 1e-6
    assert (params.order.sort(1).values == torch.arange(4)).all()
    orders, counts = np.unique(params.order.numpy(), axis=0, return_counts=True)
    assert len(orders) == 24 and chisquare(counts).pvalue > 0.01
    assert binomtest(int(params.grey.sum()), 40000, 0.2).pvalue > 0.01
    assert binomtest(int(params.flip.sum()), 40000, 0.5).pvalue > 0.01


def test_parameters_are_independent_of_each_other_and_of_the_neighbours():
    p = sample_colour_params(40000, 32, 32, generator("independent"))
    within = torch.rand(2, 40000, generator=generator("within"))  # makes whole positions continuous
    spots = (p.top + within[0]) / (33 - p.height), (p.left + within[1]) / (33 - p.width)
    assert all(kstest(spot.numpy(), "uniform").pvalue > 0.01 for spot in spots)
    crops = *spots, p.height * p.width, (p.width / p.height).log()
    columns = [t.double() for t in (*crops, *p[4:10], p.order[:, 0] == 3, p.order[:, 0] == 1)]
    columns = torch.stack(columns)  # (12, N)
    related = torch.corrcoef(columns).fill_diagonal_(0).abs()
    related[10, 11] = related[11, 10] = 0  # only one of them can be first
    assert related.max() < 4.5 / 200  # 1 / sqrt(N) = 1 / 200
    lagged = [torch.corrcoef(torch.stack([c[1:], c[:-1]]))[0, 1].abs() for c in columns]
    assert max(lagged) < 4.5 / 200


@pytest.mark.parametrize("views", ["colour", "affine"])
@pytest.mark.parametrize("C", [1, 3])
def test_views_depend_on_key_and_own_pixels_alone(views, C):
    images = photos(16)[..., :C]
    before = torch.get_rng_state()
    view = augment(images, 0, "view 1", 2, views=views)
    assert view.shape == (16, C, SIZE, SIZE) and view.dtype == torch.float32
    assert torch.equal(view, augment(images.clone(), 0, "view 1", 2, views=views))
    assert not torch.equal(view, augment(images, 0, "view 2", 2, views=views))
    assert torch.equal(before, torch.get_rng_state())
    for n in (0, 7, 15):
        other = 255 - images
        other[n] = images[n]
        assert torch.equal(augment(other, 0, "view 1", 2, views=views)[n], view[n])


def test_grey_images_have_no_colour_to_change():
    images, params = photos(40)[..., :1], sample_colour_params(40, SIZE, SIZE, generator("one channel"))
    x = to_float(images)
    other = params._replace(hue=0 * params.hue, saturation=0 * params.hue + 1, grey=~params.grey)
    view = apply_colour(x, params)
    assert torch.equal(view, apply_colour(x, other))
    as_colour = apply_colour(x.repeat(1, 3, 1, 1), params)  # grey pixels: saturation and hue do nothing
    torch.testing.assert_close(as_colour, view.repeat(1, 3, 1, 1), atol=2e-6, rtol=0)


def test_inputs_are_not_changed_and_layout_does_not_matter():
    images, params = photos(8), sample_colour_params(8, SIZE, SIZE, generator("layout"))
    x = to_float(images)
    kept, view = x.clone(), apply_colour(x, params)
    assert torch.equal(x, kept)
    torch.testing.assert_close(apply_colour(x.contiguous(), params), view, atol=1e-6, rtol=0)
    assert apply_colour(x, unchanged(8)).data_ptr() != x.data_ptr()  # nothing to do: still a fresh tensor


def test_nothing_is_read_back_from_the_device():
    "A meta tensor has a shape and no values: reading one, or mixing devices, raises."
    params = sample_colour_params(4, SIZE, SIZE, generator("meta"))
    there = ColourParams(*(t.to("meta") for t in params))
    for C in (1, 3):
        assert apply_colour(torch.empty(4, C, SIZE, SIZE, device="meta"), there).device.type == "meta"
    with pytest.raises(RuntimeError):
        blend_(torch.empty(4, 3, 8, 8, device="meta"), params.order[:, 0], params.hue)


def first_affine_views(images, *parts, strength):
    "The only augmentation of the first version; results on digits rest on it."
    rng = generator(*parts, device=images.device)
    x = warp(to_float(images), affine_matrices(len(images), rng, strength))
    light = 1 + (2 * torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) - 1) * strength.light
    return x * light + torch.randn(x.shape, generator=rng, device=x.device) * strength.noise


def test_affine_views_are_what_they_were():
    for images, strength in ((photos(9), Strength()), (photos(9)[..., :1], Strength(rotate=40, noise=0.3))):
        before = first_affine_views(images, 3, "view 2", strength=strength)
        assert torch.equal(augment(images, 3, "view 2", views="affine", strength=strength), before)


@pytest.mark.parametrize(
    "images, views, message",
    [
        (torch.zeros(2, 8, 8, 3), "colour", "uint8"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "colour", "shape"),
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), "colour", "1 or 3 channels, got 4"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "color", "colour, mild, affine, got 'color'"),
    ],
)
def test_errors_name_what_was_expected(images, views, message):
    with pytest.raises(ValueError, match=message):
        augment(images, 0, views=views)
