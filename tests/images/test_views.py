"""Views: the centre square, its mirror, and seeded crops with their boxes."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from ci2p_cache.images.decode import DecodedImage, decode_image
from ci2p_cache.images.views import CropBox, image_views
from ci2p_cache.specs import AugmentSpec, ImageSpec, ViewSpec
from tests.support.pictures import picture
from tests.support.tiers import thinned

SPEC = ImageSpec(size=64, resize_side=64, decoder="x")
FLIP, NONE = ViewSpec(kind="flip"), ViewSpec(kind="none")
AUGMENTED = ViewSpec.parse("crops:4", seed=3, augment=AugmentSpec.parse("authors"))


def decoded(width: int, height: int, seed: int = 1) -> DecodedImage:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return decode_image(buffer.getvalue(), SPEC)


def crops(count: int, seed: int = 42) -> ViewSpec:
    return ViewSpec(kind="crops", num_crops=count, seed=seed)


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (64, 64), (64, 200), (31, 47), (500, 333)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize_side", [64, 73])
def test_the_square_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"], resize_side: int
) -> None:
    from torchvision.transforms import v2

    spec = ImageSpec(size=64, resize_side=resize_side, interpolation=interpolation, decoder="x")
    image = decoded(*size)
    transform = v2.Compose(
        [
            v2.Resize(resize_side, v2.InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(64),
        ]
    )
    views, boxes = image_views(image, spec, NONE, split="train", key="a.png")
    assert views.shape == (1, 3, 64, 64)
    assert views.dtype == torch.uint8
    assert views.is_contiguous()
    assert len(boxes) == 1
    assert torch.equal(views[0], transform(image.pixels))


def test_the_square_is_close_to_pillows_antialiased_resize() -> None:
    image = decoded(180, 140)
    views, _ = image_views(image, SPEC, NONE, split="val", key="a.png")
    reference = Image.fromarray(image.pixels.permute(1, 2, 0).numpy())
    reference = reference.resize((82, 64), Image.Resampling.BILINEAR).crop((9, 0, 73, 64))
    difference = views[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference)
    assert np.abs(difference).max() <= 1


def test_flip_stores_the_square_and_its_mirror() -> None:
    image = decoded(90, 70)
    views, boxes = image_views(image, SPEC, FLIP, split="train", key="a.png")
    square, _ = image_views(image, SPEC, NONE, split="train", key="a.png")
    assert views.shape == (2, 3, 64, 64)
    assert views.is_contiguous()
    assert torch.equal(views[0], square[0])
    assert torch.equal(views[1], square[0].flip(2))
    assert not torch.equal(views[0], views[1])
    assert boxes == [CropBox(0, 10, 70, 70, flip=False), CropBox(0, 10, 70, 70, flip=True)]


@pytest.mark.parametrize("view_spec", [NONE, FLIP, crops(3)])
@pytest.mark.parametrize("split", ["val", "test"])
def test_other_splits_have_the_centre_square_only(view_spec: ViewSpec, split: str) -> None:
    image = decoded(90, 70)
    views, boxes = image_views(image, SPEC, view_spec, split=split, key="a.png")
    square, square_boxes = image_views(image, SPEC, NONE, split="train", key="a.png")
    assert torch.equal(views, square)
    assert boxes == square_boxes


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((256, 128), CropBox(0, 64, 128, 128, flip=False)),
        ((128, 256), CropBox(64, 0, 128, 128, flip=False)),
        ((64, 64), CropBox(0, 0, 64, 64, flip=False)),
        ((9, 9), CropBox(0, 0, 9, 9, flip=False)),
        ((8, 100), CropBox(46, 0, 8, 8, flip=False)),
    ],
)
def test_the_box_of_the_square_is_its_place_in_the_decoded_image(
    size: tuple[int, int], box: CropBox
) -> None:
    _, boxes = image_views(decoded(*size), SPEC, NONE, split="val", key="a.png")
    assert boxes == [box]


def test_crops_are_cut_where_their_boxes_say() -> None:
    from torchvision.transforms.v2.functional import resize

    image = decoded(90, 70)
    views, boxes = image_views(image, SPEC, crops(8), split="train", key="ant/1.jpg")
    assert views.shape == (8, 3, 64, 64)
    assert views.is_contiguous()
    assert {box.flip for box in boxes} == {True, False}
    for view, box in zip(views, boxes, strict=True):
        cut = image.pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
        expected = resize(cut, [64, 64], antialias=True)
        assert torch.equal(view, expected.flip(2) if box.flip else expected)


def test_crops_depend_on_seed_split_key_and_number_alone() -> None:
    image = decoded(90, 70)

    def boxes(view_spec: ViewSpec, key: str) -> list[CropBox]:
        return image_views(image, SPEC, view_spec, split="train", key=key)[1]

    first = boxes(crops(4), "ant/1.jpg")
    assert boxes(crops(4), "ant/1.jpg") == first
    assert boxes(crops(6), "ant/1.jpg")[:4] == first
    assert boxes(crops(4, seed=43), "ant/1.jpg") != first
    assert boxes(crops(4), "ant/2.jpg") != first
    assert len(set(first)) == 4
    torch.manual_seed(7)
    assert boxes(crops(4), "ant/1.jpg") == first


def test_crops_of_seed_42_stay_where_they_are() -> None:
    # Whoever changes these numbers changes every cache made with crops: a new format version.
    _, boxes = image_views(decoded(90, 70), SPEC, crops(4), split="train", key="ant/1.jpg")
    assert boxes == [
        CropBox(16, 44, 33, 26, flip=False),
        CropBox(3, 29, 57, 56, flip=True),
        CropBox(32, 43, 38, 42, flip=False),
        CropBox(5, 0, 56, 73, flip=False),
    ]


def test_crops_follow_the_published_distribution() -> None:
    image = decoded(200, 150)
    areas, ratios, flips, lefts = [], [], [], []
    for number in range(25):
        key = f"{number}.jpg"
        for box in image_views(image, SPEC, crops(40), split="train", key=key)[1]:
            assert 0 <= box.top <= 150 - box.height
            assert 0 <= box.left <= 200 - box.width
            areas.append(box.height * box.width / 30_000)
            ratios.append(box.width / box.height)
            flips.append(box.flip)
            lefts.append((box.left + 0.5) / (200 - box.width + 1))
    # 1,000 draws: means within four standard errors of uniform ones; rounding moves an edge by 1 %.
    assert 0.079 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1.0
    assert 0.74 < min(ratios) < 0.77
    assert 1.30 < max(ratios) < 1.35
    assert abs(np.mean(flips) - 0.5) < 0.064
    assert abs(np.mean(lefts) - 0.5) < 0.037


@pytest.mark.parametrize(
    ("size", "box"),
    [((300, 4), (0, 147, 4, 5)), ((4, 300), (147, 0, 5, 4)), ((1, 1), (0, 0, 1, 1))],
)
def test_crops_of_a_narrow_image_fall_back_to_its_centre(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = decoded(*size) if min(size) > 3 else flat(*size)
    spec = ViewSpec(kind="crops", num_crops=60, seed=1)
    _, boxes = image_views(image, SPEC, spec, split="train", key="line.png")
    assert box in {(b.top, b.left, b.height, b.width) for b in boxes}
    for found in boxes:
        assert 0 < found.height <= size[1]
        assert 0 < found.width <= size[0]


def flat(width: int, height: int) -> DecodedImage:
    pixels = torch.full((3, height, width), 9, dtype=torch.uint8)
    return DecodedImage(pixels, width, height, "RGB", "PNG", 1)


@pytest.mark.parametrize("view_spec", [FLIP, crops(3)])
def test_any_number_of_threads_gives_the_same_views(view_spec: ViewSpec) -> None:
    images = [decoded(90 + i, 70 + 2 * i, seed=i) for i in range(12)]

    def cut(number: int) -> torch.Tensor:
        image = images[number % len(images)]
        return image_views(image, SPEC, view_spec, split="train", key=f"{number}.png")[0]

    alone = [cut(number) for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(cut, reversed(range(60))))
    assert all(torch.equal(a, b) for a, b in zip(alone, reversed(together), strict=True))


@pytest.mark.parametrize("view_spec", [NONE, FLIP, crops(2)])
def test_views_own_their_memory(view_spec: ViewSpec) -> None:
    image = decoded(64, 64)
    before = image.pixels.clone()
    views, _ = image_views(image, SPEC, view_spec, split="train", key="a.png")
    views.fill_(3)
    assert torch.equal(image.pixels, before)


@pytest.mark.parametrize("views", [NONE, FLIP, crops(4), AUGMENTED])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("exif", thinned(["apply", "ignore"]))
def test_how_pixels_are_strided_makes_no_difference_to_a_byte(
    views: ViewSpec,
    interpolation: Literal["bilinear", "bicubic"],
    exif: Literal["ignore", "apply"],
) -> None:
    spec = ImageSpec(size=64, resize_side=73, interpolation=interpolation, exif=exif, decoder="x")
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, (width, height) in enumerate([(90, 70), (64, 200), (73, 81), (501, 333)]):
        for kind, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA")):
            buffer = io.BytesIO()
            picture(number, width, height).convert(mode).save(buffer, kind, exif=turned)
            assert_same_views(buffer.getvalue(), spec, views)


@pytest.mark.slow
def test_real_photographs_give_the_same_views_however_strided(shared_data: Path) -> None:
    flowers = sorted((shared_data / "flowers").rglob("*.jpg"))
    photos = sorted((shared_data / "photos").glob("*.png"))
    for path in [*flowers[::7], *photos[::2]]:
        for views in (FLIP, crops(2)):
            assert_same_views(path.read_bytes(), ImageSpec(decoder="x"), views)


def assert_same_views(data: bytes, spec: ImageSpec, views: ViewSpec) -> None:
    made = []
    for planar in (True, False):
        image = decode_image(data, spec, planar=planar)
        assert image.pixels.is_contiguous() or not planar
        made.append(image_views(image, spec, views, split="train", key="a"))
    assert made[0][0].is_contiguous()
    assert made[1][0].is_contiguous()
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
