"""How a run directory is reached: `base` says what a transport must do, `local` does it on this machine, `ssh` on
another, by way of the `keeper`, which holds one connection to each.
"""

from __future__ import annotations

from experiments.models import Host
from experiments.transport.base import File, Frame, HostProblem, Status, Transport
from experiments.transport.local import Local
from experiments.transport.ssh import Ssh

__all__ = ["File", "Frame", "HostProblem", "Status", "Transport", "for_host"]

_KINDS: dict[str, type[Transport]] = {Host.Kind.LOCAL: Local, Host.Kind.WORKER: Local, Host.Kind.SSH: Ssh}


def for_host(host: Host) -> Transport:
    """The transport that reaches `host`."""
    return _KINDS[host.kind](host)
