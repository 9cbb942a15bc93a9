"""The rows: `hosts` (machines, their credentials and host keys), `runs` (experiments, model runs, curves), `growths`
(checkpoints grown by themselves)."""

from experiments.models.growths import Growth
from experiments.models.hosts import Host, HostKeyPin, HostTask
from experiments.models.runs import (
    ACTIVE,
    RESUMABLE,
    TRANSITIONS,
    Experiment,
    ModelRun,
    Note,
    Point,
    Reason,
    Removal,
    State,
    Transfer,
)

__all__ = [
    "ACTIVE",
    "RESUMABLE",
    "TRANSITIONS",
    "Experiment",
    "Growth",
    "Host",
    "HostKeyPin",
    "HostTask",
    "ModelRun",
    "Note",
    "Point",
    "Reason",
    "Removal",
    "State",
    "Transfer",
]
