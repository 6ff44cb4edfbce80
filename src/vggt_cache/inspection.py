"""The commands that look at a cache or keep it in order: `info`, `verify`, `view`, `prune`, `convert`.

What needs torch is imported where it is used: `info` takes no longer than reading the directory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from vggt_cache.call_spec import CallSpec
from vggt_cache.errors import FrameError, NotACacheError, SettingsError, SpecMismatchError
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.identity import PATCH_SIZE, FeatureSpec
from vggt_cache.picture import Row, draw_features, picture_format
from vggt_cache.place import absolute, require_local
from vggt_cache.precompute.plan import plan_and_tell
from vggt_cache.precompute.report import (
    EXIT_INVALID,
    EXIT_OK,
    FAILURES_FILE,
    Reporter,
    bytes_text,
    count_of,
    print_first,
    standing_failures,
)
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.store import convert, describe, prune, remove_store
from vggt_cache.store.directory import select_store
from vggt_cache.store.inventory import CacheDescription, StoreDescription

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


def show_info(cache_dir: str, *, as_json: bool) -> int:
    """What the directory holds, one paragraph per specification, of features or of a module's outputs."""
    found = _described(cache_dir)
    if as_json:
        stores = [{**asdict(store), "fingerprint": store.spec.fingerprint} for store in found.stores]
        print(json.dumps({**asdict(found), "stores": stores}, indent=1))
        return EXIT_OK
    total = bytes_text(sum(store.disk_bytes for store in found.stores))
    print(f"{found.cache_dir}: {count_of(len(found.stores), 'specification')}, {total}")
    for store in found.stores:
        used, free = bytes_text(store.disk_bytes), bytes_text(store.reclaimable_bytes)
        print(f"\n{_spec_line(store.spec)}")
        print(f"  fingerprint  {store.spec.fingerprint}")
        print(f"  entries      {store.entries} in {count_of(store.shards, 'shard')}")
        print(f"  codec        {_codec_text(store)}")
        print(f"  on disk      {used}, reclaimable {free}")
        damaged = [f"  damaged      {name}: {reason}" for name, reason in store.damaged_shards]
        print_first(damaged)
    for name, reason in found.unreadable:
        print(f"\n{name} cannot be read: {reason}")
    if failures := standing_failures(cache_dir):
        print(
            f"\n{count_of(len(failures), 'input')} could not be used when last tried: {FAILURES_FILE} lists them"
        )
    return EXIT_OK


def _described(cache_dir: str) -> CacheDescription:
    """Raises NotACacheError where nothing is there that a cache has."""
    found = describe(cache_dir)
    if not found.stores and not found.unreadable:
        raise NotACacheError(
            f"{cache_dir} holds no feature cache: check the path, or make the cache with `vggt-cache precompute`"
        )
    return found


def _codec_text(store: StoreDescription) -> str:
    """Such as `lossless (12 shards), none (1 shard); features 1.2 GB of 1.8 GB, 0.664`."""
    names = ", ".join(f"{name} ({count_of(count, 'shard')})" for name, count in store.codecs.items())
    if not store.raw_bytes:
        return names or "none"
    share = store.stored_bytes / store.raw_bytes
    return f"{names}; features {bytes_text(store.stored_bytes)} of {bytes_text(store.raw_bytes)}, {share:.3f}"


def _spec_line(spec: FeatureSpec | CallSpec) -> str:
    if isinstance(spec, CallSpec):
        return spec.text
    encoder, preprocessing = spec.encoder, spec.preprocessing
    return (
        f"context {spec.context}: {encoder.patch_embed} with {encoder.depth} pairs of {encoder.embed_dim} channels, "
        f"{spec.kept_text}, {preprocessing.image_size} pixels wide ({preprocessing.resize_mode}), computed in "
        f"{encoder.compute_dtype}, stored in {spec.feature_dtype}, weights {encoder.weights_digest[:8]}"
    )


def verify_cache(
    cache_dir: str,
    *,
    data_root: str | None = None,
    annotation_path: str | None = None,
    data_path: str | None = None,
    context: str | None = None,
    fingerprint: str | None = None,
    max_samples: int = PrecomputeSettings.max_samples,
    num_workers: int,
    **asked: object,
) -> int:
    """Check every record of a store, or that every feature which some data needs is present and intact.

    Needs no model. `asked`: what else the user gave; the cache must have been made with those of them that are
    settings of precompute.
    """
    from vggt_cache.precompute.verify import tell_verdicts, verify_data, verify_records
    from vggt_cache.store import FeatureCache

    reporter, threads = Reporter(), max(1, num_workers)
    data = not data_root == annotation_path == data_path is None  # an empty name is not none
    any_outputs = not (data or asked)  # of those only the records can be checked
    spec = select_store(cache_dir, spec=None, fingerprint=fingerprint, context=context, modules=any_outputs)
    with FeatureCache.open(cache_dir, spec=spec, use_index=data) as cache:
        for name, made_with in (spec.contradictions(asked) if asked else {}).items():
            raise SpecMismatchError(
                f"--{name} {asked[name]} was given, but the cache was made with {made_with}: leave the flag out to "
                "verify this cache, or name the directory of the other one"
            )
        if not data:
            invalid = tell_verdicts(verify_records(cache, threads=threads), len(cache), reporter)
        else:
            plan = plan_and_tell(
                data_root,
                cache.spec.context,
                max_samples,
                reporter,
                annotation_path=annotation_path,
                data_path=data_path,
            )
            reporter.info(f"Cache directory: {absolute(cache_dir)}")
            invalid = tell_verdicts(verify_data(cache, plan, threads=threads), len(plan), reporter)
    if data and invalid:
        reporter.warn(
            f"{count_of(invalid, 'feature')} that this data needs cannot be read from the cache: run precompute "
            f"again to make what is missing (after vggt-cache prune {cache_dir} --damaged --yes for damaged ones)"
        )
    return EXIT_INVALID if invalid else EXIT_OK


def draw_view(
    cache_dir: str,
    data_root: str | None,
    output: str,
    *,
    annotation_path: str | None = None,
    data_path: str | None = None,
    count: int,
    context: str | None,
    fingerprint: str | None,
) -> int:
    """Draw features spread over the data beside their frames."""
    from vggt_cache.store import FeatureCache

    if count < 1:
        raise SettingsError(f"--count {count} draws nothing: give 1 or more")
    require_local(output, "--output")
    picture_format(output)
    reporter = Reporter()
    spec = select_store(cache_dir, spec=None, fingerprint=fingerprint, context=context)
    with FeatureCache.open(cache_dir, spec=spec) as cache:
        plan = plan_and_tell(
            data_root,
            cache.spec.context,
            -1,
            reporter,
            annotation_path=annotation_path,
            data_path=data_path,
        )
        rows: dict[bytes, Row] = {}
        for feature in _spread(len(plan)):
            paths = plan.paths_of(feature)
            try:
                key = cache.key_of(paths)
                stored = None if key in rows else cache.get_by_key(key)
                if stored is not None:
                    seen = [decode_frame(read_frame(path), cache.spec.preprocessing) for path in paths]
                    caption = plan.context.label([os.path.relpath(path, plan.root) for path in paths])
                    rows[key] = Row(seen[-1], _patches(cache.spec, stored, seen[-1]), caption, seen[:-1])
            except FrameError:
                continue  # what is missing or damaged has no feature; others have
            if len(rows) == count:
                break
    if not rows:
        raise SettingsError(
            f"none of the frames of {data_root or annotation_path} has a feature in {cache_dir}: precompute them first"
        )
    draw_features(list(rows.values()), output)
    reporter.info(f"Drew {count_of(len(rows), 'feature')}: {output}")
    return EXIT_OK


def _patches(spec: FeatureSpec, stored: Tensor, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Patches [h, w, C] of a feature's last frame and highest layer. Raises SettingsError where it has none."""
    if spec.tokens == "special":
        raise SettingsError(
            "this cache stores special tokens only, which have no place in a frame, so there is nothing to draw: view "
            "a cache of patches"
        )
    tokens = stored[-1] if spec.context_rule.of_all_frames else stored
    tokens = tokens[-1] if spec.layers else tokens
    h, w = pixels.shape[0] // PATCH_SIZE, pixels.shape[1] // PATCH_SIZE
    patches = tokens if tokens.ndim == 3 else tokens[-h * w :].view(h, w, -1)
    return patches.float().numpy()


def _spread(count: int) -> Iterator[int]:
    """0 to count - 1, each once: any first few of them lie far apart."""
    step = max(1, int(count * 0.618))  # the golden section never comes back near to where it was
    while math.gcd(step, count) > 1:
        step += 1
    return (part * step % count for part in range(count))


def prune_cache(cache_dir: str, *, damaged: bool, spec: str | None = None, yes: bool) -> int:
    """Show, or with `yes` do, what can be removed without losing a feature; or all of the specification `spec`."""
    if spec is None:
        actions = prune(cache_dir, dry_run=not yes, damaged=damaged)
    elif damaged:
        raise SettingsError("--damaged mends a cache and --spec removes one: give one of them")
    else:
        path = absolute(cache_dir)
        chosen = select_store(path, spec=None, fingerprint=spec, context=None, modules=True)
        actions = remove_store(path, chosen, dry_run=not yes)
    verb = "removed" if yes else "would remove"
    print_first([f"{verb} {one.path}: {bytes_text(one.bytes)}, {one.reason}" for one in actions])
    total = bytes_text(sum(action.bytes for action in actions))
    if not actions:
        _described(cache_dir)
        print("nothing to remove")
    else:
        print(f"{total} freed" if yes else f"{total} can be freed: run again with --yes")
    return EXIT_OK


def convert_cache(
    cache_dir: str, codec: str, *, context: str | None, fingerprint: str | None, yes: bool
) -> int:
    """Show, or with `yes` do, the rewriting of a store's shards with another codec."""
    reporter = Reporter()
    spec = select_store(absolute(cache_dir), spec=None, fingerprint=fingerprint, context=context)
    before = after = count = kept = 0
    for shard in convert(cache_dir, spec, codec, dry_run=not yes):
        if shard.problem:
            kept += 1
            reporter.warn(f"{shard.shard} was kept as it is: {shard.problem}")
            continue
        count, before, after = count + 1, before + shard.bytes_before, after + shard.bytes_after
        became = f" -> {bytes_text(shard.bytes_after)}" if yes else ""
        print(
            f"{'converted' if yes else 'would convert'} {shard.shard}: {count_of(shard.records, 'feature')}, "
            f"{bytes_text(shard.bytes_before)}{became}",
            flush=True,
        )
    shards = count_of(count, "shard")
    if not count and not kept:
        print("nothing to convert: all shards have this codec")
    elif yes:
        print(f"{shards} converted: {bytes_text(before)} -> {bytes_text(after)}")
    else:
        print(f"{shards} with {bytes_text(before)} would be converted: run again with --yes")
    return EXIT_INVALID if kept else EXIT_OK
