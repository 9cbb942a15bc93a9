"""Which addresses hosts may have: judged once, by what a name means, and not opened by another spelling."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from experiments.models import Host
from experiments.transport.addresses import is_allowed, resolve
from experiments.transport.base import HostProblem

PUBLIC = ("8.8.8.8", "2606:4700::1111")
PRIVATE = ("10.1.2.3", "172.16.0.1", "192.168.1.10", "100.64.3.4", "fd12:3456::1")
LOOPBACK = ("127.0.0.1", "127.9.9.9", "::1")
LINK_LOCAL = ("169.254.7.7", "fe80::1")
METADATA = ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "100.100.100.200")
NOBODY = ("0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "0.1.2.3")


def allow(monkeypatch: pytest.MonkeyPatch, *listed: str) -> None:
    monkeypatch.setattr(settings, "HOSTS_ALLOW", list(listed))


def answer(monkeypatch: pytest.MonkeyPatch, *ips: str) -> list[str]:
    """What every name resolves to; the list of names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        return [(socket.AF_INET6 if ":" in ip else socket.AF_INET, 1, 6, "", (ip, port)) for ip in ips]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("ip", PUBLIC + PRIVATE)
def test_public_and_private_machines_are_allowed_unless_the_operator_says_otherwise(ip: str) -> None:
    assert settings.HOSTS_ALLOW == ["public", "private"]
    assert is_allowed(ip_address(ip))


@pytest.mark.parametrize("ip", LOOPBACK + LINK_LOCAL + METADATA + NOBODY)
def test_what_is_no_other_machine_is_refused(ip: str) -> None:
    assert not is_allowed(ip_address(ip))


@pytest.mark.parametrize("ip", ["127.0.0.1", "169.254.169.254", "0.0.0.0"])
@pytest.mark.parametrize("spelling", ["::ffff:{}", "64:ff9b::{}"])
def test_an_address_in_another_spelling_is_judged_as_what_it_means(ip: str, spelling: str) -> None:
    assert not is_allowed(ip_address(spelling.format(ip)))
    assert is_allowed(ip_address(spelling.format("8.8.8.8")))


@pytest.mark.parametrize("ip", ["::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1", "fec0::1", "2001:0:1::1"])
def test_ipv6_that_is_not_given_out_is_no_public_machine(ip: str) -> None:
    assert not is_allowed(ip_address(ip))


def test_an_address_that_stands_for_another_by_6to4_is_judged_as_that() -> None:
    assert not is_allowed(ip_address("2002:7f00:1::1"))


@pytest.mark.parametrize(
    ("word", "ips"), [("public", PUBLIC), ("private", PRIVATE), ("loopback", LOOPBACK), ("link-local", LINK_LOCAL)]
)
def test_a_word_allows_its_addresses_and_no_others(
    monkeypatch: pytest.MonkeyPatch, word: str, ips: tuple[str, ...]
) -> None:
    allow(monkeypatch, word)
    every = PUBLIC + PRIVATE + LOOPBACK + LINK_LOCAL + METADATA + NOBODY
    assert tuple(ip for ip in every if is_allowed(ip_address(ip))) == ips


def test_a_network_allows_what_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, "192.168.7.0/24", "169.254.169.254", "::1/128")
    for ip in ("192.168.7.9", "::ffff:192.168.7.9", "169.254.169.254", "::1"):
        assert is_allowed(ip_address(ip))
    for ip in ("192.168.8.9", "8.8.8.8", "127.0.0.1"):
        assert not is_allowed(ip_address(ip))


def test_a_setting_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, "public", "10.0.0.0/99")
    with pytest.raises(ImproperlyConfigured, match=r"HOSTS_ALLOW.*10\.0\.0\.0/99"):
        is_allowed(ip_address("8.8.8.8"))


def test_a_name_is_resolved_once_and_its_address_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, "8.8.8.8")
    assert resolve("gpu.example", 22) == "8.8.8.8"
    assert asked == ["gpu.example"]


def test_of_several_addresses_an_allowed_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "127.0.0.1", "192.168.1.5", "8.8.8.8")
    assert resolve("gpu.example", 22) == "192.168.1.5"


@pytest.mark.parametrize(
    ("ip", "said"),
    [
        ("127.0.0.1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("0.0.0.0", "no machine"),
    ],
)
def test_a_name_that_means_a_refused_address_is_refused(monkeypatch: pytest.MonkeyPatch, ip: str, said: str) -> None:
    answer(monkeypatch, ip)
    with pytest.raises(HostProblem, match=said) as caught:
        resolve("gpu.example", 22)
    assert caught.value.kind == Host.Problem.ADDRESS_REFUSED


def test_a_name_that_does_not_resolve_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("gpu.example", "a" * 300, "a..b"):
        with pytest.raises(HostProblem, match="does not resolve") as caught:
            resolve(name, 22)
        assert caught.value.kind == Host.Problem.UNREACHABLE


def test_ports_may_be_restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "8.8.8.8")
    assert resolve("gpu.example", 40022) == "8.8.8.8"
    monkeypatch.setattr(settings, "HOSTS_PORTS", [22, 2222])
    assert resolve("gpu.example", 2222) == "8.8.8.8"
    with pytest.raises(HostProblem, match=r"Port 40022 is not allowed.*22, 2222"):
        resolve("gpu.example", 40022)
