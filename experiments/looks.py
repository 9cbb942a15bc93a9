"""What a checkpoint says of itself: its config.json.

A folder's is read at once. That of a name on the Hub is fetched, and that of a GGUF file worked out, by a worker, since
no page is to wait for either; what came of it is kept for a while, and a page asks again until it is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from django.core.cache import cache
from redis.exceptions import RedisError

from experiments import broker
from experiments.models import Host
from experiments.transport.local import Local
from trainer.families import FamilyError, read_config
from trainer.spec import is_path

log = logging.getLogger(__name__)

#: The job that RQ calls, by name.
LOOK = "experiments.worker.look"
#: Seconds that looking may take, and for how long what came of it is known.
PATIENCE, KEPT, FAILED_KEPT = 90, 24 * 3600, 60
#: More is no config.json.
MOST_BYTES = 1 << 20
#: Run where what it must not have, the site's secrets and the operator's token, is not in the environment.
_READ = "import json, sys; from trainer.growth.sources import locate; print(json.dumps(locate(sys.argv[1]).config()))"


class Look(NamedTuple):
    """What is known of a source: its config, or why there is none, or that somebody is looking; nothing: nobody is."""

    config: dict[str, Any] | None = None
    problem: str = ""
    pending: bool = False


def look(source: str, *, ask: bool = False) -> Look:
    """What is known of a name on the Hub, or of a resolved path; with `ask`, somebody is sent to look if nobody has."""
    if is_path(source) and (Path(source) / "config.json").is_file():
        try:
            return Look(read_config(Path(source)))
        except FamilyError as error:
            return Look(problem=str(error))
    known = cache.get(_key(source))
    if known is not None:
        return Look(*known)
    if not ask or not cache.add(_key(source), Look(pending=True), PATIENCE):
        return Look()
    try:
        broker.queue().enqueue_call(LOOK, (source,), timeout=PATIENCE, result_ttl=0, failure_ttl=0)
    except (RedisError, OSError) as error:
        log.warning("the broker does not answer (%s)", error)
        cache.delete(_key(source))
        return Look(problem="it cannot be looked up now, since the site's queue does not answer; try again in a moment")
    return Look(pending=True)


def find_out(source: str) -> None:
    """The job: look, and keep what was found for :func:`look`."""
    environment = Local(Host.local()).environment()
    command = [sys.executable, "-c", _READ, source]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE - 10, check=False
        )
    except subprocess.TimeoutExpired:
        found = Look(problem="it took too long to answer; try again later")
    else:
        found = _found(done)
    cache.set(_key(source), found, FAILED_KEPT if found.problem else KEPT)


def _found(done: subprocess.CompletedProcess[str]) -> Look:
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"the look ended with code {done.returncode}"])[-1]
        return Look(problem=last.partition("Error: ")[2] or last)
    if len(done.stdout) > MOST_BYTES:
        return Look(problem="its config.json is larger than any model's")
    return Look(json.loads(done.stdout.splitlines()[-1]))


def _key(source: str) -> str:
    seen = f"{source} {Path(source).stat().st_mtime_ns}" if is_path(source) and Path(source).is_file() else source
    return f"look-{hashlib.sha256(seen.encode()).hexdigest()[:32]}"
