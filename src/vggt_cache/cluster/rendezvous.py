"""Where the processes of a run meet: address, port and interface, checked before anything is started."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from vggt_cache.cluster import network
from vggt_cache.errors import SettingsError


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
                f"NODE_RANK is {self.node_rank}, and the ranks of {self.nodes} nodes are 0 to "
                f"{self.nodes - 1}: give each node one of them, 0 to the one whose address MASTER_ADDR is"
            )
        if not 0 < self.master_port < 65536:
            raise SettingsError(
                f"MASTER_PORT is {self.master_port}, and ports are 1 to 65535: give one that is free on "
                "node 0"
            )

    def check(self) -> list[str]:
        """Look at this machine's network; returns remarks. Raises SettingsError."""
        address = network.resolve(self.master_addr)
        if self.nodes > 1 and ipaddress.ip_address(address).is_loopback:
            raise SettingsError(
                f"MASTER_ADDR is '{self.master_addr}', which means {address} on this machine, an address "
                "that no other node can reach: give the IP address of node 0 in the network that the nodes "
                "share"
            )
        if self.node_rank == 0 and not network.port_is_free(self.master_port):
            raise SettingsError(
                f"MASTER_PORT {self.master_port} is in use on this machine, so the nodes could not meet "
                "there: end the program that has it, or set MASTER_PORT to another, the same on every node"
            )
        if self.node_rank == 0 and self.nodes > 1 and not network.is_own(address):
            return [
                f"NODE_RANK is 0, and MASTER_ADDR {self.master_addr} is not an address of this machine: "
                "unless something forwards it here, give node 0's own"
            ]
        return []


def interfaces(master_addr: str, nccl: str | None, gloo: str | None) -> dict[str, str]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: as given, else the interface towards the master.

    Raises SettingsError where a given name fits no interface of this machine.
    """
    _check_exists("NCCL_SOCKET_IFNAME", nccl, network.chosen_interfaces(nccl or "="))
    _check_exists("GLOO_SOCKET_IFNAME", gloo, network.chosen_interfaces(f"={gloo}"))
    if nccl and gloo:
        return {"NCCL_SOCKET_IFNAME": nccl, "GLOO_SOCKET_IFNAME": gloo}
    found = network.interface_towards(master_addr)
    return {"NCCL_SOCKET_IFNAME": nccl or found, "GLOO_SOCKET_IFNAME": gloo or found}


def _check_exists(variable: str, given: str | None, fitting: list[str]) -> None:
    if given and not fitting:
        raise SettingsError(
            f"{variable} is '{given}', and this machine has {', '.join(network.interface_names())}: give "
            "one of them, or unset it, and the interface towards MASTER_ADDR is used"
        )
