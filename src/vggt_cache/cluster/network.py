"""Where the processes of a run meet: address, port and interface, as the kernel knows them; no tool is needed."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from vggt_cache.errors import SettingsError, errors_as, os_errors_as

MEET_TIMEOUT_S = 600.0
"""How long nodes wait for each other, unless the environment's MEET_TIMEOUT_S says otherwise."""
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """One node's settings for meeting the others. Raises SettingsError for values that cannot be meant."""

    nodes: int
    node_rank: int
    master_addr: str
    """Host name or IP address of node 0."""
    master_port: int
    """A free TCP port of node 0."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise SettingsError(f"NNODES is {self.nodes}, and a run has at least one node: give their number")
        if not 0 <= self.node_rank < self.nodes:
            raise SettingsError(
                f"NODE_RANK is {self.node_rank}, and the ranks of {self.nodes} nodes are 0 to {self.nodes - 1}: "
                "give each node one of them, 0 to the one whose address MASTER_ADDR is"
            )
        if not 0 < self.master_port < 65536:
            raise SettingsError(
                f"MASTER_PORT is {self.master_port}, and ports are 1 to 65535: give one that is free on node 0"
            )

    def check(self) -> list[str]:
        """Look at this machine's network; returns remarks. Raises SettingsError."""
        address = resolve(self.master_addr)
        if self.nodes > 1 and ipaddress.ip_address(address).is_loopback:
            raise SettingsError(
                f"MASTER_ADDR is '{self.master_addr}', which means {address} on this machine, an address that no "
                "other node can reach: give the IP address of node 0 in the network that the nodes share"
            )
        if self.node_rank == 0 and not can_bind("", self.master_port):
            raise SettingsError(
                f"MASTER_PORT {self.master_port} is in use on this machine, so the nodes could not meet there: "
                "end the program that has it, or set MASTER_PORT to another, the same on every node"
            )
        if self.node_rank == 0 and self.nodes > 1 and not can_bind(address, 0):
            return [
                f"NODE_RANK is 0, and MASTER_ADDR {self.master_addr} is not an address of this machine: "
                "unless something forwards it here, give node 0's own"
            ]
        return []


def interfaces(master_addr: str, nccl: str, gloo: str) -> dict[str, str]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: as given, else the interface towards the master.

    Raises SettingsError where a given name fits no interface of this machine.
    """
    given = {"NCCL_SOCKET_IFNAME": nccl, "GLOO_SOCKET_IFNAME": gloo}
    for variable, setting in given.items():
        # gloo takes one exact name.
        if setting and not chosen_interfaces(setting if variable.startswith("NCCL") else f"={setting}"):
            raise SettingsError(
                f"{variable} is '{setting}', and this machine has {', '.join(interface_names())}: give one of "
                "them, or unset it, and the interface towards MASTER_ADDR is used"
            )
    found = "" if nccl and gloo else interface_towards(master_addr)
    return {variable: setting or found for variable, setting in given.items()}


def chosen_interfaces(setting: str) -> list[str]:
    """What NCCL takes by NCCL_SOCKET_IFNAME: `eth,ib` prefixes, `=eth0` exact names, `^lo` all others."""
    is_other, listed = setting.startswith("^"), setting.removeprefix("^")
    parts = tuple(part for part in listed.removeprefix("=").split(",") if part)
    named = parts.__contains__ if listed.startswith("=") else lambda name: name.startswith(parts)
    return [name for name in interface_names() if named(name) != is_other]


def interface_names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def resolve(host: str) -> str:
    """The IP address of a host name or address. Raises SettingsError where the name means nothing."""
    fault = f"MASTER_ADDR is '{host}', and this machine cannot find an address for it"
    remedy = ": give the IP address of node 0, the same on every node"
    with errors_as(SettingsError, fault, remedy, OSError, UnicodeError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def local_address_towards(address: str) -> str:
    """The address from which this machine would reach another one; nothing is sent. Raises SettingsError."""
    fault = f"there is no route from this machine to MASTER_ADDR {address}"
    remedy = ": check the address and that the network interface is up"
    with (
        os_errors_as(SettingsError, fault, remedy),
        socket.socket(_family(address), socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str:
    """Name of the interface that leads to a host; on the host itself, the one that has its address.

    Raises SettingsError where there is no route.
    """
    local = local_address_towards(resolve(host))
    owners = (name for name in interface_names() if local in addresses_of(name))
    # A second address of an interface is not among those that the kernel lists first.
    found = next(owners, None) or _interface_by_route(local)
    if found is None:
        raise SettingsError(
            f"the interface towards MASTER_ADDR {host} cannot be determined (it has the address {local}): set "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to its name"
        )
    return found


def addresses_of(interface: str) -> list[str]:
    """An interface's first IPv4 address and all IPv6 addresses."""
    entries = (line.split() for line in _lines("/proc/net/if_inet6"))
    found = [str(ipaddress.IPv6Address(int(entry[0], 16))) for entry in entries if entry[-1] == interface]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has no IPv4 address
            return found
    return [socket.inet_ntoa(reply[20:24]), *found]


def _interface_by_route(address: str) -> str | None:
    """By the longest matching entry of the kernel's IPv4 table."""
    if ":" in address:
        return None
    wanted, matches = int(ipaddress.IPv4Address(address)), []
    for entry in map(str.split, _lines("/proc/net/route")[1:]):
        destination, mask = (socket.ntohl(int(entry[column], 16)) for column in (1, 7))
        if wanted & mask == destination:
            matches.append((mask, entry[0]))
    return max(matches, key=itemgetter(0), default=(0, None))[1]


def wait_for_node_0(host: str, port: int, *, patience_s: float) -> None:
    """Return as soon as something listens there. Raises SettingsError where that does not come to pass in time.

    torch would ask for half an hour without a word, and then print pages. What is wrong at first may be that node 0
    has not been started yet, so it is said at once and asked again.
    """
    address, deadline_s, told = resolve(host), time.monotonic() + patience_s, False
    while True:
        left_s = max(0.1, deadline_s - time.monotonic())
        try:
            socket.create_connection((address, port), timeout=min(5.0, left_s)).close()
            if told:
                print("[INFO] node 0 answers", flush=True)
            return
        except OSError as error:
            reason = error.strerror or error
        if time.monotonic() >= deadline_s:
            raise SettingsError(
                f"nothing answers at MASTER_ADDR {host}, MASTER_PORT {port} ({reason}), after {patience_s:.0f} s "
                "(MEET_TIMEOUT_S): start node 0 too, give every node the same address and port, and see that no "
                "firewall closes it"
            )
        if not told:
            told = True
            where = f"{host}:{port}, where nothing answers yet ({reason})"
            print(f"[INFO] waiting up to {patience_s:.0f} s for node 0 at {where}", flush=True)
        time.sleep(0.5)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def can_bind(address: str, port: int) -> bool:
    """Whether the address is this machine's (`` ``: any), and nobody uses the port (0: any)."""
    with suppress(OSError):
        # A connection of the last run that is being closed is no obstacle, as it is none for the store of torchrun.
        socket.create_server((address, port), family=_family(address)).close()
        return True
    return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
