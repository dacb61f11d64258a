"""Augmented crops: what they are, what decides them, and that a cache repeats them bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.views import image_views
from ci2p_cache.specs import AugmentSpec, ImageSpec, ViewSpec
from tests.support.caches import data_digests, with_options
from tests.support.pictures import picture, write_image_folder

SPEC = ImageSpec(size=64, resize_side=64, decoder="x")
NAMES = ("authors", "rand", "trivial")


def views_of(
    views: str, augment: str | None, *, seed: int = 5, key: str = "ant/1.jpg", number: int = 1
) -> torch.Tensor:
    buffer = io.BytesIO()
    picture(number, 90, 70).save(buffer, "PNG")
    image = decode_image(buffer.getvalue(), SPEC)
    parsed = None if augment is None else AugmentSpec.parse(augment)
    spec = ViewSpec.parse(views, seed=seed, augment=parsed)
    return image_views(image, SPEC, spec, split="train", key=key)[0]


def test_an_augmented_crop_is_what_torchvision_makes_of_the_crop_after_the_documented_seed() -> (
    None
):
    from torchvision.transforms import v2

    plain, found = views_of("crops:40", None), views_of("crops:40", "authors")
    assert found.shape == plain.shape
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    steps = v2.Compose([
        v2.RandAugment(), v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(7)], 0.1),
        v2.RandomSolarize(128, 0.2), v2.RandomErasing(0.25),
    ])  # fmt: skip
    for view, (before, after) in enumerate(zip(plain, found, strict=True)):
        name = f"augment\0005\0train\0ant/1.jpg\0{view}".encode()
        torch.manual_seed(
            int.from_bytes(hashlib.blake2b(name, digest_size=16).digest()[:8], "little")
        )
        assert torch.equal(steps(before), after)


@pytest.mark.parametrize("augment", [*NAMES, '{"blur": 1, "erasing": 1}'])
def test_seed_split_key_and_number_alone_decide_it(augment: str) -> None:
    first = views_of("crops:6", augment)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  # the global state is the point
    random.seed(99)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(views_of("crops:6", augment), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    # A bank that has more views has the same first ones.
    assert torch.equal(views_of("crops:9", augment)[:6], first)
    assert not torch.equal(views_of("crops:6", augment, seed=6), first)
    assert not torch.equal(views_of("crops:6", augment, key="ant/2.jpg"), first)
    assert not torch.equal(first, views_of("crops:6", None))


def test_the_least_area_bounds_the_crops() -> None:
    buffer = io.BytesIO()
    picture(1, 90, 70).save(buffer, "PNG")
    image = decode_image(buffer.getvalue(), SPEC)
    spec = ViewSpec.parse("crops:200", augment=AugmentSpec(min_area=0.5))
    _, boxes = image_views(image, SPEC, spec, split="train", key="a")
    areas = [box.height * box.width / (90 * 70) for box in boxes]
    assert 0.49 < min(areas) < 0.6


class TestDeclarations:
    def test_a_name_an_object_and_a_file_say_the_same(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("rand_augment: 2\nerasing: 0.5\n")
        read = AugmentSpec.parse(str(file))
        assert read == AugmentSpec(rand_augment=2, erasing=0.5)
        assert AugmentSpec.parse(str(read)) == read
        assert json.loads(str(read)) == {"rand_augment": 2, "erasing": 0.5}
        for name in NAMES:
            assert str(AugmentSpec.parse(name)) == name
        # Options keep what the file said.
        options = cc.EncodeOptions(views="crops:2", augment=str(file))
        file.unlink()
        assert dataclasses.replace(options, size=64).view_spec().augment == read

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("nosuch", "none of authors, rand, trivial"),
            ('{"sharpen": 1}', "unknown field 'sharpen'"),
            ('{"grey": 2}', "`grey` is 2"),
            ('{"grey": "often"}', "wants"),
            ("{grey", "not to be read"),
        ],
    )
    def test_what_is_no_declaration_is_refused(self, text: str, said: str) -> None:
        with pytest.raises(errors.UsageError, match=said):
            cc.EncodeOptions(views="crops:2", augment=text)

    @pytest.mark.parametrize("views", ["none", "flip"])
    def test_it_wants_crops(self, views: str) -> None:
        with pytest.raises(errors.UsageError, match="wanted crops:K"):
            cc.EncodeOptions(views=views, augment="rand")

    def test_caches_without_it_have_no_field_for_it(self) -> None:
        plain = ViewSpec.parse("crops:2")
        assert plain.to_dict() == {"kind": "crops", "num_crops": 2, "seed": 0}
        assert ViewSpec.from_dict(plain.to_dict()) == plain
        augmented = ViewSpec.parse("crops:2", augment=AugmentSpec(grey=0.5))
        assert ViewSpec.from_dict(augmented.to_dict()) == augmented
        assert augmented.to_dict()["augment"]["grey"] == 0.5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"), {"ant": 7, "bee": 6})


def test_batch_workers_and_order_change_no_byte_and_verify_repeats_every_view(
    source: Path, tmp_path: Path
) -> None:
    options = with_options(views="crops:3", augment="authors", devices="cpu:1", workers=1)
    cc.encode(source, tmp_path / "one", options)
    other = dataclasses.replace(options, devices="cpu:2", workers=3, shard_range="2/2")
    for part in ("2/2", "1/2"):
        cc.encode(source, tmp_path / "other", dataclasses.replace(other, shard_range=part))
    cc.encode(source, tmp_path / "other", dataclasses.replace(other, shard_range=None))
    assert data_digests(tmp_path / "one") == data_digests(tmp_path / "other")
    cc.encode(source, tmp_path / "plain", with_options(views="crops:3"))
    stored, plain = (
        np.asarray(cc.open_cache(tmp_path / name)["train"].latents[:]) for name in ("one", "plain")
    )
    assert stored.shape == plain.shape
    assert (stored != plain).any(axis=(2, 3, 4)).mean() > 0.9
    assert cc.open_cache(tmp_path / "one").fingerprint.views.words == "crops:3, augmented: authors"
    found = cc.reencode(tmp_path / "one", 13)
    assert (found.compared, found.differing_values, found.findings) == (13, 0, ())
    with pytest.raises(errors.FingerprintMismatchError, match="augment"):
        cc.encode(source, tmp_path / "one", dataclasses.replace(options, augment="rand"))
