"""From the lines of a log to what is known of its run, and to what deserves attention."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from monitor_kit import BANNER, ENDED, ORIGINAL_TRAINER, TOTAL, bar, metrics, told, training_log
from vggt_cache.errors import SettingsError
from vggt_cache.monitor import MonitorSettings
from vggt_cache.monitor.progress import Progress, alarms_of, stall_threshold_s
from vggt_cache.monitor.render import plain_line
from vggt_cache.monitor.state import TrainingState

SETTINGS = MonitorSettings(logs=("train.log",))


def kinds(progress: Progress, now_s: float = 1000.0, **settings: float) -> list[str]:
    return [alarm.kind for alarm in alarms_of(progress, replace(SETTINGS, **settings), now_s)]


# ---------------------------------------------------------------- speed


def test_speed_is_measured_between_the_states_of_the_bar() -> None:
    known = told(training_log(150))
    assert (known.step, known.total) == (150, TOTAL)
    assert known.s_per_it == pytest.approx(18.5, rel=0.01)
    assert known.s_per_it_overall == pytest.approx(18.5, rel=0.01)
    assert known.steps_per_s == pytest.approx(1 / 18.5, rel=0.01)
    assert known.left_s == pytest.approx((TOTAL - 150) * 18.5, rel=0.01)


def test_after_a_resume_the_steps_before_it_do_not_count() -> None:
    """tqdm says 50 it/s here, because the bar went from 0 to 1001 in its first moment."""
    known = told(training_log(40, first=1000))
    assert known.step == 1040
    assert known.s_per_it_overall == pytest.approx(18.5, rel=0.01)
    assert known.s_per_it == pytest.approx(18.5, rel=0.01)


def test_right_after_a_resume_no_speed_is_better_than_a_wrong_one() -> None:
    known = told(bar(0, 0), bar(1001, 20, rate="50.05it/s"))
    assert (known.step, known.s_per_it, known.s_per_it_overall, known.left_s) == (1001, None, None, None)


def test_a_bar_that_begins_at_the_resumed_step_is_understood_too() -> None:
    known = told(*(bar(1000 + n, 10 * n) for n in range(30)))
    assert known.s_per_it_overall == pytest.approx(10)


def test_a_run_appended_to_the_log_of_another_begins_anew() -> None:
    known = told(training_log(500, s_per_it=80), training_log(60, first=400, s_per_it=15))
    assert known.step == 460
    assert known.s_per_it_overall == pytest.approx(15, rel=0.01)


def test_the_recent_speed_follows_a_change_that_the_overall_one_spreads() -> None:
    slow = [bar(n, 80 * n) for n in range(1, 101)]
    quick = [bar(100 + n, 8000 + 16 * n) for n in range(1, 31)]
    known = told(*slow, *quick)
    assert known.s_per_it == pytest.approx(16)
    assert known.s_per_it_overall == pytest.approx((80 * 99 + 16 * 30) / 129)


def test_quick_steps_are_measured_over_many_of_them() -> None:
    """Whole seconds over twenty steps of 50 ms would be off by half."""
    known = told(*(bar(n, n * 0.05, rate="20.0it/s") for n in range(1, 1400, 2)))
    assert known.s_per_it == pytest.approx(0.05, rel=0.04)


def test_bars_of_several_ranks_do_not_disturb_each_other() -> None:
    both = [bar(n, 20 * n) + bar(n, 20 * n - 1) + (bar(n - 1, 20 * n) if n > 1 else "") for n in range(1, 60)]
    known = told(*both)
    assert known.step == 59
    assert known.s_per_it_overall == pytest.approx(20, rel=0.02)


# ---------------------------------------------------------------- which bar


def test_an_evaluation_in_between_is_not_taken_for_training() -> None:
    evaluation = "".join(bar(n, 10 * n, total=500) for n in range(501))
    during = told(training_log(40), evaluation)
    assert (during.step, during.total) == (40, TOTAL)
    after = told(training_log(40), evaluation, "{'eval_loss': 0.3, 'epoch': 1.0}\n", bar(41, 6000))
    assert (after.step, after.total) == (41, TOTAL)


def test_lines_that_come_late_because_of_a_buffer_do_not_make_an_evaluation_the_training() -> None:
    """The trainer's lines go to stdout, which is written in portions where it is no terminal."""
    bars = [bar(n, 20 * n) for n in range(1, 41)]
    evaluation = "".join(bar(n, n, total=500) for n in range(20))
    known = told(
        *bars, metrics(loss=1.0), bar(41, 820), evaluation, metrics(loss=1.0) * 3, bar(20, 20, total=500)
    )
    assert (known.step, known.total) == (41, TOTAL)


def test_a_bar_that_was_over_before_training_is_not_taken_for_it() -> None:
    reading = "".join(bar(n, 100 * n, total=5) for n in range(6))
    assert told(reading, bar(0, 0), bar(1, 18)).total == TOTAL
    assert told(reading, training_log(40)).total == TOTAL


def test_the_announced_total_decides_where_there_is_one() -> None:
    longer = bar(3, 90000, total=77)
    assert told(BANNER, longer, bar(0, 0), bar(1, 18)).total == TOTAL


def test_a_run_of_another_length_takes_over() -> None:
    known = told(training_log(40), training_log(40, total=100, s_per_it=5))
    assert (known.step, known.total) == (40, 100)
    known = told(BANNER, training_log(40), training_log(40, total=100, s_per_it=5))
    assert (known.step, known.total) == (40, 100)


def test_endless_new_totals_take_no_memory() -> None:
    state = TrainingState()
    for total in range(1, 2000):
        state.read(bar(1, 5, total=total).encode(), 0.0)
    assert len(state._tracks) <= 16


# ---------------------------------------------------------------- what lines say


def test_the_metrics_of_our_trainer_are_shown() -> None:
    values = {"cache_hit_rate": 0.998, "cache_wait_ms": 1.2, "cache_read_mb_per_s": 900.0, "encode_ms": 30.0}
    known = told(training_log(20, **values, samples_per_s=3.4, slowest_rank=5, slowest_rank_s=18.9))
    for name, value in values.items():
        assert getattr(known, name) == pytest.approx(value)
    assert (known.loss, known.grad_norm, known.learning_rate) == (0.1, 1.5, 2e-5)
    assert (known.samples_per_s, known.slowest_rank, known.slowest_rank_s) == (3.4, 5, 18.9)


def test_the_cache_lines_are_shown() -> None:
    known = told(
        "[INFO] VGGT feature cache enabled: /data/cache\n"
        "[INFO] Coverage of this data set: 9/10 images are in the cache (90.0 %), 1 are not\n"
    )
    assert (known.cache_dir, known.coverage) == ("/data/cache", (9, 10))


def test_samples_per_second_follow_from_the_announced_batch() -> None:
    known = told(BANNER, training_log(40))
    assert known.samples_per_s == pytest.approx(64 / 18.5, rel=0.01)


def test_the_trainers_own_count_of_samples_goes_before_what_was_announced() -> None:
    """Announced is a full batch; the trainer has counted."""
    assert told(BANNER, training_log(40, samples_per_s=3.2)).samples_per_s == 3.2


def test_no_cache_is_not_a_hit_rate_of_0_and_what_an_earlier_run_had_is_over() -> None:
    cached = "[INFO] VGGT feature cache enabled: /data/cache\n[INFO] Coverage of this data set: 9/10 images\n"
    live = "[INFO] No feature cache: VGGT runs in every step; causal-644\n"
    known = told(cached, training_log(10, cache_hit_rate=1.0), live, training_log(10, encode_ms=900.0))
    assert (known.no_cache, known.cache_dir, known.coverage) == ("VGGT runs in every step", None, None)
    assert (known.cache_hit_rate, known.cache_wait_ms, known.encode_ms) == (None, None, 900.0)
    assert "No cache: VGGT runs in every step" in plain_line(known)
    assert "Hit rate" not in plain_line(known)
    known = told(live, cached)
    assert (known.no_cache, known.cache_dir, known.coverage) == (None, "/data/cache", (9, 10))


def test_the_original_trainers_log_is_understood() -> None:
    known = told(ORIGINAL_TRAINER)
    assert (known.cache_hit_rate, known.cache_wait_ms, known.encode_ms, known.slowest_rank) == (None,) * 4
    assert (known.cache_dir, known.no_cache, known.coverage) == (None,) * 3
    assert known.left_s == pytest.approx(78 * (TOTAL - 30))
    assert (known.step, known.total) == (30, TOTAL)
    assert known.s_per_it == pytest.approx(78)
    assert known.loss == pytest.approx(1.6)
    assert known.samples_per_s == pytest.approx(64 / 78)
    assert known.failure is None


def test_deepspeeds_speed_is_taken_where_no_batch_is_announced() -> None:
    log = ORIGINAL_TRAINER.replace("train_batch_size", "something_else")
    assert told(log).samples_per_s == pytest.approx(0.8219)


# ---------------------------------------------------------------- the end


def test_an_ended_run_is_known_as_such_and_is_no_stall() -> None:
    known = told(training_log(40, total=40), ENDED)
    assert (known.ended, known.train_runtime_s, known.train_loss, known.left_s) == (True, 123.4, 0.25, 0.0)
    assert kinds(known, now_s=1e9) == []


def test_the_bar_drawn_once_more_after_the_last_line_does_not_undo_the_end() -> None:
    assert told(training_log(40, total=40), ENDED, bar(40, 800, total=40)).ended


def test_a_run_that_goes_on_after_an_end_is_running() -> None:
    known = told(training_log(40, total=40), ENDED, training_log(3, total=40))
    assert not known.ended
    assert known.loss is None


def test_the_end_of_an_earlier_run_is_forgotten_even_if_the_new_beginning_was_not_read() -> None:
    """Of a large log not everything is read."""
    assert not told(training_log(40), ENDED, bar(5000, 90000)).ended


# ---------------------------------------------------------------- alarms


def test_a_run_without_steps_is_a_stall_after_five_times_its_usual_step() -> None:
    known = told(training_log(40, s_per_it=78), at_s=1000.0)
    threshold_s = stall_threshold_s(known, SETTINGS)
    assert threshold_s == pytest.approx(5 * 78, rel=0.01)
    assert kinds(known, now_s=1000 + threshold_s) == []
    assert kinds(known, now_s=1001 + threshold_s) == ["stall"]


def test_quick_runs_are_given_two_minutes_and_the_flag_decides() -> None:
    known = told(*(bar(n, n) for n in range(1, 60)))
    assert kinds(known, now_s=1119.0) == []
    assert kinds(known, now_s=1121.0) == ["stall"]
    assert kinds(known, now_s=1119.0, stall_s=30.0) == ["stall"]


def test_an_evaluation_that_goes_on_is_no_stall() -> None:
    state = TrainingState()
    for text, at_s in [(training_log(20), 0.0), *((bar(n, 60 * n, total=500), 60.0 * n) for n in range(100))]:
        for piece in text.split("\r"):
            state.read(piece.encode(), at_s)
    assert kinds(state.progress(), now_s=99 * 60 + 10) == []
    assert kinds(state.progress(), now_s=99 * 60 + 200) == ["stall"]


def test_a_falling_hit_rate_is_an_alarm_and_a_rising_one_is_not() -> None:
    lines = [metrics(loss=1.0, cache_hit_rate=rate) for rate in (1, 1, 1, 1, 0.9, 0.8, 0.8)]
    known = told(bar(1, 10), *lines)
    assert known.cache_hit_rate_best == 1
    assert known.cache_hit_rate_recent == pytest.approx(2.5 / 3)
    assert kinds(known) == ["hit_rate"]
    assert kinds(known, hit_rate_drop=0.5) == []
    assert kinds(told(bar(1, 10), *reversed(lines))) == []


def test_the_hit_rate_of_an_earlier_run_does_not_count() -> None:
    known = told(training_log(40, cache_hit_rate=1.0), training_log(40, cache_hit_rate=0.2))
    assert kinds(known) == []


@pytest.mark.parametrize("version", [4, 5])
def test_a_loss_that_is_no_number_is_an_alarm(version: int) -> None:
    known = told(training_log(30), metrics(version, loss=math.nan, grad_norm=math.inf, learning_rate=1e-5))
    assert kinds(known) == ["not_finite", "not_finite"]
    loss, norm = known.not_finite
    assert (loss.name, loss.now, loss.step, loss.lines) == ("loss", True, 30, 1)
    assert math.isinf(norm.value)
    later = told(
        training_log(30),
        metrics(version, loss=1.0, grad_norm=math.inf),
        bar(31, 600),
        metrics(loss=1.0, grad_norm=1.0),
    )
    (alarm,) = alarms_of(later, SETTINGS, 1000.0)
    assert "grad_norm was inf in 1 line of those read, last near step 30, and is finite again" in alarm.text


def test_the_first_error_since_the_last_step_is_an_alarm() -> None:
    errors = "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\ntorch.x.ChildFailedError: \n"
    known = told(training_log(30), errors)
    assert known.failure == "torch.OutOfMemoryError: CUDA out of memory."
    assert kinds(known) == ["failure"]
    assert told(training_log(30), errors, bar(31, 700)).failure is None


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong",
    [{"interval": 0}, {"stall_s": -1}, {"hit_rate_drop": 0}, {"hit_rate_drop": 5}, {"samples_per_step": 0}],
)
def test_impossible_settings_are_refused_in_one_sentence(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=f"--{next(iter(wrong))} .*(give|such as)"):
        MonitorSettings(logs=("x",), **wrong)
