"""The commands that look at a cache: `info`, `verify`, `view`, `prune`."""

from __future__ import annotations

import dataclasses
import json
import os

from tqdm import tqdm

from vggt_cache.errors import SettingsError
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.report import Reporter, bytes_text, count_of
from vggt_cache.precompute.run import EXIT_INVALID, EXIT_OK, scan_data
from vggt_cache.store import FeatureCache, describe, prune
from vggt_cache.verify import verify_data, verify_records
from vggt_cache.view import draw_features


def show_info(cache_dir: str, *, as_json: bool) -> int:
    """What the directory holds, one paragraph per encoder specification."""
    stores = describe(cache_dir)
    if as_json:
        print(json.dumps([dataclasses.asdict(store) for store in stores], indent=1, default=str))
        return EXIT_OK
    print(f"{os.path.abspath(cache_dir)}: {count_of(len(stores), 'specification')}")
    for store in stores:
        print(f"\n{describe_spec(store.spec)}")
        print(f"  fingerprint   {store.spec.fingerprint}")
        print(f"  entries       {store.entries} in {count_of(store.shards, 'shard')}")
        print(
            f"  on disk       {bytes_text(store.bytes_on_disk)}, of which {bytes_text(store.reclaimable_bytes)} reclaimable"
        )
        if store.damaged_shards:
            print(
                f"  damaged       {count_of(len(store.damaged_shards), 'shard')}: run vggt-cache verify {cache_dir}"
            )
    return EXIT_OK


def describe_spec(spec: FeatureSpec) -> str:
    """A specification in one line."""
    encoder, preprocessing = spec.encoder, spec.preprocessing
    return (
        f"context {spec.context}: {encoder.patch_embed} with {encoder.depth} pairs of {encoder.embed_dim} channels, "
        f"layer {encoder.layer}, {preprocessing.image_size} pixels wide ({preprocessing.resize_mode}), computed in "
        f"{encoder.compute_dtype}, stored in {spec.feature_dtype}"
    )


def verify_store(cache_dir: str, context: str | None, fingerprint: str | None, *, threads: int) -> int:
    """Check every record of a store against its checksum."""
    reporter = Reporter()
    with FeatureCache.open(cache_dir, context=context, fingerprint=fingerprint) as cache:
        with tqdm(total=len(cache), desc="Verifying", unit="feature", mininterval=1.0) as bar:
            result = verify_records(
                cache,
                threads=max(1, threads),
                on_invalid=lambda label, reason: reporter.warn(f"invalid: {label}: {reason}"),
                on_progress=bar.update,
            )
    reporter.info(str(result))
    return EXIT_INVALID if result.invalid else EXIT_OK


def verify_against_data(
    cache_dir: str,
    data_root: str,
    *,
    context: str | None,
    fingerprint: str | None,
    max_samples: int,
    threads: int,
) -> int:
    """Check that every feature that the data needs is present and intact. Needs no model."""
    reporter = Reporter()
    failures = FailureLog(cache_dir, reporter, write=False)
    with FeatureCache.open(cache_dir, context=context, fingerprint=fingerprint) as cache:
        plan = scan_data(data_root, cache.spec.context, max_samples, reporter, failures)
        with tqdm(total=len(plan), desc="Verifying", unit="feature", mininterval=1.0) as bar:
            result = verify_data(
                cache,
                plan,
                threads=threads,
                on_invalid=lambda label, reason: reporter.warn(f"invalid: {label}: {reason}"),
                on_progress=bar.update,
            )
    reporter.info(f"Cache directory: {os.path.abspath(cache_dir)}")
    reporter.info(str(result))
    if result.invalid:
        reporter.warn(
            f"{count_of(result.invalid, 'feature')} that this data needs cannot be read from the cache: run precompute "
            f"again to make what is missing (after vggt-cache prune {cache_dir} --damaged --yes for damaged ones)"
        )
    return EXIT_INVALID if result.invalid else EXIT_OK


def draw_view(
    cache_dir: str, data_root: str, output: str, *, count: int, context: str | None, fingerprint: str | None
) -> int:
    """Draw features spread over the data beside their frames."""
    if count < 1:
        raise SettingsError(f"--count {count} draws nothing: give 1 or more")
    reporter = Reporter()
    with FeatureCache.open(cache_dir, context=context, fingerprint=fingerprint) as cache:
        plan = scan_data(
            data_root, cache.spec.context, -1, reporter, FailureLog(cache_dir, reporter, write=False)
        )
        rows = []
        for feature in (len(plan) * part // count for part in range(min(count, len(plan)))):
            paths = plan.paths_of(feature)
            stored = cache.get(paths)
            if stored is None:
                reporter.warn(f"not in the cache: {plan.label(feature)}")
                continue
            pixels = decode_frame(read_frame(paths[-1]), cache.spec.preprocessing)
            rows.append((pixels, stored.float().numpy(), os.path.relpath(paths[-1], plan.sources.root)))
    if not rows:
        raise SettingsError(
            f"none of the frames below {data_root} has a feature in {cache_dir}: precompute them first"
        )
    draw_features(rows, output)
    reporter.info(f"Drew {count_of(len(rows), 'feature')}: {output}")
    return EXIT_OK


def prune_cache(cache_dir: str, *, damaged: bool, really: bool) -> int:
    """Show, or do, what can be removed without losing a feature."""
    actions = prune(cache_dir, dry_run=not really, damaged=damaged)
    for action in actions:
        print(
            f"{'removed' if really else 'would remove'} {action.path}: {bytes_text(action.bytes)}, {action.reason}"
        )
    total = bytes_text(sum(action.bytes for action in actions))
    if not actions:
        print("nothing to remove")
    elif really:
        print(f"{total} freed")
    else:
        print(f"{total} can be freed: run again with --yes")
    return EXIT_OK
