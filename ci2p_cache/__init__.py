"""Cache the latents of a frozen CompressAI encoder once, then train CI2P ViTs straight from them.

Stage one runs the frozen g_a over a data set and commits its latents shard by shard; stage two
trains PatchReshape + ViT from them (Zhao and Sun, "Compress image to patches for Vision
Transformer", arXiv 2502.10120). Names load on first use, so importing this package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ci2p_cache.cache.dataset import SplitDataset
    from ci2p_cache.cache.split import Split
    from ci2p_cache.cache.store import Cache, open_cache
    from ci2p_cache.cache.survey import CacheStatus, status
    from ci2p_cache.cache.verify import Finding, verify
    from ci2p_cache.encoder.frozen import FrozenEncoder
    from ci2p_cache.encoder.load import load_encoder
    from ci2p_cache.encoding.convert import ConvertSummary, convert
    from ci2p_cache.encoding.forecast import DryRunReport, dry_run
    from ci2p_cache.encoding.options import EncodeOptions
    from ci2p_cache.encoding.progress import EncodeObserver, EncodeProgress, EncodeSummary
    from ci2p_cache.encoding.reencode import ReencodeSummary, reencode
    from ci2p_cache.encoding.repair import RepairSummary, repair
    from ci2p_cache.encoding.run import encode
    from ci2p_cache.errors import CacheError
    from ci2p_cache.experiment.run import ExperimentSummary, run_experiment
    from ci2p_cache.experiment.seeds import SeedsSummary, run_seeds
    from ci2p_cache.experiment.spec import Experiment, load_experiment
    from ci2p_cache.inference.classifier import Classifier, load_classifier
    from ci2p_cache.inference.export import export_model
    from ci2p_cache.inference.scoring import evaluate
    from ci2p_cache.loader.batches import Batch
    from ci2p_cache.loader.latents import LatentLoader
    from ci2p_cache.loader.pixels import OnlineLoader, PixelLoader
    from ci2p_cache.loader.resident import ResidentLoader
    from ci2p_cache.models.complexity import Complexity, complexity
    from ci2p_cache.models.registry import create_model, list_models
    from ci2p_cache.process import tune_process
    from ci2p_cache.runs.evaluations import Evaluation
    from ci2p_cache.runs.files import EpochRecord
    from ci2p_cache.specs import (
        AugmentSpec,
        EncoderSpec,
        Fingerprint,
        ImageSpec,
        LatentSpec,
        LayoutSpec,
        ViewSpec,
    )
    from ci2p_cache.training.records import (
        TakenStep,
        TrainObserver,
        TrainPlan,
        TrainProgress,
        TrainSummary,
    )
    from ci2p_cache.training.run import train
    from ci2p_cache.training.spec import TrainSpec

__all__ = [
    "AugmentSpec",
    "Batch",
    "CI2PPatchEmbed",
    "Cache",
    "CacheError",
    "CacheStatus",
    "Classifier",
    "Complexity",
    "ConvertSummary",
    "DryRunReport",
    "EncodeObserver",
    "EncodeOptions",
    "EncodeProgress",
    "EncodeSummary",
    "EncoderSpec",
    "EpochRecord",
    "Evaluation",
    "Experiment",
    "ExperimentSummary",
    "Finding",
    "Fingerprint",
    "FrozenEncoder",
    "ImageSpec",
    "LatentLoader",
    "LatentSpec",
    "LayoutSpec",
    "OnlineLoader",
    "PixelLoader",
    "ReencodeSummary",
    "RepairSummary",
    "ResidentLoader",
    "SeedsSummary",
    "Split",
    "SplitDataset",
    "TakenStep",
    "TrainObserver",
    "TrainPlan",
    "TrainProgress",
    "TrainSpec",
    "TrainSummary",
    "ViewSpec",
    "__version__",
    "complexity",
    "convert",
    "create_model",
    "dry_run",
    "encode",
    "evaluate",
    "export_model",
    "list_models",
    "load_classifier",
    "load_encoder",
    "load_experiment",
    "open_cache",
    "reencode",
    "repair",
    "run_experiment",
    "run_seeds",
    "status",
    "train",
    "tune_process",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {
    "AugmentSpec": "specs",
    "Batch": "loader.batches",
    "CI2PPatchEmbed": "models.timm_models",
    "Cache": "cache.store",
    "CacheError": "errors",
    "CacheStatus": "cache.survey",
    "Classifier": "inference.classifier",
    "Complexity": "models.complexity",
    "ConvertSummary": "encoding.convert",
    "DryRunReport": "encoding.forecast",
    "EncodeObserver": "encoding.progress",
    "EncodeOptions": "encoding.options",
    "EncodeProgress": "encoding.progress",
    "EncodeSummary": "encoding.progress",
    "EncoderSpec": "specs",
    "EpochRecord": "runs.files",
    "Evaluation": "runs.evaluations",
    "Experiment": "experiment.spec",
    "ExperimentSummary": "experiment.run",
    "Finding": "cache.verify",
    "Fingerprint": "specs",
    "FrozenEncoder": "encoder.frozen",
    "ImageSpec": "specs",
    "LatentLoader": "loader.latents",
    "LatentSpec": "specs",
    "LayoutSpec": "specs",
    "OnlineLoader": "loader.pixels",
    "PixelLoader": "loader.pixels",
    "ReencodeSummary": "encoding.reencode",
    "RepairSummary": "encoding.repair",
    "ResidentLoader": "loader.resident",
    "SeedsSummary": "experiment.seeds",
    "Split": "cache.split",
    "SplitDataset": "cache.dataset",
    "TakenStep": "training.records",
    "TrainObserver": "training.records",
    "TrainPlan": "training.records",
    "TrainProgress": "training.records",
    "TrainSpec": "training.spec",
    "TrainSummary": "training.run",
    "ViewSpec": "specs",
    "complexity": "models.complexity",
    "convert": "encoding.convert",
    "create_model": "models.registry",
    "dry_run": "encoding.forecast",
    "encode": "encoding.run",
    "evaluate": "inference.scoring",
    "export_model": "inference.export",
    "list_models": "models.registry",
    "load_classifier": "inference.classifier",
    "load_encoder": "encoder.load",
    "load_experiment": "experiment.spec",
    "open_cache": "cache.store",
    "reencode": "encoding.reencode",
    "repair": "encoding.repair",
    "run_experiment": "experiment.run",
    "run_seeds": "experiment.seeds",
    "status": "cache.survey",
    "train": "training.run",
    "tune_process": "process",
    "verify": "cache.verify",
}


def __getattr__(name: str) -> Any:
    """Loads a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
