"""This machine: the agent's functions, called directly."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast
from uuid import UUID

from django.conf import settings

from experiments.models import Host, ModelRun
from experiments.transport.base import Frame, Outcome, Status
from trainer import agent

#: What a trainer must not inherit: it runs other people's data, and has no use for the site's secrets.
_SECRET = re.compile(
    r"SECRET|PASSW|CREDENTIAL|(^|_)TOKEN(_|$)|API_?KEY|_KEY$|_DSN$|^DATABASE_URL$|^REDIS_URL$|^EMAIL|^DJANGO_|^RQ_|^AWS_"
    r"|^SSH_",
    re.IGNORECASE,
)

#: What names the operator's token of the Hugging Face Hub.
_HF_TOKEN = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")

#: In an experiment's directory whose removal has begun.
_REMOVED = ".removed"


class Local:
    def __init__(self, host: Host) -> None:
        self.host = host

    def start(self, run: ModelRun) -> Outcome:
        run.directory.mkdir(parents=True, exist_ok=True)
        spec = run.directory / "spec.json"
        if not spec.exists():
            written = spec.with_name(f".spec.json.{os.getpid()}")
            written.write_text(run.experiment.spec.to_json())
            written.replace(spec)
        return cast(Outcome, agent.start(run.directory, run.attempt, env=self.environment()))

    def environment(self) -> dict[str, str]:
        """Of the trainer: its share of the cores, the common data cache, none of the site's secrets."""
        env = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        env["KANGAROO_THREADS"] = str(max(1, settings.CORES // max(1, self.host.slots)))
        env["KANGAROO_DATA_CACHE"] = str(settings.DATA_CACHE)
        env["KANGAROO_MAX_TEXT_GB"] = str(settings.MAX_TEXT_GB)
        if settings.SHARE_HF_TOKEN:
            env |= {name: os.environ[name] for name in _HF_TOKEN if name in os.environ}
        else:  # nor the one that `hf auth login` left in a file: it opens the operator's private repositories to all
            env["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # noqa: S105
        if self.host.slots > 1:
            env["OMP_WAIT_POLICY"] = "passive"  # threads that spin while waiting would take the other run's cores
        return env

    def status(self, run: ModelRun) -> Status:
        return cast(Status, agent.status(run.directory))

    def stop(self, run: ModelRun, grace: float) -> bool:
        return agent.stop(run.directory, grace)

    def tail(self, run: ModelRun, offset: int) -> Iterator[Frame]:
        return agent.tail(run.directory, offset, poll=0.3, heartbeat=1.0)

    def open_file(self, run: ModelRun, name: str) -> BinaryIO:
        directory = run.directory.resolve()
        path = (directory / name).resolve()
        if not path.is_relative_to(directory) or not path.is_file():
            raise FileNotFoundError(name)
        return path.open("rb")

    def disk_bytes(self, run: ModelRun) -> int:
        return _size(run.directory)

    def remove(self, experiment: UUID) -> None:
        directory = settings.RUNS_DIR / str(experiment)
        if not directory.exists():
            return
        mark = directory / _REMOVED
        mark.touch()
        runs = [path for path in directory.iterdir() if path.is_dir()]
        if any(agent.belongs_elsewhere(run) for run in runs):
            return  # its follower there does it, or whoever sweeps there
        deadline = time.monotonic() + 10
        while runs and time.monotonic() < deadline:
            for run in runs:
                # Not before all is dead: a kill takes a moment, and a supervisor still writes how its trainer ended.
                if agent.stop(run, 0):
                    shutil.rmtree(run, ignore_errors=True)
            runs = [run for run in runs if run.exists()]
            if runs:
                time.sleep(0.02)
        shutil.rmtree(directory)

    def half_removed(self) -> list[UUID]:
        return [UUID(mark.parent.name) for mark in settings.RUNS_DIR.glob(f"*/{_REMOVED}")]


def _size(directory: Path) -> int:
    total = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # an older checkpoint, deleted meanwhile
    return total
