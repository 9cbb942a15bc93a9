"""The keeper against a real SSH server: one connection a host, its key pinned, and a sentence for whatever goes wrong."""

from __future__ import annotations

from experiments.models import Host
from experiments.transport.client import call
from tests.sshd import Sshd


def test_a_host_is_reached(sshd: Sshd, keeper: object, owner: object) -> None:
    host = sshd.host(owner)
    hello = call(host.pk, "hello")[0]
    assert hello["user"] == sshd.login.name
    assert hello["root"] == str(sshd.root)
