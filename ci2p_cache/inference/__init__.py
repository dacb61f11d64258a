"""A trained run at work: evaluated, shown new pictures, exported. A run folder is all it needs."""

from ci2p_cache.inference.classifier import Classifier, load_classifier
from ci2p_cache.inference.evaluation import Evaluation
from ci2p_cache.inference.export import ExportSummary, export_model
from ci2p_cache.inference.prediction import Prediction
from ci2p_cache.inference.scoring import evaluate

__all__ = [
    "Classifier",
    "Evaluation",
    "ExportSummary",
    "Prediction",
    "evaluate",
    "export_model",
    "load_classifier",
]
