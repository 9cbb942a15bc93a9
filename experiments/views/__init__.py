"""Pages and fragments, a function each: `pages` (home, docs), `train` (the Train page), `results` (what came of it)."""

from experiments.views.pages import docs, home
from experiments.views.results import (
    checkpoint,
    delete,
    edit,
    experiment,
    log,
    metrics,
    metrics_csv,
    profile,
    resume,
    spec_json,
    stop,
)
from experiments.views.train import train, train_estimate

__all__ = [
    "checkpoint",
    "delete",
    "docs",
    "edit",
    "experiment",
    "home",
    "log",
    "metrics",
    "metrics_csv",
    "profile",
    "resume",
    "spec_json",
    "stop",
    "train",
    "train_estimate",
]
