"""Everything that must be so in a world at rest, as new clients without faults see it."""

from __future__ import annotations

from store_kit import SPEC, make_key
from trials.oracle import KEYS, NUMBERS, is_known
from trials.world import World, seeded_names
from vggt_cache.errors import CorruptRecordError
from vggt_cache.precompute.verify import verify_records
from vggt_cache.store import FeatureCache
from vggt_cache.store.tensors import bytes_of


def check(world: World) -> None:
    """Let all changes reach everybody; then files, readers with and without index, `verify` and the index agree."""
    world.disk.pass_time()
    world.oracle.check_files()
    with seeded_names(world.random):
        for use_index in (True, False):
            _check_reader(world, use_index)
        _check_index(world)


def _check_reader(world: World, use_index: bool) -> None:
    client = world.client()
    served, broken = world.oracle.served()
    io = "direct" if use_index else "buffered"
    with FeatureCache.open(world.oracle.cache_dir, spec=SPEC, fs=client, use_index=use_index, io=io) as cache:
        if not use_index:
            assert sorted(name for name, _ in cache.damaged_shards) == broken
            _check_verify(cache, {make_key(n).hex() for n, (_, value) in served.items() if value is None})
        if not use_index or not broken:  # an index may still know what a broken header hides
            assert [KEYS[key] for key in cache] == sorted(served, key=make_key)
            for number, (name, value) in served.items():
                _check_answer(cache, number, name, value, use_index)
        for number in NUMBERS:
            world.get(cache, client, number, expected=False)
    world.check_descriptors(client)


def _check_answer(cache: FeatureCache, number: int, name: str, value: bytes | None, use_index: bool) -> None:
    assert cache.shard_of(make_key(number)) == name, f"number {number} is not served from {name}"
    try:
        feature = cache.get_by_key(make_key(number))
    except CorruptRecordError:
        assert value is None, f"number {number} in {name} is reported as damaged, and is not"
        return
    assert feature is not None
    # Where only the checksum in the header is damaged, an index may still know the right one.
    right = is_known(number, feature) if value is None and use_index else bytes(bytes_of(feature)) == value
    assert right, f"number {number} is not what {name} holds"


def _check_verify(cache: FeatureCache, damaged: set[str]) -> None:
    """`verify` reports exactly the damaged records that are served, and the broken shards."""
    reported = {label for label, reason in verify_records(cache, threads=1) if reason}
    assert reported == damaged | {name for name, _ in cache.damaged_shards}


def _check_index(world: World) -> None:
    """An index that is saved, and one that is made anew from the shards, are the same bytes."""
    client = world.client()
    with FeatureCache.open(world.oracle.cache_dir, spec=SPEC, fs=client) as cache:
        assert cache.save_index()
        covered = cache.shard_names()
    saved = world.disk.contents(world.oracle.index_path)
    if world.damaged:
        return  # an older index may cover a shard whose header was broken since
    world.damage_index(0, "drop")
    with FeatureCache.open(world.oracle.cache_dir, spec=SPEC, fs=client) as cache:
        assert cache.shard_names() == covered
        assert cache.save_index()
    assert world.disk.contents(world.oracle.index_path) == saved
    world.check_descriptors(client)
