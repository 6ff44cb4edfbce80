"""Several precompute processes on one machine against one: what working side by side costs.

Theory. Processes share a cache directory, in which each claims blocks of work, and the machine. Two take half the time
of one if the machine lets them, and it does not quite, because they share memory, caches and power. So that limit is
measured beside it: the bare encoder on decoded pixels, one process against as many at the same time, started together,
before and after. The ratio of both ratios is what claims, waiting for each other and unequal shares cost.

Each process has a part of the machine of its own: an equal share of the processor's cores, which neither it nor its
decode workers can leave, with as many threads, and on a machine with GPUs one of them. The single process has such a
part too, not the whole machine.

Counted is the time from the first line "Model loaded" of a run to its last line "Processed". So the start (imports,
scanning, loading) is left out, and what processes wait for each other at the end is in. A block is 64 images: --frames
should make many blocks for each process. Every feature must have been computed once, by one process, or there is no
result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import record
from bench_encoder import SIZES, random_encoder
from photographs import write_frames
from side_by_side import BareWork, Place, Precompute, bare_s, places
from vggt_cache.demo.checkpoint import CONFIG
from vggt_cache.encoder import EncoderConfig
from vggt_cache.store import FeatureCache


def write_model(
    folder: Path,
    config: EncoderConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A checkpoint of random weights in the shapes of `config`, drawn on `device`."""
    folder.mkdir()
    encoder = random_encoder(config, device, "float32", layer=-1)
    tensors = {f"aggregator.{name}": value.to("cpu", dtype) for name, value in encoder.state_dict().items()}
    # Every checkpoint has it; no feature depends on it.
    tensors["aggregator.patch_embed.mask_token"] = torch.zeros(1, config.embed_dim, dtype=dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({name: getattr(config, name) for name in CONFIG}))
    return folder


class Bench:
    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.data = folder / "data"
        self.data.mkdir()
        write_frames(self.data, arguments.frames)
        self.model = Path(arguments.vggt_model_path or write_model(folder / "model", SIZES[arguments.size]))
        self.work = BareWork(
            model=self.model,
            paths=tuple(sorted(self.data.glob("*.png"))[: arguments.bare_frames]),
            image_size=arguments.image_size,
            batch_size=arguments.batch_size,
            frames=arguments.bare_frames,
        )

    def precompute_s(self, used: Sequence[Place]) -> float:
        """Of one run by as many processes as places, into a new cache."""
        cache_dir = self.folder / "cache"
        flags = {
            "data_root": self.data,
            "cache_dir": cache_dir,
            "vggt_model_path": self.model,
            "image_size": self.arguments.image_size,
            "batch_size": self.arguments.batch_size,
            "num_workers": self.arguments.num_workers,
            "device": self.arguments.device,
        }
        runs = [Precompute(place, flags, self.folder / f"log_{at}") for at, place in enumerate(used)]
        told = [run.told() for run in runs]
        self._check_computed_once(cache_dir, [one.images for one in told])
        shutil.rmtree(cache_dir)
        return max(one.processed_s for one in told) - min(one.loaded_s for one in told)

    def _check_computed_once(self, cache_dir: Path, images: Sequence[int]) -> None:
        wanted = self.arguments.frames
        with FeatureCache.open(cache_dir, context="frame", use_index=False) as cache:
            if not len(cache) == sum(images) == wanted:
                raise SystemExit(
                    f"{wanted} features are wanted, {len(cache)} are stored, and the processes say that they computed "
                    f"{list(images)}: work was done twice or not at all"
                )

    def bare_ratio(self, all_places: Sequence[Place]) -> tuple[float, float]:
        """Frames per second of one process, and how many times as many all of them do."""
        one_s, all_s = bare_s(all_places[:1], self.work), bare_s(all_places, self.work)
        return self.work.frames / one_s, len(all_places) * one_s / all_s

    def run(self) -> dict[str, Any]:
        all_places = places(self.arguments.processes, self.arguments.device)
        bare, one_s, all_s = [self.bare_ratio(all_places)], [], []
        for _ in range(self.arguments.rounds):
            one_s.append(self.precompute_s(all_places[:1]))
            all_s.append(self.precompute_s(all_places))
            bare.append(self.bare_ratio(all_places))
        ratio = statistics.median(one / several for one, several in zip(one_s, all_s, strict=True))
        bare_ratio = statistics.median(found for _, found in bare)
        return {
            "cores_each": len(all_places[0].cores),
            "one_process_s": one_s,
            "all_processes_s": all_s,
            "ratio": ratio,
            "bare_frames_per_s_of_one": statistics.median(speed for speed, _ in bare),
            "bare_ratios": [found for _, found in bare],
            "bare_ratio": bare_ratio,
            "ratio_over_bare": ratio / bare_ratio,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpus = torch.cuda.device_count() >= 2
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpus else "cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="1b" if on_gpus else "small")
    parser.add_argument("--vggt_model_path", help="a checkpoint; default: random weights of --size")
    parser.add_argument("--frames", type=int, default=4096 if on_gpus else 1920)
    parser.add_argument("--bare_frames", type=int, default=512 if on_gpus else 192, help="of each process")
    parser.add_argument("--image_size", type=int, default=518 if on_gpus else 224)
    parser.add_argument("--batch_size", type=int, default=16 if on_gpus else 4)
    parser.add_argument("--num_workers", type=int, default=4 if on_gpus else 1, help="of each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="for frames, model and cache (default: the temporary directory)")
    parser.add_argument("--small", action="store_true", help="little and short, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.frames, arguments.bare_frames, arguments.image_size, arguments.rounds = 256, 16, 112, 1
    available = torch.cuda.device_count() if arguments.device == "cuda" else os.cpu_count() or 1
    if arguments.processes > min(available, len(os.sched_getaffinity(0))):
        parser.error(
            f"--processes {arguments.processes} is more than this machine has {arguments.device} devices or cores for: "
            "each needs one of its own"
        )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = Bench(Path(folder), arguments).run()
    configuration = vars(arguments)
    del configuration["folder"]  # a path of one machine tells nobody anything
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("scaling", arguments.device, configuration, figures)


if __name__ == "__main__":
    main()
