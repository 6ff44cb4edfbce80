"""Training in several processes: real torchrun, real DeepSpeed, on the CPU."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from small_data import write_image
from store_kit import shards_dir
from train_kit import Kit, largest_difference
from train_processes_kit import start, train
from vggt_cache.samples import SampleIndex, find_sources
from vggt_cache.store import FeatureCache, ShardWriter, list_stores

ROOT = Path(__file__).resolve().parent.parent
STEPS, LONG = 8, 30
SAME = 1e-5


class LiveRuns:
    """Live training on two processes without DeepSpeed: what all others are compared with. Each is run once."""

    def __init__(self, kit: Kit, folder: Path) -> None:
        self._kit, self._folder = kit, folder
        self._runs: dict[tuple[str, int], list[dict[str, float]]] = {}

    def of(self, context: str, steps: int) -> list[dict[str, float]]:
        if (context, steps) not in self._runs:
            self._runs[context, steps] = train(
                self._kit,
                self._folder / f"{context}{steps}",
                "--max_steps",
                steps,
                config=None,
                context=context,
                cached=False,
            )
        return self._runs[context, steps]


@pytest.fixture(scope="module")
def live(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> LiveRuns:
    return LiveRuns(kit, tmp_path_factory.mktemp("live"))


ENGINES = ("zero2.json", "zero2_offload.json", "zero3.json")


@pytest.mark.promise("The same training")
@pytest.mark.parametrize(
    ("config", "context", "steps"),
    [
        ("zero3.json", "causal", STEPS),
        *(
            pytest.param(config, context, LONG, marks=pytest.mark.slow)
            for config, context in itertools.product(ENGINES, ("frame", "causal"))
        ),
    ],
)
def test_training_from_the_cache_is_live_training(
    kit: Kit, tmp_path: Path, live: LiveRuns, config: str, context: str, steps: int
) -> None:
    cached = train(kit, tmp_path, "--max_steps", steps, config=config, context=context)
    assert len(cached) == steps
    assert largest_difference(live.of(context, steps), cached) < SAME
    assert {entry["cache_hit_rate"] for entry in cached} == {1.0}


@pytest.mark.slow
def test_in_bfloat16_losses_agree_to_its_rounding(kit: Kit, tmp_path: Path) -> None:
    """ZeRO-3 with bfloat16 weights: a feature that differs by float32 noise may round to its neighbour."""
    runs = [
        train(
            kit, tmp_path / str(cached), "--max_steps", 30, "--bf16", "True", config="zero3.json", context="causal",
            cached=cached,
        )
        for cached in (True, False)
    ]  # fmt: skip
    difference = largest_difference(*runs)
    print(f"largest relative difference between losses and gradient norms: {difference:.1e}")
    assert difference < 2**-8


@pytest.mark.promise("Never a hang")
def test_a_rank_that_misses_alone_keeps_nobody_waiting(kit: Kit, tmp_path: Path, live: LiveRuns) -> None:
    """ZeRO-3, where any call that one rank makes alone would wait for ever."""
    cache = tmp_path / "cache"
    store_without(kit, cache, missing_for_rank_0(kit))
    flags = ["--vggt_cache_dir", cache, "--vggt_cache_miss", "encode", "--vggt_model_path", kit.vggt]
    found = train(kit, tmp_path / "out", "--max_steps", STEPS, *flags, config="zero3.json", context="causal")
    assert largest_difference(live.of("causal", STEPS), found) < SAME
    rates = [entry["cache_hit_rate"] for entry in found]
    assert 0.5 in rates  # one of two samples of the step
    assert 1.0 in rates


@pytest.mark.slow
def test_ranks_that_fill_a_cache_find_each_others_features_in_the_next_epoch(
    kit: Kit, tmp_path: Path
) -> None:
    filling = ["--vggt_cache_dir", tmp_path / "cache", "--vggt_cache_miss", "fill", "--num_train_epochs", 2]
    found = train(kit, tmp_path / "out", *filling, config=None, cached=False)
    # One sample fewer on a rank's first step of the second epoch would be a rank that did not wait.
    assert [entry["cache_hit_rate"] for entry in found] == [0.0] * 16 + [1.0] * 16


@pytest.mark.slow
def test_ranks_share_a_stage_in_which_each_keeps_what_it_has_read(kit: Kit, tmp_path: Path) -> None:
    """Every rank its own shards, and each finds those of the other when it starts again."""
    flags = ["--num_train_epochs", 1, "--vggt_cache_stage", tmp_path / "local"]
    through = train(kit, tmp_path / "through", *flags, config=None)
    # In the last step nothing is read: that was done in the one before.
    assert {entry["cache_staged_rate"] for entry in through[:-1]} == {0.0}
    (spec,) = list_stores(tmp_path / "local")
    assert len(list(shards_dir(tmp_path / "local", spec).iterdir())) == 2
    staged = train(kit, tmp_path / "staged", *flags, "--seed", 7, config=None)
    assert {entry["cache_staged_rate"] for entry in staged[:-1]} == {1.0}
    again = train(kit, tmp_path / "again", *flags[:2], "--seed", 7, config=None)
    assert largest_difference(staged, again) < SAME


@pytest.mark.promise("Never a hang")
def test_with_error_all_ranks_stop_with_the_same_sentence(kit: Kit, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(kit.data, data)
    flags = kit.flags(
        tmp_path / "out", "--train_data_root", data, "--max_steps", 2000,
        "--deepspeed", ROOT / "scripts" / "zero3.json", "--per_device_train_batch_size", 1, context="causal",
    )  # fmt: skip
    log = tmp_path / "log"
    process = start(flags, log=log)
    while "'loss'" not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.02)
    # Before step 1 everything was there; images that change under a run cannot be known then.
    for number, image in enumerate(sorted(data.glob("ep0/*.png"))):
        write_image(image, 5000 + number)
    assert process.wait(timeout=120) != 0
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[ERROR] ")]
    sentences = {line.removeprefix("[ERROR] ").removeprefix("[rank 1] ") for line in said}
    assert len(said) == 2, said
    assert len(sentences) == 1
    assert "is not in the cache" in sentences.pop()


@pytest.mark.slow
def test_all_ranks_refuse_to_resume_what_was_trained_with_another_context(kit: Kit, tmp_path: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    train(kit, tmp_path / "out", *saving, "--max_steps", 2, config=None)
    more = [*saving, "--max_steps", 4, "--per_device_train_batch_size", 1]
    flags = kit.flags(tmp_path / "out", *more, context="causal")
    log = tmp_path / "log"
    assert start(flags, log=log).wait(timeout=120) != 0
    text = log.read_text(errors="replace")
    said = [line for line in text.splitlines() if line.startswith("[ERROR] ")]
    assert len(said) == 2, text[-3000:]
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert all(f"{checkpoint} was trained with features of context frame" in line for line in said)
    assert set(re.findall(r"exitcode *: *(-?\d+)", text)) == {"2"}
    assert not (tmp_path / "out" / "checkpoint-4").exists()


@pytest.mark.slow
def test_a_killed_run_under_zero_3_goes_on_as_if_it_had_not_been(kit: Kit, tmp_path: Path) -> None:
    # Sixteen steps are an epoch: it goes on in the second one, whose order of samples is another.
    more = ["--save_strategy", "steps", "--save_steps", 18, "--max_steps", 20]
    whole = train(kit, tmp_path / "whole", *more, config="zero3.json")
    flags = kit.flags(
        tmp_path / "killed",
        "--per_device_train_batch_size",
        1,
        "--deepspeed",
        ROOT / "scripts" / "zero3.json",
        *more,
    )
    process = start(flags, log=tmp_path / "first.log")
    wanted = [
        tmp_path / "killed" / "checkpoint-18" / name for name in ("rng_state_1.pth", "trainer_state.json")
    ]
    while not all(path.exists() for path in wanted):
        assert process.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
        time.sleep(0.02)
    _kill_all(process)
    shutil.rmtree(tmp_path / "killed" / "checkpoint-20", ignore_errors=True)
    resumed = train(kit, tmp_path / "killed", *more, config="zero3.json")
    assert "Resuming from" in (tmp_path / "killed" / "log").read_text()
    assert largest_difference(whole, resumed) == 0.0


# ---------------------------------------------------------------- steps


def _kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """The launcher and its ranks, which torchrun starts in sessions of their own."""
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    for process in [psutil.Process(launcher.pid), *ranks]:
        process.kill()
    psutil.wait_procs(ranks, timeout=60)
    launcher.wait()


def missing_for_rank_0(kit: Kit) -> set[str]:
    """The sources of some samples that rank 0 gets, as `order.EpochOrder` deals them out: every other one is its."""
    from janusvln.train.order import EpochOrder

    index = SampleIndex(find_sources(str(kit.data)), on_problem=print)
    dealt = list(EpochOrder(len(index), seed=42))
    return {index[at].source for at in dealt[0 : 2 * STEPS : 4]}


def store_without(kit: Kit, cache_dir: Path, sources: set[str]) -> None:
    """A cache of the whole data set except for these samples."""
    index = SampleIndex(find_sources(str(kit.data)), on_problem=print)
    whole = FeatureCache.open(kit.cache, context="causal", root=kit.data)
    store = cache_dir / whole.spec.short_name
    shutil.copytree(kit.cache / whole.spec.short_name, store)
    for shard in shards_dir(cache_dir, whole.spec).iterdir():
        shard.unlink()
    shutil.rmtree(store / "index", ignore_errors=True)
    with ShardWriter(store, whole.spec) as writer:
        for sample in index:
            if sample.source not in sources:
                key = whole.key_of(sample.frames)
                feature = whole.get_by_key(key)
                assert feature is not None
                writer.append(key, feature)
        writer.commit()
