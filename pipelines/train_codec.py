"""Train an encoder for your own pictures: bmshj2018-factorized on CompressAI's loss.

Paper:    Balle, Minnen, Singh, Hwang, Johnston, "Variational image compression with a scale
          hyperprior", 2018, arXiv 1802.01436, its factorized-prior model.
Command:  python pipelines/train_codec.py --images scans/ --out codec/ --evaluate held_out/
Hours:    4,200 steps of batch 4: 38 minutes.
Hardware: one core of an AMD EPYC (Zen 4, bfloat16) that other work shared: 1.2 to 2.9 steps/s. CUDA
          should work and is not tested.
Expect:   measured: the third phase of the bundled encoder (see its card) lowered the cost 0.025 *
          255^2 * MSE + bpp on Kodak from 1.768 to 1.729, real bytes, with 1,000 + 49 photographs:
          --images flowers/ --images photos/ 8 --steps 4200 --batch-size 4 --lr 1.5e-4. From random
          weights: not measured.

Images: files of any name and depth below each folder that are JPEG, PNG, WebP, BMP, GIF or TIFF by
content. EXIF orientation is applied. Grey, palette, CMYK and alpha become RGB as they do in
`ci2p-cache encode` (alpha is dropped). Files that cannot be decoded, and pictures with a side
shorter than the crop, are left out, counted, and the first of them named; every other picture is
used. Up to 4 GiB of decoded pictures stay in memory; those beyond are decoded whenever drawn.

OUT holds weights.safetensors (for `ci2p-cache encode --weights`), record.json (settings, images,
results), progress.csv, and checkpoint.json with its tensors. The same command again continues where
it stopped, and gives the same weights as if it had never stopped, to the last bit on a CPU with the
same number of threads.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import signal
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import ci2p_cache
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.staging import StagingArea, disk_errors
from ci2p_cache.cli import render
from ci2p_cache.cli.ending import reported_errors
from ci2p_cache.encoder.codec_checkpoint import CodecSpec
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoder.train import (
    CodecStep,
    TrainingImages,
    evaluate_rate_distortion,
    train_codec,
)
from ci2p_cache.errors import InterruptedRunError, UsageError
from ci2p_cache.images.picture_folders import PictureFolders
from ci2p_cache.machine import checked_device
from ci2p_cache.process import tune_process
from ci2p_cache.training.ranks import StopSignal

_EXAMPLES = """\
examples:
  # fine-tune the encoder that ships with ci2p-cache to your pictures
  python pipelines/train_codec.py --images scans/ --out codec/
  # two folders, the second drawn 8 times as often; the cost on pictures not trained on
  python pipelines/train_codec.py --images web/ --images lossless/ 8 --out codec/ --evaluate test/
  # from random weights, at another rate
  python pipelines/train_codec.py --images scans/ --start random --quality 3 --lmbda 0.0067 \\
      --lr 3e-4 --steps 200000 --out codec/
  # then
  ci2p-cache encode data/ --out shards/ --weights codec/weights.safetensors

the same command again continues where it stopped; Ctrl-C saves first
"""

_SETTINGS = (
    ("quality", "quality", ""),
    ("steps", "steps", ""),
    ("batch-size", "batch_size", ""),
    ("crop", "crop_px", "pixels"),
    ("lmbda", "lmbda", "weight of the distortion"),
    ("lr", "lr", "peak learning rate"),
    ("optimizer", "optimizer", "muon or adam"),
    ("precision", "precision", "or float32"),
    ("seed", "seed", ""),
)
"""Flag, field of `CodecSpec`, help."""

_SAVE_SECONDS = 300.0
"""Between checkpoints: 48 MB each, written in well under a second."""
_TELL_SECONDS = 30.0
"""Between progress lines."""


class Progress:
    """Reports the steps, keeps them in progress.csv, and says when to save or stop."""

    def __init__(self, path: Path, num_steps: int, stop: StopSignal) -> None:
        self._path, self._num_steps, self._stop = path, num_steps, stop
        self._sums: list[tuple[float, float, float]] = []
        self._told = self._saved = time.monotonic()

    def __call__(self, done: CodecStep) -> Literal["go", "save", "stop"]:
        """Is called after each step."""
        self._sums.append((done.bpp, done.mse, done.loss))
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS or done.step == self._num_steps:
            self._tell(done, (now - self._told) / len(self._sums))
            self._told, self._sums = now, []
        if self._stop.is_set():
            return "stop"
        if now - self._saved >= _SAVE_SECONDS:
            self._saved = now
            return "save"
        return "go"

    def _tell(self, done: CodecStep, seconds: float) -> None:
        bpp, mse, loss = (sum(column) / len(self._sums) for column in zip(*self._sums, strict=True))
        left = render.duration(seconds * (self._num_steps - done.step))
        render.status(
            f"step {done.step} of {self._num_steps}: loss {loss:.4f} = {bpp:.4f} bpp + distortion "
            f"(mse {mse:.2f}), lr {done.lr:.2e}, {1 / seconds:.1f} steps/s, {left} left"
        )
        with disk_errors(self._path), self._path.open("a") as file:
            if file.tell() == 0:
                file.write("step,loss,bpp,mse,lr,seconds_per_step\n")
            file.write(f"{done.step},{loss:.5f},{bpp:.5f},{mse:.4f},{done.lr:.4e},{seconds:.4f}\n")


def main() -> None:
    """Runs the command line; the exit code is the error's own, as in `ci2p-cache`."""
    # CompressAI still compiles a function with torch.jit when it is imported.
    warnings.filterwarnings("ignore", message=r"`torch\.jit")
    with reported_errors(go_on=shlex.join(["python", *sys.argv])):
        _run(_parsed(sys.argv[1:]))


def _parsed(words: list[str]) -> argparse.Namespace:
    spec = CodecSpec()
    parser = argparse.ArgumentParser(
        description="Train a codec whose encoder `ci2p-cache encode --weights` takes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", nargs="+", action="append", required=True, metavar=("FOLDER", "TIMES"),
        help="a folder of pictures, and how often each is drawn (1); may be given repeatedly",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--start", default="bundled", help="bundled, random, or a weights file (%(default)s)"
    )
    parser.add_argument("--evaluate", type=Path, help="folder of pictures to measure at the end")
    for flag, name, text in _SETTINGS:
        default = getattr(spec, name)
        parser.add_argument(
            f"--{flag}", dest=name, type=type(default), default=default,
            metavar=flag.upper().replace("-", "_"), help=f"{text} (%(default)s)".strip(),
        )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    return parser.parse_args(words)


def _run(options: argparse.Namespace) -> None:
    spec = CodecSpec(**{name: getattr(options, name) for _, name, _ in _SETTINGS})
    device = checked_device(options.device)
    tune_process(options.device)
    out: Path = options.out
    start = _start(options.start, spec.quality)
    folders = [_folder(words) for words in options.images]
    held_out = None
    if options.evaluate is not None:
        held_out = PictureFolders([(options.evaluate, 1.0)], shortest_px=16)
    pictures = PictureFolders(folders, shortest_px=spec.crop_px)
    _tell_of(pictures, spec)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (
        locked(out / ".lock", what="train_codec"),
        StagingArea(out, name="train_codec") as staging,
        StopSignal() as stop,
    ):
        summary = train_codec(
            TrainingImages(pictures, pictures.draws, pictures.digest),
            spec,
            out,
            start=start,
            device=device,
            control=Progress(out / "progress.csv", spec.steps, stop),
        )
        seconds = time.monotonic() - began
        staging.put("weights.safetensors", summary.encoder.to_bytes())
        if summary.steps_done < spec.steps:
            raise InterruptedRunError(
                f"stopped after step {summary.steps_done} of {spec.steps}; {out} holds all of it",
                signal_number=stop.number or signal.SIGINT,
            )
        images = [
            {"folder": str(folder), "times": times, "pictures": count}
            for (folder, times), count in zip(folders, pictures.counts, strict=True)
        ]
        record = {
            "version": 1,
            "spec": spec.to_dict(),
            "images": images,
            "images_sha256": pictures.digest,
            "left_out": len(pictures.left_out),
            "start": {"from": options.start, "weights_sha256": _digest(start)},
            "weights_sha256": _digest(summary.encoder),
            "seconds_since_step": {"step": summary.resumed_at, "seconds": round(seconds, 1)},
            **_machine(device),
            "evaluated_on": None if options.evaluate is None else str(options.evaluate),
            "results": _results(start, summary.encoder, held_out, spec.lmbda),
        }
        staging.put_json("record.json", record)
    render.line(f"{out / 'weights.safetensors'}: ready for ci2p-cache encode --weights")


def _results(
    start: FrozenEncoder | None,
    end: FrozenEncoder,
    held_out: PictureFolders | None,
    lmbda: float,
) -> dict[str, Any]:
    """Measures both encoders on pictures that were not trained on, and reports it."""
    results: dict[str, Any] = {}
    for name, encoder in (("start", start), ("end", end)):
        if held_out is None or encoder is None:
            continue
        point = evaluate_rate_distortion(encoder, held_out, lmbda=lmbda)
        results[name] = point.to_dict()
        render.line(
            f"{name}: {point.bpp:.4f} bpp, {point.psnr_db:.2f} dB, cost {point.cost:.4f} on "
            f"{point.num_images} pictures"
        )
    return results


def _machine(device: torch.device) -> dict[str, Any]:
    """Returns what may change the last bits, for the record."""
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "ci2p_cache": ci2p_cache.__version__,
            "compressai": version("compressai"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _digest(encoder: FrozenEncoder | None) -> str | None:
    return None if encoder is None else encoder.spec.weights_sha256


def _start(source: str, quality: int) -> FrozenEncoder | None:
    if source == "random":
        return None
    if source == "bundled":
        return load_encoder("bundled", quality=quality)
    return load_encoder(weights=Path(source), quality=quality)


def _folder(words: list[str]) -> tuple[Path, float]:
    """Reads the words of one --images: a folder, and how often it is drawn."""
    try:
        times = float(words[1]) if len(words) > 1 else 1.0
    except ValueError:
        times = 0.0
    if len(words) > 2 or not 0 < times < 1e9:
        raise UsageError(
            f"--images {shlex.join(words)}: wanted a folder, then at most one positive number",
            hint=f"--images {shlex.quote(words[0])} 1",
        )
    return Path(words[0]), times


def _tell_of(pictures: PictureFolders, spec: CodecSpec) -> None:
    for notice in pictures.notices:
        render.notice(notice)
    if pictures.left_out:
        render.notice(
            f"{len(pictures.left_out)} pictures are left out, for example {pictures.left_out[0]}"
        )
    render.status(f"{len(pictures)} pictures, {spec.steps} steps of {spec.batch_size} crops")


if __name__ == "__main__":
    main()
