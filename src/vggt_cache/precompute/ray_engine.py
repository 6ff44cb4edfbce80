"""The engine for a Ray cluster: one actor for each GPU, or a share of the cores for each where there are none.

Ray carries paths and digests alone; features go from each actor into shards of its own. Actors are never restarted by
Ray, which would tie a block to a machine that is gone: the driver makes a new one, and anybody gets the block.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vggt_cache.encoder import Checkpoint
from vggt_cache.errors import SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.pixels import Pixels
from vggt_cache.place import absolute
from vggt_cache.precompute.driver import Driver, Sayings
from vggt_cache.precompute.pipeline import Tally
from vggt_cache.precompute.plan import Block
from vggt_cache.precompute.ray_actor import Order
from vggt_cache.precompute.ray_crew import RayCrew, first_words
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.settings import PrecomputeSettings, QwenLimits
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import Stored
from vggt_cache.requirements import fault_of
from vggt_cache.store.writer import shard_bytes

_OBJECT_STORE_BYTES = 128 * 2**20
"""Of a Ray of this machine alone: nothing large goes through it."""
_ANSWER_S = 20.0


class RayEngine:
    """Connected when it is made. Actors begin when something is to be computed."""

    def __init__(self, settings: PrecomputeSettings, reporter: Reporter) -> None:
        """Raises SettingsError where Ray is missing, or no cluster answers."""
        if fault := fault_of(["ray"]):
            raise SettingsError(fault)
        import ray

        self._ray, self._settings, self._reporter = ray, settings, reporter
        self._sayings = Sayings(reporter)
        self._connected_here = not ray.is_initialized()
        if self._connected_here:
            _connect(ray, settings.ray_address or os.environ.get("RAY_ADDRESS") or "local")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        self.device = _kind_of_device(settings, gpus)
        cores = [node["CPU"] for node in nodes if node.get("CPU")]
        if self.device == "cuda":
            # No core is asked for: where all are taken by others, a GPU would lie idle.
            self._count, self._share = settings.ray_actors or gpus, {"num_gpus": 1.0, "num_cpus": 0.0}
        else:
            self._count = settings.ray_actors or max(1, len(cores))
            self._share = {"num_gpus": 0.0, "num_cpus": share_of_cores(cores, self._count)}
        self._crew: RayCrew | None = None
        self._name = self.device
        """Of the device that was measured last."""

    def prepare(self, checkpoint: Checkpoint, spec: FeatureSpec, limits: QwenLimits | None) -> None:
        settings, location = self._settings, self._settings.vggt_model_path
        self._order = Order(
            settings=replace(
                settings,
                device=self.device,
                cache_dir=absolute(settings.cache_dir),
                vggt_model_path=os.path.abspath(location) if os.path.exists(location) else location,
            ),
            spec=spec,
            shard_bytes=shard_bytes(),
            limits=limits,
        )

    def compute(self, stored: Stored, blocks: Sequence[Block], stop: StopRequest) -> Tally:
        return Driver(self._actors, stored, self._reporter, stop, self._sayings).compute(blocks)

    @property
    def _actors(self) -> RayCrew:
        if self._crew is None:
            self._crew = RayCrew(self._ray, self._order, self._count, self._share, self._reporter.warn)
        return self._crew

    @property
    def device_name(self) -> str:
        return self._name

    def seconds(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> float:
        seconds: float
        seconds, self._name = self._asked("seconds", lists, pixels)
        return seconds

    def alone(self, pixels: Mapping[int, Pixels]) -> torch.Tensor:
        feature: torch.Tensor = self._asked("alone", pixels)
        return feature

    def _asked(self, call: str, *given: object) -> Any:
        """Of one actor, whichever is the first: the others load meanwhile."""
        report = self._actors.ask(call, *given)
        self._sayings.tell(report.said)
        return report.value

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()
        if self._connected_here:
            self._ray.shutdown()
        self._crew, self._connected_here = None, False


def share_of_cores(cores: Sequence[float], count: int) -> float:
    """The largest share of which `count` fit into machines with so many cores; 1 where none is known yet."""
    shares = {each / parts for each in cores for parts in range(1, count + 1)}
    fitting = (one for one in shares if sum(int(each / one + 1e-9) for each in cores) >= count)
    share = max(fitting, default=1.0)
    return float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4  # as Ray counts


def _kind_of_device(settings: PrecomputeSettings, gpus: int) -> str:
    """`cuda` or `cpu`: the machine that the run is started on may have other devices than the cluster."""
    wanted = settings.device
    if wanted == "auto":
        return "cuda" if gpus else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise SettingsError(
            f"--device {wanted} is no kind of device, and with --engine ray the cluster chooses which GPU a process "
            "gets: give cuda, cpu or auto"
        )
    if wanted == "cuda" and not gpus and not settings.ray_actors:
        raise SettingsError(
            "--device cuda asks for GPUs, and the cluster has none now: give --device cpu, or, where they come when "
            "they are asked for, how many as --ray_actors"
        )
    return wanted


def _connect(ray: Any, address: str) -> None:
    if address.startswith("ray://"):
        raise SettingsError(
            f"{address} is of Ray's client, and a run is a driver of the cluster: start it on a machine of the "
            "cluster with --ray_address auto, or by ray job submit"
        )
    own: dict[str, Any] = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # who computes on one machine tells nobody
        # Else it is 15, and whatever runs on this machine goes first, as it does not beside a plain process.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray itself would try for many minutes, and say nothing that is understood
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        with _signals_as_before():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if address == "local" else {}),
            )
    except Exception as error:
        raise SettingsError(
            f"no Ray answers at {address} ({first_words(str(error))}): check --ray_address and RAY_ADDRESS, and that "
            "ray start has run there, or leave them out for a Ray of this machine alone"
        ) from error


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """Ray takes SIGTERM for itself where it is connected, and would end the run at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
