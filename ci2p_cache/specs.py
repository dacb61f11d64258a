"""The frozen value objects that both stages agree on.

`Fingerprint` lists every field that changes a stored value; `LayoutSpec` every field that changes
which row is where and in which bytes. Both bind a cache folder: a difference is refused, field by
field. Neither holds batch size, workers, devices, host or paths.
"""

from __future__ import annotations

import hashlib
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from ci2p_cache.errors import ManifestError, UsageError
from ci2p_cache.fields import check_options, option
from ci2p_cache.record import Record, read_yaml

__all__ = [
    "DOWNSAMPLING",
    "FORMAT_VERSION",
    "FORMAT_VERSIONS",
    "MAX_LATENT_BYTES",
    "AugmentSpec",
    "CodecName",
    "DType",
    "EncoderSpec",
    "Fingerprint",
    "FormatName",
    "ImageSpec",
    "LatentSpec",
    "LayoutSpec",
    "Precision",
    "ViewSpec",
    "default_level",
]

FORMAT_VERSION = 2
"""Version of the disk format that new caches get; history at the end of cache/README.md."""

FORMAT_VERSIONS = (1, 2)
"""Those that are read; a cache keeps its own when it is continued, repaired or grown."""

VALUES_VERSION = 1
"""Version of how values come about; both formats hold the same ones."""

DOWNSAMPLING = 16
"""g_a halves each side four times: latents are size / 16 (Balle et al. 2018, arXiv 1802.01436)."""

SIZE_MULTIPLE_PX = 32
"""PatchReshape halves the latents once more (arXiv 2502.10120), so sides are multiples of 32."""

MAX_LATENT_BYTES = 128 * 2**20
"""Limit for one latent, and for the raw latents of one shard: a shard is built in memory."""

DType = Literal["int8", "int16", "float16", "float32"]
Precision = Literal["float32", "tf32", "bf16"]
CodecName = Literal["zstd", "lz4", "none"]
FormatName = Literal["zarr", "webdataset", "both"]

_ITEM_BYTES = {"int8": 1, "int16": 2, "float16": 2, "float32": 4}
_SYMBOL_LIMIT: dict[str, int] = {"int8": 127, "int16": 32767}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec(Record):
    """How source bytes become a uint8 RGB square."""

    size: int = 256
    """Side of the square in pixels; a multiple of 32."""
    resize_side: int = 256
    """Length in pixels that the shorter side is resized to before the centre crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the antialiased uint8 resize; bilinear is torchvision's default."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether the EXIF orientation turns the image; torchvision's loader ignores it."""
    max_pixels: int = 89_000_000
    """Images with more pixels are refused; Pillow's own warning threshold, rounded."""
    decoder: str
    """Name and version of the decoders, as `images.decode.decoder_name()` gives them."""

    def __post_init__(self) -> None:
        _require(
            self.size > 0 and self.size % SIZE_MULTIPLE_PX == 0,
            f"`size` is {self.size}; it must be a positive multiple of {SIZE_MULTIPLE_PX}",
        )
        _require(
            self.resize_side >= self.size,
            f"`resize_side` is {self.resize_side}, smaller than `size` {self.size}: "
            "the crop would reach outside the image",
        )
        _require(self.max_pixels > 0, f"`max_pixels` is {self.max_pixels}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentSpec(Record):
    """What happens to a random crop after it was resized, in the order of the fields.

    Each step is torchvision's (transforms.v2); what no field names has torchvision's default.
    """

    min_area: float = option(0.08, "Least share of the image that a crop shows.", above=0, high=1)
    rand_augment: int = option(
        0, "Operations of RandAugment (Cubuk et al. 2020, arXiv 1909.13719).", low=0, high=16
    )
    magnitude: int = option(9, "Strength of these operations, of 30.", low=0, high=30)
    trivial_augment: bool = option(
        False, "One operation of any strength: TrivialAugment (Mueller and Hutter 2021)."
    )
    grey: float = option(0.0, "Chance of grey.", low=0, high=1)
    blur: float = option(
        0.0,
        "Chance of a Gaussian blur, sigma 0.1 to 2.0 pixels; the kernel is a tenth of the side, as "
        "in SimCLR (Chen et al. 2020, arXiv 2002.05709).",
        low=0,
        high=1,
    )
    solarize: float = option(0.0, "Chance of inverting what is above 127.", low=0, high=1)
    erasing: float = option(
        0.0, "Chance of a black rectangle: random erasing (Zhong et al. 2017).", low=0, high=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a name, a JSON object of fields, or the path of a YAML file of fields.

        Raises:
            UsageError: it is none of these, or a field is unknown or out of range.
        """
        known, names = cls().to_dict(), ", ".join(_AUGMENTS)
        try:
            given = _AUGMENTS.get(text) or (
                json.loads(text) if text.startswith("{") else read_yaml(Path(text), max_bytes=2**16)
            )
        except (OSError, ValueError, ManifestError) as error:
            raise UsageError(
                f"`augment` is {text!r}, none of {names}, and not to be read as YAML: {error}"
            ) from error
        unknown = sorted(map(repr, given.keys() - known.keys()))
        _require(
            not unknown,
            f"`augment` has the unknown field {', '.join(unknown)}; wanted some of "
            f"{', '.join(known)}",
        )
        try:
            return cls.from_dict(known | given)
        except ManifestError as error:
            raise UsageError(f"`augment`: {error}") from error

    def __str__(self) -> str:
        default = type(self)().to_dict()
        given = {name: value for name, value in self.to_dict().items() if value != default[name]}
        named = [name for name, values in _AUGMENTS.items() if values == given]
        return named[0] if named else json.dumps(given)


_AUGMENTS: dict[str, dict[str, float]] = {
    "authors": {
        "rand_augment": 2, "grey": 0.2, "blur": 0.1, "solarize": 0.2, "erasing": 0.25,
    },
    "rand": {"rand_augment": 2},
    "trivial": {"trivial_augment": True},
}  # fmt: skip
"""What has a name. authors: the code of the authors of CI2P-ViT, as far as it comes before an image
is encoded and concerns one image; how many operations RandAugment makes, and how strong, is
torchvision's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec(Record):
    """Which views of a training image are stored; other splits always store one."""

    kind: Literal["none", "flip", "crops"] = "flip"
    """none: the image. flip: the image and its mirror. crops: random-resized crops with flips."""
    num_crops: int = 0
    """Number of crops for `crops`, else 0."""
    seed: int = 0
    """Seed of crops and augmentation; 0 for the other kinds, whose values do not depend on it."""
    augment: AugmentSpec | None = field(default=None, metadata={"absent_where_none": True})
    """What happens to each crop; None: nothing. Absent in JSON then."""

    def __post_init__(self) -> None:
        if self.kind == "crops":
            _require(
                1 <= self.num_crops <= 1024,
                f"`views` asks for {self.num_crops} crops; 1 to 1024 are possible",
            )
        else:
            _require(
                self.num_crops == 0 and self.seed == 0,
                f"`views` {self.kind} takes neither a count nor a seed",
            )
            _require(
                self.augment is None,
                f"`augment` changes random crops, and `views` is {self.kind}; wanted crops:K",
            )

    @classmethod
    def parse(cls, text: str, *, seed: int = 0, augment: AugmentSpec | None = None) -> Self:
        """Reads `none`, `flip` or `crops:K`.

        Args:
            text: One of these; K is the number of crops, 1 to 1024.
            seed: Seed of the boxes of crops; not looked at for the others.
            augment: What happens to each crop.

        Raises:
            UsageError: the text is none of these, or `augment` has no crops.
        """
        if text in ("none", "flip"):
            return cls(kind=typing.cast("Literal['none', 'flip']", text), augment=augment)
        kind, _, count = text.partition(":")
        _require(
            kind == "crops" and count.isascii() and count.isdigit(),
            f"`views` is {text!r}; wanted none, flip or crops:K, for example crops:4",
        )
        return cls(kind="crops", num_crops=int(count), seed=seed, augment=augment)

    def num_views(self, split: str) -> int:
        """Returns how many views a sample of `split` has."""
        if split != "train":
            return 1
        return {"none": 1, "flip": 2, "crops": self.num_crops}[self.kind]

    @property
    def words(self) -> str:
        """The views and what happens to them, for example `crops:4, augmented: authors`."""
        return str(self) if self.augment is None else f"{self}, augmented: {self.augment}"

    def __str__(self) -> str:
        return f"crops:{self.num_crops}" if self.kind == "crops" else self.kind


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec(Record):
    """Which frozen g_a made the latents."""

    arch: str = "bmshj2018-factorized"
    """CompressAI zoo name."""
    quality: int = 5
    """CompressAI quality, 1-8; it fixes N and M."""
    metric: Literal["mse", "ms-ssim"] = "mse"
    """What the encoder was trained for."""
    weights_sha256: str
    """Digest over the sorted tensors of g_a, g_s and the entropy model, whatever file held them."""
    precision: Precision = "float32"
    """Arithmetic of g_a."""

    def __post_init__(self) -> None:
        _require(1 <= self.quality <= 8, f"`quality` is {self.quality}; 1 to 8 are possible")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpec(Record):
    """What one stored latent is."""

    dtype: DType = "int8"
    """int8, int16: the codec's symbols round((y - median) / step). float16, float32: y itself."""
    step: float = 1.0
    """Quantisation step of the symbols; 1.0 is the codec's own. Unused, and 1.0, for floats."""
    channels: int
    """M, the number of latent channels."""
    height: int
    """Latent rows."""
    width: int
    """Latent columns."""

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.step) and self.step > 0,
            f"`step` is {self.step}; it must be positive",
        )
        _require(
            self.is_symbols or self.step == 1.0,
            f"`step` is {self.step}, but dtype {self.dtype} stores y without quantising it; "
            "use --dtype int8 or int16, or leave --step out",
        )
        for name in ("channels", "height", "width"):
            value = getattr(self, name)
            _require(0 < value <= 65536, f"latent `{name}` is {value}; 1 to 65536 are possible")
        _require(
            self.num_bytes <= MAX_LATENT_BYTES,
            f"one latent has {self.num_bytes} bytes; at most {MAX_LATENT_BYTES} fit a shard: "
            "choose a smaller --size or --dtype",
        )

    @property
    def is_symbols(self) -> bool:
        """Whether integers stand for quantised values."""
        return self.dtype in _SYMBOL_LIMIT

    @property
    def symbol_limit(self) -> int:
        """The largest absolute symbol that is stored; only for int8 and int16."""
        return _SYMBOL_LIMIT[self.dtype]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, h, w)."""
        return (self.channels, self.height, self.width)

    @property
    def num_bytes(self) -> int:
        """Raw bytes of one latent."""
        return self.channels * self.height * self.width * _ITEM_BYTES[self.dtype]

    @property
    def fill_value(self) -> int | float:
        """The value of a hole in the array: never stored as data, so a hole is seen."""
        return {"int8": -128, "int16": -32768}.get(self.dtype, float("nan"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint(Record):
    """Every field that changes a stored value."""

    format_version: int = VALUES_VERSION
    """Version of the values: that of the disk format where they came about otherwise."""
    image: ImageSpec
    """From bytes to pixels."""
    views: ViewSpec
    """From pixels to views."""
    encoder: EncoderSpec
    """From views to y."""
    latent: LatentSpec
    """From y to what is stored."""

    def __post_init__(self) -> None:
        _require(
            self.format_version == VALUES_VERSION,
            f"format version {self.format_version} of the values is not {VALUES_VERSION}, the one "
            "that this ci2p-cache knows; encode again, or use the version that made it",
        )
        side = self.image.size // DOWNSAMPLING
        _require(
            (self.latent.height, self.latent.width) == (side, side),
            f"latents of {self.latent.height} x {self.latent.width} from images of "
            f"{self.image.size} px; g_a gives {side} x {side}",
        )

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of all fields, as 64 hex digits."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutSpec(Record):
    """Every field that changes which sample is where, and in which bytes, but no value."""

    val_fraction: float = 0.1
    """Share of each class that becomes `val` where the source has no split folders."""
    split: Literal["stratified", "hashed"] = "stratified"
    """How it is drawn. stratified: of the n images of a class, round(n * val_fraction). hashed:
    each image for itself, with that chance."""
    seed: int = 0
    """Seed of the row order and of the validation split."""
    shard_samples: int = 1024
    """Rows per shard."""
    limit: int | None = None
    """Only that many images of the source, spread over it by hash; None for all."""
    format: FormatName = "zarr"
    """Container of the latents: zarr shards, WebDataset tars, or each of them twice over."""
    codec: CodecName = "zstd"
    """Byte compressor of the zarr chunks; tars hold raw values, `convert` goes by it."""
    level: int = 2
    """Compression level; see `default_level`."""
    fold: bool = False
    """Whether zarr chunks hold symbols folded to 0, 1, 2, ... for 0, -1, 1, ...: fewer bytes."""

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.val_fraction < 1.0,
            f"`val_fraction` is {self.val_fraction}; 0 <= fraction < 1 is wanted",
        )
        _require(0 <= self.seed < 2**63, f"`seed` is {self.seed}; 0 to 2**63 - 1 are possible")
        _require(
            1 <= self.shard_samples <= 2**20,
            f"`shard_samples` is {self.shard_samples}; 1 to {2**20} are possible",
        )
        _require(
            self.limit is None or self.limit > 0, f"`limit` is {self.limit}; it must be positive"
        )
        _require(-100 <= self.level <= 22, f"`level` is {self.level}; wanted -100 to 22")
        _require(
            not self.fold or self.codec != "none",
            "`fold` makes symbols compress better, and `codec` none does not compress them; choose "
            "--codec zstd or lz4, or leave out --fold",
        )

    def problem(self, format_version: int, latent: LatentSpec) -> str | None:
        """Says what a cache cannot have of it; None where it can have all.

        Args:
            format_version: Version of the cache.
            latent: What its values are.
        """
        if format_version == 1:
            if self.codec == "lz4" or self.fold:
                return "caches of format 1 have neither `codec` lz4 nor `fold`; convert it first"
            if self.split != "hashed":
                return "the split of caches of format 1 is `hashed`"
        elif not 1 <= self.level <= 9:
            return f"`level` is {self.level}; 1 to 9 are possible"
        if self.fold and not latent.is_symbols:
            return f"`fold` is for symbols, and dtype {latent.dtype} stores y itself"
        return None

    @property
    def has_zarr(self) -> bool:
        """Whether the latents are in zarr shards; readers then take them from there."""
        return self.format != "webdataset"

    @property
    def has_tar(self) -> bool:
        """Whether the latents are in tars."""
        return self.format != "zarr"

    @property
    def codec_words(self) -> str:
        """Codec and level, for example `zstd level 1, folded`."""
        level = "" if self.codec == "none" else f" level {self.level}"
        return self.codec + level + (", folded" if self.fold else "")

    def array_values(self, latent: LatentSpec) -> tuple[str, int | float]:
        """Returns dtype and fill value of the zarr array: those of symbols, or of their codes."""
        if self.fold:
            return f"u{latent.dtype}", 2 * latent.symbol_limit + 1
        return latent.dtype, latent.fill_value


def default_level(format_version: int, codec: CodecName, *, fold: bool) -> int:
    """Returns the compression level where none is asked for.

    Measured in bytes, packing and reading together (tests/benchmarks/size.py): zstd 2 is 1 %
    smaller than 1 on symbols and as fast, and 5 packs at a third of its rate for 1 % more. On
    folded symbols 1 is the smaller one. lz4 is lz4hc: 1 is 3 % larger than 3, 5 is 1 % smaller and
    slow. Format 1 has plain zstd frames, of level 1.
    """
    if codec == "lz4":
        return 3
    return 1 if format_version == 1 or fold else 2
