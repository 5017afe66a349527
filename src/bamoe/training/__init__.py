"""Continued pre-training of dense models and mixtures on transformers' Trainer."""

from bamoe.training.config import Schedule, Stage, TrainConfig, WeightedCorpus
from bamoe.training.run import TrainResult, train

__all__ = ["Schedule", "Stage", "TrainConfig", "TrainResult", "WeightedCorpus", "train"]
