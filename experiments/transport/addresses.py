"""Which addresses the site may connect to. Users say where it is to go, and it goes from inside the operator's network.

A name is resolved once, judged by what it resolves to, and that very address is connected to: a name that resolves
differently the next time changes nothing. The operator says what is allowed (HOSTS_ALLOW, HOSTS_PORTS).
"""

from __future__ import annotations

import functools
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from experiments.models import Host
from experiments.transport.base import HostProblem

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NETWORKS: dict[str, tuple[str, ...]] = {
    # 100.64.0.0/10 is what providers and overlay networks number their own machines with
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    "loopback": ("127.0.0.0/8", "::1/128"),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
}
#: Where clouds hand credentials to whoever asks. Each lies in a network that may be allowed for other reasons.
_METADATA = frozenset(map(ip_address, ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "100.100.100.200")))
_NAT64, _GIVEN_OUT = ip_network("64:ff9b::/96"), ip_network("2000::/3")


def resolve(address: str, port: int) -> str:
    """The IP address to connect to for a name or address. Blocks. Raises :class:`HostProblem`."""
    if settings.HOSTS_PORTS and port not in settings.HOSTS_PORTS:
        allowed = ", ".join(map(str, settings.HOSTS_PORTS))
        raise HostProblem(
            Host.Problem.ADDRESS_REFUSED, f"Port {port} is not allowed by this site's operator: {allowed}."
        )
    found = _lookup(address, port)
    for ip in found:
        if is_allowed(ip):
            return str(ip)
    raise HostProblem(
        Host.Problem.ADDRESS_REFUSED,
        f"{address} is {_kind(found[0])}, which this site's operator does not allow (HOSTS_ALLOW).",
    )


def is_allowed(ip: Address) -> bool:
    """Whether the operator lets hosts have this address."""
    ip = _meant(ip)
    words, networks = _allowed(tuple(settings.HOSTS_ALLOW))
    if any(ip in network for network in networks):
        return True
    if ip in _METADATA:
        return False
    if any(_within(ip, word) for word in _NETWORKS):
        return any(_within(ip, word) for word in words)
    return "public" in words and _is_public(ip)


def _is_public(ip: Address) -> bool:
    """Of IPv6 only what is given out: what else counts as global holds forms that stand for an IPv4 address."""
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or ip in _GIVEN_OUT)


def _lookup(address: str, port: int) -> list[Address]:
    try:
        answers = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise HostProblem(
            Host.Problem.UNREACHABLE,
            f"There is no machine of the name {address}: it does not resolve here. Check its spelling, or give its IP "
            "address.",
        ) from None
    return [ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers]


def _meant(ip: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does: a gateway would go there."""
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:
            return IPv4Address(ip.packed[-4:])
        return ip.ipv4_mapped or ip.sixtofour or ip
    return ip


def _kind(ip: Address) -> str:
    ip = _meant(ip)
    if ip in _METADATA:
        return "the address of a cloud's metadata service"
    for word, said in (("loopback", "a loopback"), ("link-local", "a link-local"), ("private", "a private")):
        if _within(ip, word):
            return f"{said} address"
    return "a public address" if _is_public(ip) else "an address that no machine has"


def _within(ip: Address, word: str) -> bool:
    return any(ip in ip_network(network) for network in _NETWORKS.get(word, ()))


@functools.cache
def _allowed(listed: tuple[str, ...]) -> tuple[frozenset[str], tuple[Network, ...]]:
    words = frozenset(entry for entry in listed if entry in _NETWORKS or entry == "public")
    try:
        return words, tuple(ip_network(entry) for entry in listed if entry not in words)
    except ValueError as error:
        raise ImproperlyConfigured(
            f"HOSTS_ALLOW: {error}. It lists networks, or public, private, loopback, link-local."
        ) from None
