"""Training runs of 40 steps that are stopped and killed at random moments, and started again with the same command.

    python tests/trials/stopped_training.py --seeds 5

Each run gets SIGTERM, SIGUSR1, Ctrl-C and SIGKILL, in random order, on one process and on two under ZeRO-3; of two,
one alone may be told. Its losses and gradient norms must be those of a run that nobody stopped, bit by bit, and each
sample must come once in every epoch. The result goes to benchmarks/results/stopping_<hardware>_<date>.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parent.parent
STEPS, SAMPLES = 40, 32
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL)
ENGINES = {
    "one process": ["--per_device_train_batch_size", 2, "--dataloader_num_workers", 2],
    "two processes, ZeRO-3": [
        "--per_device_train_batch_size", 1, "--deepspeed", TESTS.parent / "scripts" / "zero3.json",
    ],
}  # fmt: skip


def stopped_training(kit: object, folder: Path, engine: str, seed: int) -> dict[str, object]:
    """One run, beside one that is left alone. Raises AssertionError where they differ."""
    from train_kit import Kit, largest_difference, logged
    from train_stop_kit import CODES, Command

    assert isinstance(kit, Kit)
    random = Random(seed)
    processes = 2 if "two" in engine else 1
    saving = ["--save_strategy", "steps", "--save_steps", 7, "--save_total_limit", 2]
    more = [*ENGINES[engine], *saving, "--max_steps", STEPS, "--lr_scheduler_type", "cosine"]
    whole = Command(kit, folder / engine / "whole", more, processes)
    if not (whole.output_dir / "trainer_state.json").exists():
        whole.finish()
    command = Command(kit, folder / engine / str(seed), more, processes)
    order, starts, codes = random.sample(SIGNALS, len(SIGNALS)), 0, []
    for number in order:
        run = command.start()
        starts += 1
        if not run.wait_for_steps(random.randint(1, 9)):
            assert run.end() == 0, run.said()[-3000:]  # it came to its end before
            break
        time.sleep(random.random() / 2)
        run.send(number, rank=random.choice([None, 0, 1]) if processes == 2 else None)
        codes.append(run.end())
        if processes == 1:
            assert codes[-1] in (CODES[number], 0), run.said()[-3000:]
        assert "Traceback" not in run.said() or processes == 2, run.said()[-3000:]
    command.finish()
    difference = largest_difference(logged(whole.output_dir), logged(command.output_dir))
    assert difference == 0.0, f"seed {seed}: losses differ by {difference:.1e}"
    samples = command.samples()
    for first in range(1, STEPS, SAMPLES // 2):
        steps = range(first, min(first + SAMPLES // 2, STEPS + 1))
        seen = sorted(sample for step in steps for sample in samples[step])
        assert len(set(seen)) == len(seen) == 2 * len(steps), f"seed {seed}: a sample came twice in an epoch"
    return {"engine": engine, "seed": seed, "signals": [one.name for one in order], "starts": starts + 1}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each engine")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS), str(TESTS.parent / "benchmarks")]
    from safetensors.torch import save_file

    import golden_recipe
    import record
    from train_kit import write_kit
    from vggt_cache.encoder import EncoderConfig, expected_shapes

    folder = Path(tempfile.mkdtemp(prefix="stopped_training_"))
    weights = golden_recipe.make_weights(expected_shapes(EncoderConfig.from_dict(golden_recipe.SMALL_CONFIG)))
    (folder / "vggt").mkdir()
    named = {f"aggregator.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / "vggt" / "model.safetensors")
    (folder / "vggt" / "config.json").write_text(json.dumps(golden_recipe.SMALL_CONFIG))
    kit = write_kit(folder / "kit", folder / "vggt")
    runs = []
    for engine in ENGINES:
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            runs.append(stopped_training(kit, folder, engine, seed))
            print(json.dumps(runs[-1]), flush=True)
    shutil.rmtree(folder)
    record.write("stopping", "cpu", {"steps": STEPS, "samples": SAMPLES}, {"runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
