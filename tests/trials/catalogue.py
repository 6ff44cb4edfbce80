"""All trials, with the counts of a full campaign."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials import (
    damage,
    descriptors,
    full_disk,
    fuzz,
    hostile_annotations,
    hostile_images,
    killed_runs,
    listing_races,
    places,
    power_controls,
    power_loss,
    processes,
    quotas,
    replaced_images,
    signalled,
    simulated,
    soak,
    stopped_runs,
    system_calls,
)
from trials.nfs import over_nfs
from trials.registry import PRECOMPUTE, Trial

EXAMPLES_PER_SEED = 50
NFS = "NFS 4.1, NFS 3"
"""Even seeds, odd seeds."""


def _simulated(run: Callable[[int], Any]) -> Callable[[int, Path], int]:
    def one(seed: int, folder: Path) -> int:
        run(seed)
        return 1

    return one


def _power_loss(model: str) -> Callable[[int, Path], int]:
    return _simulated(lambda seed: simulated.power_loss(seed, model))


def _stateful(seed: int, folder: Path) -> int:
    """Sequences of mishaps that Hypothesis makes from a seed."""
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    machine = importlib.import_module("test_store_stateful").StoreMachine
    settings = hypothesis.settings(
        machine.TestCase.settings, max_examples=EXAMPLES_PER_SEED, derandomize=False, database=None
    )
    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
    return EXAMPLES_PER_SEED


_ALL = (
    Trial(
        name="stateful", count=10_000, run=_stateful, file_system="simulated",
        about="a sequence of up to 8 steps of working clients, kills, power losses, faults, damage, moves and pruning",
    ),
    Trial(
        name="interleaved", count=10_000, run=_simulated(simulated.interleaved), file_system="simulated",
        about="four rounds of several clients interleaved by the seed, with faults, a kill, a power loss, damage",
    ),
    Trial(
        name="power_names", count=1_000, run=_power_loss("names"), file_system="simulated",
        about="power lost twice at some operation of one or two clients; any subset of unsynced names vanishes",
    ),
    Trial(
        name="power_data", count=1_000, run=_power_loss("data"), file_system="simulated",
        about="the same; contents that were not synced are cut, zeroed or mixed",
    ),
    Trial(
        name="power_both", count=1_000, run=_power_loss("both"), file_system="simulated",
        about="the same; names and contents",
    ),
    Trial(
        name="fuse_power_names", count=1_000, run=power_loss.fuse_power_names, file_system="FUSE",
        about="power lost at some request of one or two processes to the kernel; any subset of unsynced names vanishes",
    ),
    Trial(
        name="fuse_power_data", count=1_000, run=power_loss.fuse_power_data, file_system="FUSE",
        about="the same; contents that were not synced are cut, zeroed or mixed",
    ),
    Trial(
        name="fuse_controls", count=40, run=power_controls.fuse_controls, file_system="FUSE",
        about="the same with one step of the commit left out or misplaced: found out within 200 losses of power",
    ),
    Trial(
        name="sigkill", count=10_000, run=processes.kill_writers,
        about="a writer killed at a random time, beside another one and at times a pruner",
    ),
    Trial(
        name="operations", count=340, run=system_calls.kill_at_every_operation,
        about="SIGKILL before or after one operation of a commit; each of them 10 times",
    ),
    Trial(
        name="system_calls", count=200, run=system_calls.kill_at_every_system_call,
        about="SIGKILL as the kernel enters one system call of a commit (strace); each of them 10 times",
    ),
    Trial(
        name="full_tmpfs", count=160, run=full_disk.full_tmpfs, file_system="tmpfs",
        about="a tmpfs that is filled up by commits; one page larger in each trial",
    ),
    Trial(
        name="full_ext4", count=50, run=full_disk.full_ext4, file_system="ext4 in a file",
        about="an ext4 of 1 MiB that is filled up by commits",
    ),
    Trial(
        name="quota_btrfs", count=64, run=quotas.quota_btrfs, file_system="btrfs in a file",
        about="commits until the quota of a subvolume is used up; one page more of it in each trial",
    ),
    Trial(
        name="quota_ext4", count=160, run=quotas.quota_ext4, file_system="ext4 in a file",
        about="commits until another user's quota of space, or of files, is used up; a little more of it in each trial",
    ),
    Trial(
        name="every_bit", count=76_322, run=damage.every_bit_and_length,
        about="one bit of a small shard flipped, or the shard cut; every bit and every length, without and with index",
    ),
    Trial(
        name="random_damage", count=100_000, run=damage.random_damage,
        about="a part of a small shard zeroed, overwritten, misplaced, exchanged, cut or lengthened",
    ),
    Trial(
        name="hostile_headers", count=1_000_000, file_system="memory", run=damage.hostile_headers,
        about="a shard's header and a spec.json with parts replaced, dropped, moved or renamed at any depth",
    ),
    Trial(
        name="racing_writers", count=1_000, run=processes.race,
        about="2 to 16 writers of the same keys start at once beside two readers; flock says yes to everybody",
    ),
    Trial(
        name="listing_races", count=2_000, run=listing_races.listed_while_replaced,
        about="a store opened or refreshed, its directory read in pieces, while its shards are pruned and converted",
    ),
    Trial(
        name="forked_readers", count=1_000_000, run=processes.read_forked,
        about="a read, compared bit by bit, in one of 4 to 16 processes forked from one that has the cache open",
    ),
    Trial(
        name="spawned_readers", count=1_000_000, run=processes.read_spawned,
        about="a read, compared bit by bit, in one of 4 processes started with spawn",
    ),
    Trial(
        name="nfs_commits", count=2_000, run=over_nfs("commits"), file_system=NFS,
        about="a commit of one of two clients that commit at once; found by both, every refresh checked bit by bit",
    ),
    Trial(
        name="nfs_listings", count=20_000, run=over_nfs("listings"), file_system=NFS,
        about="a store opened or refreshed by one client while another commits, prunes and converts its shards",
    ),
    Trial(
        name="nfs_damage", count=200, run=over_nfs("damage"), file_system=NFS,
        about="a bit of a shard flipped on the server; two clients read all records, from memory and anew",
    ),
    Trial(
        name="nfs_restarts", count=16, run=over_nfs("restarts"), file_system=NFS,
        about="the server killed and started again, within its grace period or not, while both clients commit and read",
    ),
    Trial(
        name="nfs_runs", count=24, exercises=PRECOMPUTE, run=over_nfs("runs"), file_system=NFS,
        about="a run of precompute shared by two clients, one killed or its machine off; keys and bits of a single run",
    ),
    Trial(
        name="nfs_outages", count=4, exercises=PRECOMPUTE, run=over_nfs("outages"), file_system=NFS,
        about="the same; one client cannot reach the server for a minute, longer than its lease and its claims last",
    ),
    Trial(
        name="killed_runs", count=200, exercises=PRECOMPUTE, run=killed_runs.killed_runs,
        about="a whole run of precompute killed 1 to 3 times, then run to the end; features compared bit by bit",
    ),
    Trial(
        name="signals", count=1_000, exercises=PRECOMPUTE, run=signalled.signals,
        about="a run or a writer gets SIGINT or SIGTERM, half of them again a moment later, or too little memory",
    ),
    Trial(
        name="stopped_runs", count=200, exercises=PRECOMPUTE, run=stopped_runs.stopped_runs,
        about="two or three runs at once, all but one of them stopped for a while, clocks wrong by up to a day",
    ),
    Trial(
        name="replaced_images", count=1_000, exercises=PRECOMPUTE, run=replaced_images.replaced_images,
        about="images rewritten in place, exchanged, renamed, torn, before, while and after precompute reads them",
    ),
    Trial(
        name="hostile_images", count=100_000, exercises=("errors.py", "frames.py"), run=hostile_images.hostile_images,
        about="a PNG, JPEG, WebP, BMP or GIF: parts changed, repeated, moved, spliced, enlarged, cut, or bombs put in",
    ),
    Trial(
        name="hostile_annotations", count=100_000, exercises=("errors.py", "samples"),
        run=hostile_annotations.hostile_annotations,
        about="an annotation file or episode folder with fields, names, nesting or bytes changed; read by both readers",
    ),
    Trial(
        name="fuzz", count=1_000_000, file_system="memory", run=fuzz.fuzzed_headers,
        about="a shard's header that atheris makes, led by the coverage of the parser",
    ),
    Trial(
        name="descriptors", count=1, run=descriptors.descriptors,
        about="5,000 shards read by 4 threads with 64 descriptors, without and with index; no file is mapped",
    ),
    Trial(
        name="places", count=len(places.CASES), run=places.placed,
        about="one of the places and things in places: moved, linked, read-only, closed to this user, pipes, `..`",
    ),
    Trial(
        name="soak", count=1_152_000, run=soak.soak,
        about="a read, compared bit by bit, in one of 8 processes that commit too; a seed: 4 hours of 8 GPUs",
    ),
)  # fmt: skip

TRIALS = {trial.name: trial for trial in _ALL}
