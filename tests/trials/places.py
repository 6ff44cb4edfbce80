"""Trials of where a cache may lie and what may lie in it: each is a test of the default run, in a folder of one's own.

A campaign on another file system (`--folder`) runs them there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import test_samples_reader
import test_security
import test_store_damage as damage
import test_store_places as places
from store_kit import SPEC
from trials.registry import Unavailable

Case = Callable[[Path], None]
KINDS = ("symbolic link", "dangling link", "FIFO", "directory", "device")


def _filled(test: Callable[[Path, Path], None], *, indexed: bool) -> Case:
    return lambda folder: test(places.fill(folder / "cache", indexed=indexed), folder)


def _as_another_user(closed: str) -> Case:
    def case(folder: Path) -> None:
        if os.getuid() != 0:
            raise Unavailable("only root can become another user")
        places.test_another_user_without_permission_is_told_so(closed)

    return case


def _read_only(folder: Path, *, indexed: bool) -> None:
    cache_dir = places.fill(folder / "cache", indexed=indexed)
    with places.read_only_mount(cache_dir, folder / "read-only") as place:
        places.test_a_read_only_mount_gives_the_same_answers_and_refuses_writers_in_one_sentence(place)


def _not_plain(kind: str) -> Case:
    return lambda folder: damage.test_what_is_not_a_plain_file_is_not_opened_as_a_shard_and_blocks_nobody(
        folder, kind
    )


CASES: dict[str, Case] = {
    **{
        f"{name}, {how}": _filled(test, indexed=how == "with index")
        for how in ("with index", "without index")
        for name, test in (
            ("moved, copied, linked", places.test_moved_copied_and_linked_directories_give_the_same_answers),
            ("moved while open", places.test_an_open_cache_goes_on_when_its_directory_is_moved),
            (
                "on another disk by a link",
                places.test_a_store_folder_that_is_a_link_to_another_disk_is_followed,
            ),
        )
    },
    "without empty folders": places.test_a_cache_without_the_empty_folders_that_a_copy_may_lose_is_an_empty_cache,
    "no cache, a loop of links": places.test_what_is_no_cache_is_refused_and_the_reason_given,
    "shards behind a link": test_security.test_a_folder_of_shards_that_is_a_link_is_not_followed,
    "index behind a link": test_security.test_a_folder_of_the_index_that_is_a_link_is_not_written_through,
    "foreign names": damage.test_files_of_other_names_are_not_looked_at,
    "`..` in the index": places.test_an_index_that_names_a_file_outside_of_the_store_leads_nowhere,
    "`..` in annotations": test_samples_reader.test_a_data_path_that_goes_up_leads_where_the_system_says,
    "spec.json is hostile, or a FIFO": places.test_a_hostile_spec_json_is_refused,
    **{f"a shard is a {kind}": _not_plain(kind) for kind in KINDS},
    **{
        f"another user, closed: {closed or 'cache'}": _as_another_user(closed)
        for closed in ("", SPEC.short_name, f"{SPEC.short_name}/shards")
    },
    "read-only mount, with index": partial(_read_only, indexed=True),
    "read-only mount, without index": partial(_read_only, indexed=False),
}


def placed(seed: int, folder: Path) -> int:
    """One case of the table."""
    name = list(CASES)[seed % len(CASES)]
    try:
        CASES[name](folder)
    except pytest.skip.Exception as reason:
        raise Unavailable(f"{name}: {reason}") from reason
    return 1
