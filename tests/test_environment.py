"""Numbers that come from the environment: units are understood, and nonsense is one sentence when it is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vggt_cache.environment import rank_of, seconds_of, size_of
from vggt_cache.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("268435456", 256 << 20),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        (" 256 MiB ", 256 << 20),
        ("256MB", 256_000_000),
        ("64K", 64 << 10),
        ("0.5G", 1 << 29),
        ("1T", 1 << 40),
        ("512B", 512),
        ("", 7),
        (" ", 7),
    ],
)
def test_a_size_may_have_a_unit(text: str, size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", text)
    assert size_of("SIZE", 7) == size_bytes


def test_what_is_not_set_has_its_default() -> None:
    assert (size_of("UNSET", 7), seconds_of("UNSET", 2.5), rank_of("UNSET", 3)) == (7, 2.5, 3)


@pytest.mark.parametrize(
    "text", ["0", "-1", "0.1", "M", "256X", "256 M B", "1e9", "nan", "0x10", "٣", "1_000", "9" * 400]
)
def test_a_size_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", text)
    with pytest.raises(SettingsError, match=r"the environment's SIZE is .*, which is not a size: give bytes"):
        size_of("SIZE", 7)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "a minute"])
def test_seconds_that_are_none_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", text)
    with pytest.raises(
        SettingsError, match=r"the environment's PAUSE is .*, which is not a number of seconds: "
    ):
        seconds_of("PAUSE", 7)


@pytest.mark.parametrize("text", ["-1", "1.5", "one", "²", "9" * 5000])
def test_a_rank_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", text)
    with pytest.raises(SettingsError, match=r"the environment's RANK is .*, which is not a whole number: "):
        rank_of("RANK", 0)


def test_nothing_is_read_at_import() -> None:
    names = ["VGGT_CACHE_SHARD_BYTES", "VGGT_CACHE_CLAIM_TTL_S", "RANK", "WORLD_SIZE", "LOCAL_RANK"]
    modules = "vggt_cache.cli, vggt_cache.precompute.run, vggt_cache.precompute.write"
    environment = os.environ | dict.fromkeys(names, "nonsense")
    subprocess.run([sys.executable, "-c", f"import {modules}"], env=environment, check=True)
