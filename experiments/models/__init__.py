"""The rows: `hosts` (machines, their credentials and host keys), `runs` (experiments, model runs, curves)."""

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
