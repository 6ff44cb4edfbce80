"""Precompute by actors of a Ray cluster on this machine against as many plain processes: what the driver costs.

Theory. Both decode, encode and write with the same code; they differ in who chooses blocks. Starting differs most (Ray
itself, a driver beside the actors), and a run has it once, so it is left out: each side makes a run of few frames and a
run of many, and what the further frames take is counted. Sides and sizes take turns, and the ratio is that of
neighbours. Each actor and each process has an equal share of the cores as threads.

Beside it what the driver does for a block alone: handing out 64 lists of nine frames to an actor that does nothing, and
taking in its answer with their digests. `sim_driver.py` counts with these.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
from bench_encoder import SIZES
from bench_scaling import write_model
from photographs import write_frames
from vggt_cache.precompute.driver import Report
from vggt_cache.precompute.pipeline import Outcome
from vggt_cache.precompute.plan import Task
from vggt_cache.store import FeatureCache

_LISTS, _FRAMES = 64, 9


class Bench:
    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._arguments, self._cache_dir = arguments, folder / "cache"
        data = folder / "data"
        data.mkdir()
        write_frames(data, arguments.many)
        flags = {
            "data_root": data,
            "cache_dir": self._cache_dir,
            "vggt_model_path": write_model(folder / "model", SIZES[arguments.size]),
            "image_size": arguments.image_size,
            "batch_size": arguments.batch_size,
            "num_workers": 1,
            "device": "cpu",
        }
        self._command = [sys.executable, "-m", "vggt_cache", "precompute"]
        self._command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        threads = max(1, (os.cpu_count() or 1) // arguments.processes)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def seconds(self, engine: str, frames: int) -> float:
        """From the start of a run into a new cache to its end."""
        count = self._arguments.processes
        command = [*self._command, "--max_samples", str(frames)]
        if engine == "ray":
            command, count = [*command, "--engine", "ray", "--ray_actors", str(count)], 1
        begun_s = time.perf_counter()
        running = [
            subprocess.Popen(
                command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for _ in range(count)
        ]
        for process in running:
            _, said = process.communicate()
            if process.returncode:
                raise SystemExit(f"precompute failed ({process.returncode}): {said.decode()[-2000:]}")
        seconds = time.perf_counter() - begun_s
        with FeatureCache.open(self._cache_dir, context="frame", use_index=False) as cache:
            if len(cache) != frames:
                raise SystemExit(f"{frames} features are wanted, and {len(cache)} are stored: no result")
        shutil.rmtree(self._cache_dir)
        return seconds

    def run(self) -> dict[str, Any]:
        few, many = self._arguments.few, self._arguments.many
        sides: dict[str, list[float]] = {"claims": [], "ray": []}
        starts: dict[str, list[float]] = {"claims": [], "ray": []}
        print(f"{'engine':>7}  {few:>8} frames  {many:>8} frames  ms a frame")
        for _ in range(self._arguments.rounds):
            for engine, found in sides.items():
                short_s, long_s = self.seconds(engine, few), self.seconds(engine, many)
                each_s = (long_s - short_s) / (many - few)
                found.append(each_s)
                starts[engine].append(short_s - few * each_s)
                print(
                    f"{engine:>7}  {short_s:>13.1f} s  {long_s:>13.1f} s  {1000 * each_s:>10.2f}", flush=True
                )
        pairs = zip(sides["claims"], sides["ray"], strict=True)
        return {
            "claims_s_a_frame": sides["claims"],
            "ray_s_a_frame": sides["ray"],
            "claims_start_s": statistics.median(starts["claims"]),
            "ray_start_s": statistics.median(starts["ray"]),
            "ray_speed_over_claims": statistics.median(claims / ray for claims, ray in pairs),
        }


class Idle:
    """An actor that knows at once."""

    def __init__(self) -> None:
        self._tasks = queue.SimpleQueue[Task]()

    def prepare(self, task: Task) -> None:
        self._tasks.put(task)

    def compute(self) -> Report:
        task = self._tasks.get()
        digests = {frame: (bytes(32), bytes(16)) for frame in task.paths}
        return Report(outcomes=[Outcome(block_id=task.block_id, digests=digests)])


def driver_s(rounds: int) -> tuple[float, float]:
    """Median seconds to hand out a block, and to take in its answer."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=128 * 2**20)
    actor: Any = ray.remote(concurrency_groups={"beside": 1})(Idle).remote()
    frames = _LISTS + _FRAMES - 1
    task = Task(
        block_id="0" * 32,
        features=list(range(_LISTS)),
        lists=[list(range(at, at + _FRAMES)) for at in range(_LISTS)],
        labels=[
            f"/data/of/many/scenes/scene_{at:05d}/rgb/{at:06d}.jpg (after 8 earlier frames)"
            for at in range(_LISTS)
        ],
        paths={at: f"/data/of/many/scenes/scene_{at:05d}/rgb/{at:06d}.jpg" for at in range(frames)},
    )
    out, back = [], []
    for _ in range(rounds):
        begun_s = time.perf_counter()
        actor.prepare.options(concurrency_group="beside").remote(task)
        answer = actor.compute.remote()
        out.append(time.perf_counter() - begun_s)
        ray.wait([answer])
        begun_s = time.perf_counter()
        ray.get(answer)
        back.append(time.perf_counter() - begun_s)
    ray.shutdown()
    return statistics.median(out), statistics.median(back)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--few", type=int, default=256, help="frames")
    parser.add_argument("--many", type=int, default=1536, help="frames")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="little and short, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.few, arguments.many, arguments.image_size, arguments.rounds = 64, 192, 112, 1
    submit_s, answer_s = driver_s(20 if arguments.small else 500)
    print(
        f"the driver: {1000 * submit_s:.2f} ms to hand out a block, {1000 * answer_s:.2f} ms for its answer"
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = Bench(Path(folder), arguments).run()
    figures |= {"submit_s": submit_s, "answer_s": answer_s}
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("ray", "cpu", vars(arguments), figures)


if __name__ == "__main__":
    main()
