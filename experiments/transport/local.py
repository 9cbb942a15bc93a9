"""This machine: the agent's functions, called directly."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, cast
from uuid import UUID

from django.conf import settings

from experiments.models import Host, ModelRun
from experiments.transport.base import File, Frame, Outcome, Status
from trainer import agent, machine

#: What a trainer must not inherit: it runs other people's data, and has no use for the site's secrets.
_SECRET = re.compile(
    r"SECRET|PASSW|CREDENTIAL|(^|_)TOKEN(_|$)|API_?KEY|_KEY$|_DSN$|^DATABASE_URL$|^REDIS_URL$|^EMAIL|^DJANGO_|^RQ_|^AWS_"
    r"|^SSH_",
    re.IGNORECASE,
)

#: What names the operator's token of the Hugging Face Hub.
_HF_TOKEN = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")


def _gpus(run: ModelRun) -> dict[str, str]:
    """Which GPUs the trainer sees, where it has been given some, and how many processes it is."""
    if not run.gpus:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(run.gpus), "KANGAROO_PROCESSES": str(len(run.gpus))}


class Local:
    def __init__(self, host: Host) -> None:
        self.host = host

    def start(self, run: ModelRun) -> Outcome:
        run.directory.mkdir(parents=True, exist_ok=True)
        spec = run.directory / "spec.json"
        if not spec.exists():
            written = spec.with_name(f".spec.json.{os.getpid()}.{threading.get_ident()}")
            written.write_text(run.experiment.spec.to_json())
            written.replace(spec)
        return cast(Outcome, agent.start(run.directory, run.attempt, env=self.environment() | _gpus(run)))

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

    def files(self, run: ModelRun, folder: str) -> list[File]:
        directory = run.directory.resolve()
        found = (directory / folder).resolve()
        if not found.is_relative_to(directory):
            raise FileNotFoundError(folder)
        paths = sorted(path for path in found.rglob("*") if path.is_file() and not path.is_symlink())
        return [File(str(path.relative_to(directory)), path.stat().st_size) for path in paths]

    def read(self, run: ModelRun, name: str, offset: int, limit: int) -> bytes:
        with self.open_file(run, name) as file:
            file.seek(offset)
            return file.read(limit)

    def pieces(self, run: ModelRun, name: str, offset: int, size: int) -> Generator[bytes, None, None]:
        for place in range(offset, size, 1 << 20):
            yield self.read(run, name, place, min(1 << 20, size - place))

    def digest(self, run: ModelRun, name: str) -> str:
        with self.open_file(run, name) as file:
            sha = hashlib.sha256()
            while data := file.read(1 << 20):
                sha.update(data)
            return sha.hexdigest()

    def disk_bytes(self, run: ModelRun) -> int:
        return agent.disk_bytes(run.directory)

    def remove(self, experiment: UUID) -> None:
        agent.remove(settings.RUNS_DIR / str(experiment))

    def half_removed(self) -> list[UUID]:
        return [UUID(name) for name in agent.half_removed(settings.RUNS_DIR)]

    def readings(self) -> dict[str, Any]:
        return machine.readings(settings.RUNS_DIR)
