"""Continued pre-training of dense models and mixtures on transformers' Trainer."""

from bamoe.training.config import Schedule, TrainConfig, WeightedCorpus
from bamoe.training.run import TrainResult, train

__all__ = ["Schedule", "TrainConfig", "TrainResult", "WeightedCorpus", "train"]
