"""What the shapes of lines in a training log say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janusvln.features.coverage import Coverage
from monitor_kit import BANNER, ENDED, bar, metrics
from vggt_cache.context import CONTEXTS
from vggt_cache.monitor.parse import Announced, Bar, Ended, Failure, Metrics, bars_in, events_in


def events(text: str | bytes) -> list[object]:
    return list(events_in(text if isinstance(text, bytes) else text.encode()))


@pytest.mark.parametrize(
    ("text", "step", "total", "elapsed_s"),
    [
        ("  1%|          | 150/28710 [46:15<147:12:00, 18.55s/it]", 150, 28710, 46 * 60 + 15),
        (" 50%|█████     | 20/40 [00:00<00:00, 40.74it/s]", 20, 40, 0),
        ("  0%|          | 0/28710 [00:00<?, ?it/s]", 0, 28710, 0),
        (" 99%|█████████▉| 28500/28710 [147:12:09<1:02:03, 18.55s/it]", 28500, 28710, 147 * 3600 + 12 * 60 + 9),
        ("  7%|▋ | 70/1000 [1 day, 2:03:04<2 days, 1:00:00, 1339.77s/it]", 70, 1000, 86400 + 2 * 3600 + 184),
        ("  7%|▋ | 70/1000 [2d 02:03:04<?, 9.1s/it]", 70, 1000, 2 * 86400 + 2 * 3600 + 184),
        ("  1% 150/28710 [46:15<147:12:00, 18.55s/it]", 150, 28710, 2775),
        ("  1%|#         | 150/28710 [46:15<147:12:00, 18.55s/it, loss=0.3]", 150, 28710, 2775),
        ("\x1b[A\x1b[2K  1%|          | 150/28710 [46:15<147:12:00, 18.55s/it]\x1b[A", 150, 28710, 2775),
        ("[default0]:  1%|          | 150/28710 [46:15<147:12:00, 18.55s/it]", 150, 28710, 2775),
        ("0:   1%|          | 150/28710 [46:15<147:12:00, 18.55s/it]", 150, 28710, 2775),
        ("  1%|    | 150/28710 [46:15<147:12:00, 18.55s/it][rank3] UserWarning: x", 150, 28710, 2775),
    ],
)  # fmt: skip
def test_a_training_bar_is_read(text: str, step: int, total: int, elapsed_s: int) -> None:
    assert events(text) == [Bar(step=step, total=total, elapsed_s=elapsed_s)]


@pytest.mark.parametrize(
    "text",
    [
        "Loading checkpoint shards:  50%|█████     | 2/4 [00:03<00:03,  1.52s/it]",
        "Processing: 100%|██████████| 224/224 [00:20<00:00, 10.9it/s]",
        "Processing (rank 0):  10%|█         | 22/224 [00:20<00:00, 10.9it/s]",
        "model.safetensors:  10%|█         | 105M/1.05G [00:02<00:20, 46.1MB/s]",
        "[default0]:Loading checkpoint shards:  50%|█████     | 2/4 [00:03<00:03,  1.52s/it]",
        "  1%|          | 150/28710 [46:15<147:12:00, 18.5",  # torn
        "150/28710 steps done, 18.55s/it",
    ],
)
def test_other_bars_and_torn_ones_are_none(text: str) -> None:
    assert events(text) == []


def test_a_line_of_metrics_may_follow_a_bar_without_a_line_end() -> None:
    text = bar(150, 2775).strip() + metrics(loss=0.5, grad_norm=1.5)
    found = events(text)
    assert Bar(step=150, total=28710, elapsed_s=2775) in found
    assert Metrics(values={"loss": 0.5, "grad_norm": 1.5}) in found


@pytest.mark.parametrize("version", [4, 5])
def test_metrics_of_both_transformers_versions_are_numbers(version: int) -> None:
    (found,) = events(
        metrics(version, loss=0.1234, learning_rate=2e-05, cache_hit_rate=0.998, slowest_rank=3)
    )
    assert found == Metrics(
        values={"loss": 0.1234, "learning_rate": 2e-05, "cache_hit_rate": 0.998, "slowest_rank": 3}
    )


@pytest.mark.parametrize(
    "text",
    [
        "{'loss': nan, 'grad_norm': inf}", "{'loss': 'nan', 'grad_norm': 'inf'}",
        "{'loss': NaN, 'grad_norm': -Infinity}", "{'loss': np.float64(nan), 'grad_norm': tensor(inf)}",
    ],
)  # fmt: skip
def test_nan_and_infinity_are_read(text: str) -> None:
    (found,) = events(text)
    assert isinstance(found, Metrics)
    assert math.isnan(found.values["loss"])
    assert math.isinf(found.values["grad_norm"])


def test_values_are_never_evaluated(tmp_path) -> None:
    target = tmp_path / "made"
    found = events(f"{{'loss': open({str(target)!r}, 'w'), 'grad_norm': 1.5}}")
    assert found == [Metrics(values={"grad_norm": 1.5})]
    assert not target.exists()


def test_an_evaluation_is_no_training_loss() -> None:
    assert events("{'eval_loss': 0.9, 'eval_runtime': 12.0, 'epoch': 1.0}") == []


def test_the_last_line_ends_the_run() -> None:
    assert events(ENDED) == [Ended(runtime_s=123.4, train_loss=0.25)]


def test_the_announcement_gives_total_and_batch() -> None:
    found = [event for line in BANNER.splitlines() for event in events(line)]
    assert found == [Announced(samples_per_step=64), Announced(total_steps=28710)]
    assert events(
        "[2026-01-01 00:00:00,1] [INFO] [config.py:1003:print]   train_batch_size ............. 64"
    ) == [Announced(samples_per_step=64)]
    assert events("  Total batch size = 64") == [Announced(samples_per_step=64)]


def test_our_own_lines_about_the_cache() -> None:
    assert events("[INFO] No feature cache: VGGT runs in every step; causal-644-l-1-1234abcd") == [
        Announced(no_cache="VGGT runs in every step")
    ]
    assert events("[INFO] VGGT feature cache enabled: /data/my cache") == [
        Announced(cache_dir="/data/my cache")
    ]


@pytest.mark.parametrize("noun", [rule.noun for rule in CONTEXTS.values()])
def test_the_sentence_of_the_trainer_about_coverage_is_understood(noun: str) -> None:
    sentence = Coverage(total=612000, present=600000, unknown=7).sentence(noun)
    assert events(f"[INFO] {sentence}") == [Announced(coverage=(600000, 612000))]


@pytest.mark.parametrize(
    "line",
    [
        "Total optimization steps = {}",
        "Total train batch size = {}",
        "[INFO] Coverage of this data set: {}/{} features",
        "RunningAvgSamplesPerSec={}",
        "RunningAvgSamplesPerSec=1.2.{}",
        "  1%|    | {}/{} [00:01<00:01, 18.55s/it]",
        "  1%|    | 1/2 [{}:01<00:01, 18.55s/it]",
        "{{'loss': {}}}",
    ],
)
def test_numbers_without_end_are_no_fault(line: str) -> None:
    for digits in ("9" * 300, "9" * 5000):
        events(line.format(digits, digits))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "[rank3]: torch.OutOfMemoryError: CUDA out of memory.",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("[ERROR] the cache lacks sample 3", "the cache lacks sample 3"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_an_error_is_seen(line: str, text: str) -> None:
    assert events(line) == [Failure(text=text)]


@pytest.mark.parametrize(
    "line", ["no Error here", "  raise ValueError: x is indented code", "UserWarning: x"]
)
def test_text_about_errors_is_none(line: str) -> None:
    assert not [event for event in events(line) if isinstance(event, Failure)]


@given(st.binary(max_size=400))
def test_no_bytes_are_too_strange(noise: bytes) -> None:
    whole = bar(150, 2775).strip().encode()
    list(events_in(noise))
    assert list(bars_in(noise.replace(b":", b"") + b"\x1b[A" + whole))[-1:] == [
        Bar(step=150, total=28710, elapsed_s=2775)
    ]


def test_a_long_line_takes_no_quadratic_time() -> None:
    """Would take minutes if a pattern went back to the beginning at each place."""
    for unit in (b"{'", b"1%| ", b"1/", b"'a': ", b"Error", b"1%| 1/1 [0:0:"):
        list(events_in(unit * (65536 // len(unit)) + b"s/it{'{'"))
