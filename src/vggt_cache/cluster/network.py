"""Addresses, interfaces and ports of this machine, as the kernel knows them; no tool needs to be
installed."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from vggt_cache.errors import SettingsError

_SIOCGIFADDR = 0x8915


def resolve(host: str) -> str:
    """The IP address of a host name or address. Raises SettingsError where the name means nothing."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"MASTER_ADDR is '{host}', and this machine cannot find an address for it ({error}): give the "
            "IP address of node 0, the same on every node"
        ) from error


def local_address_towards(address: str) -> str:
    """The address from which this machine would reach another one; nothing is sent. Raises SettingsError."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise SettingsError(
            f"there is no route from this machine to MASTER_ADDR {address} ({error.strerror}): check the "
            "address and that the network interface is up"
        ) from error


def is_own(address: str) -> bool:
    """Whether this machine has the address."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def interface_towards(host: str) -> str:
    """Name of the interface that leads to a host; on the host itself, the one that has its address.

    Raises SettingsError where there is no route.
    """
    address = resolve(host)
    local = local_address_towards(address)
    for name in interface_names():
        if local in addresses_of(name):
            return name
    # A second address of an interface is not among those that the kernel lists first.
    found = _interface_by_route(local)
    if found is None:
        raise SettingsError(
            f"the interface towards MASTER_ADDR {host} cannot be determined (it has the address {local}): set "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to its name"
        )
    return found


def interface_names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def addresses_of(interface: str) -> list[str]:
    """An interface's first IPv4 address and all IPv6 addresses."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            found.append(socket.inet_ntoa(reply[20:24]))
        except OSError:
            pass  # an interface without an IPv4 address
    for line in _lines("/proc/net/if_inet6"):
        digits, *_, name = line.split()
        if name == interface:
            found.append(str(ipaddress.IPv6Address(int(digits, 16))))
    return found


def _interface_by_route(address: str) -> str | None:
    """By the longest matching entry of the kernel's IPv4 table."""
    try:
        wanted = int(ipaddress.IPv4Address(address))
    except ValueError:
        return None
    best: tuple[int, str] | None = None
    for line in _lines("/proc/net/route")[1:]:
        name, destination, _, _, _, _, _, mask = line.split()[:8]
        network, bits = (socket.ntohl(int(digits, 16)) for digits in (destination, mask))
        if wanted & bits == network and (best is None or bits > best[0]):
            best = (bits, name)
    return best[1] if best else None


def chosen_interfaces(setting: str) -> list[str]:
    """The interfaces that NCCL takes by NCCL_SOCKET_IFNAME: `eth,ib` prefixes, `=eth0` exact names, `^lo`
    all others."""
    names, exact, other = interface_names(), False, False
    if setting.startswith("^"):
        setting, other = setting[1:], True
    if setting.startswith("="):
        setting, exact = setting[1:], True
    parts = [part for part in setting.split(",") if part]
    hit = {name for name in names for part in parts if name == part or (not exact and name.startswith(part))}
    return [name for name in names if (name in hit) != other]


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the store of torchrun does: a connection of the last run that is being closed is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
