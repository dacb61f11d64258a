"""Models that CI2P is held against: on images, of timm, and timm's ViTs on latents."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.gdn import GDN, AnalysisTransform
from ci2p_cache.models.ci2p_vit import PatchReshape
from ci2p_cache.models.registry import build_model, config_from_dict, list_models, model_config
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.records import TrainObserver
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned

ON_IMAGES = ("cnn_vit", "cnn_vit_small", "cnn_vit_tiny", "vit_b16", "vit_s16", "vit_ti16")
DEIT_TINY = "deit_tiny_patch16_224"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 5 validation images of two classes, 64 px, int8."""
    root = tmp_path_factory.mktemp("baselines")
    write_image_folder(root / "src" / "train", {"ant": 7, "bee": 5})
    write_image_folder(root / "src" / "val", {"ant": 3, "bee": 2}, quality=60)
    cc.encode(root / "src", root / "out", cc.EncodeOptions(encoder="bundled", size=64))
    return root / "out"


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return cc.create_model(name, **options)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


class TestOnImages:
    def test_the_names_are_listed_and_read_images(self) -> None:
        assert list_models("images") == ON_IMAGES
        assert set(cc.list_models()) == {*list_models("latents"), *ON_IMAGES}
        assert {model_config(name).reads for name in ON_IMAGES} == {"images"}
        assert {model_config(name).reads for name in list_models("latents")} == {"latents"}

    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("vit_b16", 85_843_200),
            ("vit_s16", 21_687_936),
            ("vit_ti16", 5_535_552),
            ("cnn_vit", 88_956_320),
            ("cnn_vit_small", 24_751_520),
            ("cnn_vit_tiny", 12_787_104),
        ],
    )
    def test_parameters_at_256_px_without_a_head(self, name: str, count: int) -> None:
        assert num_parameters(on_meta(name, num_classes=0)) == count

    @pytest.mark.parametrize("name", ON_IMAGES)
    @pytest.mark.parametrize("num_classes", thinned([7, 0]))
    def test_images_give_logits_or_pooled_features(self, name: str, num_classes: int) -> None:
        model = on_meta(name, num_classes=num_classes, latent_size=4)
        width = model.config.embed_dim
        out = model.eval()(torch.empty(2, 3, 64, 64, device="meta"))
        assert out.shape == (2, num_classes or width)

    def test_cnn_vit_takes_images_that_are_not_square(self) -> None:
        model = on_meta("cnn_vit_tiny", num_classes=3)
        assert model(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, 3)

    @pytest.mark.parametrize(
        ("name", "shape", "match"),
        [
            ("vit_ti16", (1, 3, 64, 96), r"vit_ti16 reads images \(batch, 3, 64, 64\), got"),
            ("vit_ti16", (1, 192, 4, 4), r"reads images .* got \(1, 192, 4, 4\)"),
            ("cnn_vit_tiny", (1, 3, 64, 80), r"\(batch, 3, multiples of 32\), got \(1, 3, 64, 80"),
            ("cnn_vit_tiny", (3, 64, 64), r"got \(3, 64, 64\)"),
            ("timm:test_vit", (1, 3, 64, 96), r"timm:test_vit reads images \(batch, 3, 64, 64\)"),
        ],
    )
    def test_images_of_another_shape_are_refused(
        self, name: str, shape: tuple[int, ...], match: str
    ) -> None:
        with pytest.raises(errors.UsageError, match=match):
            on_meta(name, latent_size=4)(torch.empty(shape, device="meta"))

    @pytest.mark.parametrize("name", ["vit_ti16", "cnn_vit_tiny", "timm:test_vit"])
    def test_weights_are_a_pure_function_of_the_global_seed(self, name: str) -> None:
        options: dict[str, Any] = {"num_classes": 3, "latent_size": 4}
        torch.manual_seed(11)
        first = cc.create_model(name, **options)
        torch.manual_seed(11)
        again = cc.create_model(name, **options)
        other = cc.create_model(name, **options)
        assert same_weights(first, again)
        assert not same_weights(first, other)

    @pytest.mark.parametrize("name", ["vit_ti16", "cnn_vit_tiny"])
    def test_gradients_reach_every_parameter(self, name: str) -> None:
        torch.manual_seed(5)
        model = cc.create_model(name, num_classes=3, latent_size=4, drop_path_rate=0.0)
        loss: Any = nn.functional.cross_entropy(model(images(3, 3, 64, 64)), torch.arange(3))
        loss.backward()
        missing = [
            key
            for key, parameter in model.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        ]
        assert missing == []

    def test_the_vit_is_that_of_the_paper(self) -> None:
        torch.manual_seed(0)
        model: Any = cc.create_model("vit_ti16", num_classes=100)
        assert model.pos_embed.shape == (1, 256, 192)
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
        assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.03)
        norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
        assert len(norms) == 25
        assert {norm.eps for norm in norms} == {1e-6}
        xavier = (2 / (192 + 3 * 16 * 16)) ** 0.5
        assert model.patch_embed.weight.std().item() == pytest.approx(xavier, rel=0.03)
        assert not model.patch_embed.bias.any()

    def test_what_normalises_is_inside_and_in_no_checkpoint(self) -> None:
        given: list[torch.Tensor] = []
        for name, mean, std in (
            ("vit_ti16", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ("timm:vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ):
            model: Any = cc.create_model(name, num_classes=2, latent_size=2)
            stem = model.patch_embed if name == "vit_ti16" else model.model.patch_embed
            stem.register_forward_pre_hook(lambda _, args: given.append(args[0]))
            x = images(1, 3, 32, 32)
            model(x)
            back = given.pop() * torch.tensor(std)[:, None, None]
            torch.testing.assert_close(back + torch.tensor(mean)[:, None, None], x)
            assert not [key for key in model.state_dict() if "normalise" in key]
        cnn: Any = cc.create_model("cnn_vit_tiny", num_classes=2)
        cnn.g_a[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
        x = images(1, 3, 64, 64)
        cnn.eval()(x)
        assert torch.equal(given.pop(), x)

    @pytest.mark.parametrize("name", ["vit_b16", "timm:test_vit", "ci2p+timm:test_vit"])
    def test_a_positional_embedding_of_ours_is_refused_where_a_model_has_its_own(
        self, name: str
    ) -> None:
        with pytest.raises(errors.UsageError, match="comes with its own positional embedding"):
            model_config(name, pos_embed=True)

    def test_cnn_vit_takes_a_positional_embedding(self) -> None:
        model = on_meta("cnn_vit_tiny", pos_embed=True, latent_size=6)
        assert model.vit.pos_embed.shape == (1, 9, 256)
        with pytest.raises(errors.UsageError, match="positional embedding for 6x6"):
            model(torch.empty(1, 3, 64, 64, device="meta"))


class TestAnalysisTransform:
    def reference(self) -> nn.Module:
        layers = pytest.importorskip("compressai.layers")
        utils = pytest.importorskip("compressai.models.utils")
        torch.manual_seed(8)
        parts: list[nn.Module] = []
        for before, after in ((3, 128), (128, 128), (128, 128), (128, 192)):
            parts += [utils.conv(before, after), layers.GDN(after)]
        return nn.Sequential(*parts[:-1])

    def test_it_has_the_parameters_and_the_initialisation_of_compressai(self) -> None:
        wanted = dict(self.reference().named_parameters())
        torch.manual_seed(8)
        ours = AnalysisTransform(128, 192)
        assert num_parameters(ours) == 1_493_312
        found = dict(ours.named_parameters())
        assert list(found) == list(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_with_the_same_weights_outputs_and_gradients_are_those_of_compressai(self) -> None:
        zoo = pytest.importorskip("compressai.zoo")
        theirs = zoo.bmshj2018_factorized(quality=5, metric="mse", pretrained=False).g_a
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "beta" in key or "gamma" in key:
                    # Some below the bound, where gradients pass in one direction only.
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        ours = AnalysisTransform(128, 192)
        ours.load_state_dict(
            {key: value for key, value in theirs.state_dict().items() if "_reparam" not in key}
        )
        x = images(2, 3, 64, 96)
        results = []
        for module in (ours, theirs):
            y = module(x)
            y.square().mean().backward()
            gradients = {key: p.grad for key, p in module.named_parameters()}
            results.append((y.detach(), gradients))
        (y, mine), (wanted, others) = results
        assert y.shape == (2, 192, 4, 6)
        torch.testing.assert_close(y, wanted)
        for key, gradient in others.items():
            torch.testing.assert_close(mine[key], gradient, msg=key)

    def test_a_value_at_its_bound_may_rise_and_not_sink(self) -> None:
        gdn = GDN(2)
        with torch.no_grad():
            gdn.gamma.fill_(-1.0)
        for sign, moves in ((1, True), (-1, False)):
            gdn.zero_grad()
            # A larger gamma makes outputs smaller: lowering the output asks for a rise.
            (sign * gdn(images(1, 2, 3, 4)).sum()).backward()
            assert gdn.gamma.grad is not None
            assert bool(gdn.gamma.grad.any()) == moves


class TestTimm:
    def test_an_unknown_name_is_answered_with_close_ones(self) -> None:
        with pytest.raises(errors.UnknownModelError, match=r"timm .* has no 'deit_smal'") as e:
            cc.create_model("timm:deit_smal")
        assert "timm:deit_small_patch16_224" in (e.value.hint or "")
        with pytest.raises(errors.UnknownModelError, match="has no 'deit_tinny_patch16_224'") as e:
            cc.create_model("ci2p+timm:deit_tinny_patch16_224")
        assert "ci2p+timm:deit_tiny_patch16_224" in (e.value.hint or "")

    @pytest.mark.parametrize(
        "name",
        ["hf-hub:someone/model", "local-dir:/tmp", "deit_tiny_patch16_224.fb_in1k", ""],
    )
    @pytest.mark.parametrize("prefix", ["timm:", "ci2p+timm:"])
    def test_only_listed_names_reach_timm(self, prefix: str, name: str) -> None:
        with pytest.raises(errors.UnknownModelError, match="no model is named"):
            cc.create_model(prefix + name)

    @pytest.mark.parametrize(
        "name", thinned(["resnet18", DEIT_TINY, "swin_tiny_patch4_window7_224"], step=3)
    )
    def test_any_classifier_reads_images_of_the_caches_size(self, name: str) -> None:
        model = on_meta(f"timm:{name}", num_classes=5, latent_size=6)
        assert model.eval()(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 5)
        assert model.config.reads == "images"

    def test_stochastic_depth_is_set_or_refused(self) -> None:
        model = on_meta(f"timm:{DEIT_TINY}", drop_path_rate=0.22)
        assert model.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.22)
        with pytest.raises(errors.UsageError, match="vgg11 takes no stochastic depth") as e:
            model_config("timm:vgg11")
        assert "--drop-path 0" in (e.value.hint or "")
        assert model_config("timm:vgg11", drop_path_rate=0.0).name == "timm:vgg11"

    def test_a_model_that_takes_no_such_images_is_refused_before_it_is_built(self) -> None:
        with pytest.raises(errors.UsageError, match=r"efficientformer_l1 does not run on images"):
            model_config("timm:efficientformer_l1", latent_size=16)


class TestOnLatents:
    @pytest.mark.parametrize(
        "size", ["tiny", *(pytest.param(s, marks=pytest.mark.slow) for s in ("small", "base"))]
    )
    @pytest.mark.parametrize("family", thinned(["vit", "deit"]))
    def test_vit_and_deit_from_tiny_to_base_go_forward_and_back(
        self, family: str, size: str
    ) -> None:
        model = on_meta(f"ci2p+timm:{family}_{size}_patch16_224", num_classes=5, latent_size=14)
        assert type(model).__name__ == "VisionTransformer"
        logits = model(torch.empty(2, 192, 14, 14, device="meta"))
        assert logits.shape == (2, 5)
        logits.sum().backward()
        assert {p.grad is not None for p in model.parameters()} == {True}
        assert model.pos_embed is not None
        assert model.pos_embed.shape == (1, 7 * 7 + 1, model.embed_dim)

    @pytest.mark.parametrize(
        "name",
        thinned(["test_vit", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"], step=3),
    )
    def test_their_relatives_do_too(self, name: str) -> None:
        model = on_meta(f"ci2p+timm:{name}", num_classes=0, latent_channels=320, latent_size=4)
        assert model(torch.empty(2, 320, 4, 4, device="meta")).shape == (2, model.embed_dim)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("swin_tiny_patch4_window7_224", "SwinTransformer"),
            ("swinv2_tiny_window8_256", "SwinTransformerV2"),
            ("vit_tiny_r_s16_p8_224", "VisionTransformer with a Hybrid"),
            ("resnet18", "ResNet"),
            ("cait_xxs24_224", "Cait"),
        ],
    )
    def test_a_stem_that_cannot_be_replaced_is_refused(self, name: str, kind: str) -> None:
        match = f"{name} is a {kind}.*, whose stem cannot be replaced by latents"
        with pytest.raises(errors.UsageError, match=match) as e:
            cc.create_model(f"ci2p+timm:{name}")
        assert e.value.hint == f"timm:{name} trains it on the images"

    def test_latents_of_another_size_are_refused(self) -> None:
        model = on_meta(f"ci2p+timm:{DEIT_TINY}", latent_size=4)
        with pytest.raises(errors.UsageError, match="made for 4x4 latents, those of 64x64 px"):
            model(torch.empty(1, 192, 4, 6, device="meta"))

    def test_the_patch_embedding_works_in_timms_own_class(self) -> None:
        torch.manual_seed(1)
        from timm.models.vision_transformer import VisionTransformer

        model: Any = VisionTransformer(
            img_size=(64, 96), in_chans=192, embed_dim=64, depth=2, num_heads=2, num_classes=3,
            embed_layer=cc.CI2PPatchEmbed, weight_init="jax",
        )  # fmt: skip
        assert model.patch_embed.grid_size == (2, 3)
        assert model.patch_embed.num_patches == 6
        assert model(torch.randn(2, 192, 4, 6)).shape == (2, 3)
        maps = model.forward_intermediates(torch.randn(2, 192, 4, 6), intermediates_only=True)
        assert maps[0].shape == (2, 64, 2, 3)
        # jax's initialisation would have drawn the convolutions anew, with another deviation.
        pointwise = model.patch_embed.reshape[0].conv_pw.weight
        assert pointwise.std().item() == pytest.approx((2 / pointwise.shape[0]) ** 0.5, rel=0.05)

    def test_tokens_are_those_of_patch_reshape_in_row_major_order(self) -> None:
        torch.manual_seed(2)
        embed = cc.CI2PPatchEmbed(img_size=(64, 96), in_chans=16, embed_dim=8).eval()
        y = torch.randn(2, 16, 4, 6)
        assert isinstance(embed.reshape, PatchReshape)
        maps = embed.reshape(y)
        assert torch.equal(embed(y)[:, 1 * 3 + 2], maps[:, :, 1, 2])
        for output_fmt, shape in (("NHWC", (2, 2, 3, 8)), ("NCHW", (2, 8, 2, 3))):
            other = cc.CI2PPatchEmbed((64, 96), in_chans=16, embed_dim=8, output_fmt=output_fmt)
            assert other(y).shape == shape

    def test_dynamic_sizes_are_timms_affair(self) -> None:
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=64, in_chans=16, embed_dim=8, depth=1, num_heads=2, num_classes=3,
            embed_layer=cc.CI2PPatchEmbed, dynamic_img_size=True,
        )  # fmt: skip
        assert model(torch.randn(2, 16, 6, 8)).shape == (2, 3)
        model.set_input_size(img_size=(96, 128))
        assert model.pos_embed is not None
        assert model.pos_embed.shape == (1, 13, 8)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"in_chans": 3}, "`in_chans` is 3, the channels of an image"),
            ({"img_size": 240}, "`img_size` is 240; it must be a positive multiple of 32"),
            ({"img_size": 0}, "`img_size` is 0"),
            ({"dynamic_img_pad": True}, "does not pad"),
        ],
    )
    def test_what_the_patch_embedding_cannot_do_is_refused(
        self, options: dict[str, Any], match: str
    ) -> None:
        with pytest.raises(errors.UsageError, match=match):
            cc.CI2PPatchEmbed(**options)

    @pytest.mark.parametrize(
        ("shape", "match"),
        [((1, 192, 3, 4), "even height and width, got 3x4"), ((1, 3, 4, 4), r"got \(1, 3, 4, 4\)")],
    )
    def test_latents_it_cannot_read_are_refused(self, shape: tuple[int, ...], match: str) -> None:
        with torch.device("meta"):
            embed = cc.CI2PPatchEmbed(None, in_chans=192, embed_dim=8)
        with pytest.raises(errors.UsageError, match=match):
            embed(torch.empty(shape, device="meta"))


class TestRecords:
    @pytest.mark.parametrize(
        "name",
        ["vitds_tiny", "vit_ti16", "cnn_vit_tiny", "timm:test_vit", "ci2p+timm:test_vit"],
    )
    def test_a_record_written_as_json_builds_the_same_model(self, name: str) -> None:
        config = model_config(name, num_classes=3, latent_channels=64, latent_size=4)
        again = config_from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert (again.name, again.num_classes) == (name, 3)
        with torch.device("meta"):
            one, other = build_model(config).state_dict(), build_model(again).state_dict()
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}

    @pytest.mark.parametrize(
        ("name", "change", "match"),
        [
            ("vit_ti16", {"kind": "rnn"}, "`kind` is 'rnn'; this ci2p-cache reads pixel_vit"),
            ("vit_ti16", {"kind": []}, "`kind` is"),
            ("vit_ti16", {"version": 9}, "`version` is 9"),
            ("vit_ti16", {"image_size": 65}, "`image_size` is 65; it must be a multiple of 16"),
            ("vit_ti16", {"width": 1}, r"unknown fields \['width'\]"),
            ("cnn_vit_tiny", {"encoder_width": 0}, "`encoder_width` is 0"),
            ("cnn_vit_tiny", {"kind": "timm"}, "unknown fields"),
            ("timm:test_vit", {"std": [0.5, 0.0, 0.5]}, "those of `std` positive"),
            ("timm:test_vit", {"mean": [0.5]}, "three numbers each are wanted"),
            ("timm:test_vit", {"name": "timm:hf-hub:a/b"}, "no model is named 'timm:hf-hub:a/b'"),
            ("timm:test_vit", {"name": "ci2p+timm:test_vit"}, "no model is named"),
            ("ci2p+timm:test_vit", {"latent_size": 3}, "must be a multiple of 2"),
            ("ci2p+timm:test_vit", {"drop_path_rate": 1.0}, "wanted 0 <= rate < 1"),
        ],
    )
    def test_a_damaged_record_is_refused(
        self, name: str, change: dict[str, Any], match: str
    ) -> None:
        data = model_config(name, latent_size=4).to_dict() | change
        with pytest.raises(errors.ManifestError, match=match):
            config_from_dict(data)

    @pytest.mark.parametrize("data", [None, 3, [], "kind"])
    def test_what_is_no_record_is_refused(self, data: object) -> None:
        with pytest.raises(errors.ManifestError, match="wants an object"):
            config_from_dict(data)


LARGER = ("vit_ti16", "cnn_vit_tiny", f"ci2p+timm:{DEIT_TINY}")


class InterruptAfterOneEpoch(TrainObserver):
    """Sends Ctrl-C once the first epoch is on disk."""

    def epoch(self, record: EpochRecord) -> None:
        if record.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)


def scores(run: str) -> list[str]:
    """summary.csv without what depends on the clock."""
    lines = (Path(run) / "summary.csv").read_text().splitlines()
    return [line.rsplit(",", 3)[0] for line in lines]


class TestTraining:
    @pytest.mark.parametrize(
        "name",
        [
            *thinned(["cnn_vit_nano", "vit_nano16", "ci2p+timm:test_vit", "timm:test_vit"], step=4),
            *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER),
        ],
    )
    @pytest.mark.usefixtures("takes_ctrl_c", "nano")
    def test_a_run_from_the_cache_interrupted_and_resumed_gives_the_same_bits(
        self, cache_dir: Path, tmp_path: Path, name: str
    ) -> None:
        spec = cc.TrainSpec(model=name, epochs=2, batch_size=5, seed=4)
        whole = cc.train(cache_dir, spec=spec, runs_dir=tmp_path / "whole", device="cpu")
        with pytest.raises(errors.InterruptedRunError, match="1 of 2 epochs"):
            cc.train(
                cache_dir, spec=spec, runs_dir=tmp_path / "cut", device="cpu",
                observers=[InterruptAfterOneEpoch()],
            )  # fmt: skip
        resumed = cc.train(cache_dir, spec=spec, runs_dir=tmp_path / "cut", device="cpu")
        assert Path(resumed.path).name == Path(whole.path).name
        assert scores(resumed.path) == scores(whole.path)
        mine, theirs = (
            (Path(summary.last_checkpoint) / "model.safetensors").read_bytes()
            for summary in (resumed, whole)
        )
        assert mine == theirs

        args = yaml.safe_load((Path(whole.path) / "args.yaml").read_text())
        on_images = not name.startswith("ci2p")
        assert args["settings"]["loader"] == ("PixelLoader" if on_images else "LatentLoader")
        record = json.loads((Path(whole.path) / "model.json").read_text())
        model = build_model(config_from_dict(record["model"])).eval()
        model.load_state_dict(load_file(Path(whole.best_checkpoint) / "model.safetensors"))
        self.check_accuracy(model, cc.open_cache(cache_dir)["val"], on_images, whole.best)

    def check_accuracy(
        self, model: nn.Module, val: cc.Split, on_images: bool, best: EpochRecord
    ) -> None:
        kind = cc.PixelLoader if on_images else cc.LatentLoader
        with kind(val, batch_size=5, shuffle=False, views=0) as loader, torch.inference_mode():
            (batch,) = loader
            logits = model(batch.latents.contiguous(memory_format=torch.channels_last))
        assert batch.rows.tolist() == list(range(5))
        labels = torch.from_numpy(val.labels.astype(np.int64))
        assert best.val_top1 == (logits.argmax(1) == labels).double().mean().item()
        loss = nn.functional.cross_entropy(logits, labels).item()
        assert best.val_loss == pytest.approx(loss, rel=1e-4)

    def test_the_name_of_the_run_folder_is_a_plain_one(
        self, cache_dir: Path, tmp_path: Path
    ) -> None:
        spec = cc.TrainSpec(model="ci2p+timm:test_vit", epochs=1, batch_size=12)
        summary = cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")
        assert summary.name.startswith("ci2p-timm-test_vit-")
        assert summary.model == "ci2p+timm:test_vit"

    def test_the_encoder_in_the_loop_is_refused_for_models_on_images(
        self, cache_dir: Path, tmp_path: Path, run: Callable[..., Ran]
    ) -> None:
        ran = run("train", cache_dir, "--model", "vit_ti16", "--from-images", "--out", tmp_path)
        assert ran.code == 2
        assert "vit_ti16 reads images, which OnlineLoader does not hand out" in ran.err
        assert "--from-images" in ran.err
        assert not list(tmp_path.iterdir())

    def test_a_loader_of_images_is_refused_for_models_on_latents(
        self, cache_dir: Path, tmp_path: Path
    ) -> None:
        spec = cc.TrainSpec(model="vitds_tiny", epochs=1, batch_size=12)
        with cc.PixelLoader(cc.open_cache(cache_dir)["train"], batch_size=12) as loader:
            with pytest.raises(errors.UsageError, match="vitds_tiny reads latents, which Pixel"):
                cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu", loader=loader)

    def test_images_are_not_kept_in_memory(self, cache_dir: Path, tmp_path: Path) -> None:
        spec = cc.TrainSpec(model="vit_ti16", epochs=1, batch_size=12)
        with pytest.raises(errors.UsageError, match="`resident` is yes"):
            cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu", resident="yes")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"model": "timm:nothing_like_it"}, "no model is named"),
            ({"model": "timm:vgg11"}, "takes no stochastic depth"),
            ({"model": "vit_ti16", "pos_embed": True}, "its own positional embedding"),
            ({"model": "ci2p+timm:resnet18"}, "cannot be replaced"),
        ],
    )
    def test_a_model_that_cannot_be_makes_no_run_folder(
        self, cache_dir: Path, tmp_path: Path, change: dict[str, Any], match: str
    ) -> None:
        spec = dataclasses.replace(cc.TrainSpec(epochs=1), **change)
        with pytest.raises(errors.UsageError, match=match):
            cc.train(cache_dir, spec=spec, runs_dir=tmp_path, device="cpu")
        assert not list(tmp_path.iterdir())
