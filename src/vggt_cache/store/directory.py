"""A cache directory: where things lie in it, which stores it holds, which of them is meant, how a new one is made.

<cache_dir>/<context>-<fingerprint[:16]>/     one store per FeatureSpec; `module-...` of a CallSpec, see call_spec.py
    spec.json                                 the specification in canonical JSON
    shards/<12 hex ms>-<16 hex random>.safetensors
    index/rows                                derived from the shards
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from vggt_cache.call_spec import CONTEXT as MODULE
from vggt_cache.call_spec import CallSpec
from vggt_cache.errors import (
    AmbiguousCacheError,
    CacheNotFoundError,
    NotACacheError,
    SettingsError,
    SpecMismatchError,
    StoreError,
)
from vggt_cache.identity import CONTEXTS, GIVEN_PIXELS, FeatureSpec
from vggt_cache.place import absolute, is_url
from vggt_cache.store.atomic_file import replace_file
from vggt_cache.store.filesystem import (
    OPERATING_SYSTEM,
    FileSystem,
    accessing,
    committing,
    read_bytes,
    released_after,
    sync_directory,
)
from vggt_cache.store.format import SHARD_NAME
from vggt_cache.store.header import parse_header, parse_spec
from vggt_cache.store.object_store import system_of
from vggt_cache.store.shards import SHARDS_FOLDER, open_regular, read_header_bytes

SPEC_FILE = "spec.json"
CLAIMS_FOLDER = "claims"
"""Of precompute, in a store: which blocks of work a process has taken."""
MAX_SPEC_BYTES = 64 * 1024
STORE_NAME = re.compile(rf"(?:{'|'.join((*CONTEXTS, MODULE))})-[0-9a-f]{{16}}")
_SHARDS_TRIED_FOR_SPEC = 8


def list_stores(cache_dir: str | os.PathLike[str], fs: FileSystem = OPERATING_SYSTEM) -> list[FeatureSpec]:
    """Specifications of the features in a cache directory, without outputs of modules. Errors as for `survey`."""
    return _of_features(survey(cache_dir, fs)[0])


def _of_features(specs: Sequence[FeatureSpec]) -> list[FeatureSpec]:
    return [spec for spec in specs if spec.context in CONTEXTS]


Survey = tuple[list[FeatureSpec], list[tuple[str, StoreError]]]
"""Specifications, ordered by `short_name`, those of modules too (a CallSpec in place of a FeatureSpec); and folders
named like a store that have no readable one: name, and why."""


def survey(cache_dir: str | os.PathLike[str], fs: FileSystem = OPERATING_SYSTEM) -> Survey:
    """Look what is in a cache directory. Modifies nothing.

    Raises CacheNotFoundError where there is no such directory, NotACacheError where it is something else,
    CacheAccessError where it cannot be read.
    """
    path, fs = os.fspath(cache_dir), system_of(cache_dir, fs)
    specs: list[FeatureSpec] = []
    unreadable: list[tuple[str, StoreError]] = []
    with released_after(fs, _open_cache_dir(path, fs)) as dir_fd:
        with accessing(path):
            names = sorted(filter(STORE_NAME.fullmatch, fs.list_names(dir_fd)))
        for name in names:
            try:
                specs.append(_read_spec(path, name, dir_fd, fs))
            except StoreError as error:
                unreadable.append((name, error))
    return specs, unreadable


def _open_cache_dir(path: str, fs: FileSystem) -> int:
    with accessing(path):
        try:
            return fs.open_directory(path)
        except FileNotFoundError as error:
            raise CacheNotFoundError(
                f"there is no directory {path}, so there is no cache to read: check the path, or make the cache with "
                "`vggt-cache precompute`"
            ) from error
        except NotADirectoryError as error:
            raise NotACacheError(
                f"{path} is not a directory, so it cannot be a cache: give the directory that was --cache_dir"
            ) from error


# ---------------------------------------------------------------- specification of a store


def _read_spec(cache_dir: str, name: str, cache_fd: int, fs: FileSystem) -> FeatureSpec:
    """From spec.json, or where that is lost or damaged from a shard, which carries it too."""
    path = os.path.join(cache_dir, name)
    with accessing(path), released_after(fs, fs.open_directory(name, dir_fd=cache_fd)) as store_fd:
        try:
            return _named(name, parse_spec(_spec_text(store_fd, fs)))
        except (FileNotFoundError, UnicodeDecodeError, StoreError) as error:
            spec = _spec_of_a_shard(name, store_fd, fs)
            if spec is None:
                raise SpecMismatchError(
                    f"{path}/{SPEC_FILE} is missing or damaged ({error}) and no shard beside it says what the "
                    "specification is: remove this folder if it holds no shards, else precompute again into a new "
                    "directory"
                ) from error
            return spec


def _named(name: str, spec: FeatureSpec) -> FeatureSpec:
    if spec.short_name != name:
        raise SpecMismatchError(
            f"the specification in {name} belongs to {spec.short_name}: a folder was renamed or a file misplaced"
        )
    return spec


def _spec_text(store_fd: int, fs: FileSystem) -> str:
    fd, _ = open_regular(fs, SPEC_FILE, store_fd)
    with released_after(fs, fd):
        return read_bytes(fs, fd, MAX_SPEC_BYTES, 0).decode("utf-8")


def _spec_of_a_shard(name: str, store_fd: int, fs: FileSystem) -> FeatureSpec | None:
    try:
        shards_fd = fs.open_directory(SHARDS_FOLDER, dir_fd=store_fd, follow=False)
    except OSError:
        return None
    with released_after(fs, shards_fd):
        for shard in sorted(filter(SHARD_NAME.fullmatch, fs.list_names(shards_fd)))[:_SHARDS_TRIED_FOR_SPEC]:
            with suppress(StoreError, OSError):
                fd, _ = open_regular(fs, shard, shards_fd)
                with released_after(fs, fd):
                    return _named(name, parse_header(read_header_bytes(fs, fd, shard), shard).spec)
    return None


# ---------------------------------------------------------------- a new store


def create_store(
    cache_dir: str | os.PathLike[str], spec: FeatureSpec, fs: FileSystem = OPERATING_SYSTEM
) -> Path | str:
    """Make the folders and spec.json of a store, durably; returns its path, or URL, `cache_dir/spec.short_name`.

    Does nothing where the store exists already, and any number of processes may call it at once: all of them
    write the same bytes. Raises CommitError.
    """
    fs = system_of(cache_dir, fs)
    store_dir = os.path.join(cache_dir, spec.short_name)
    with committing(store_dir):
        _make_directories(os.path.join(store_dir, SHARDS_FOLDER), fs)
        with released_after(fs, fs.open_directory(store_dir)) as store_fd:
            _write_spec(spec, store_fd, fs)
        # Another process may have made the folders and died before they were synced.
        for directory in (store_dir, os.path.dirname(store_dir) or "."):
            _sync_path(directory, fs)
    return store_dir if is_url(store_dir) else Path(store_dir)


def _make_directories(path: str, fs: FileSystem, *, with_parents: bool = True) -> None:
    parent = os.path.dirname(absolute(path))
    try:
        fs.make_directory(path)
    except FileExistsError:
        return  # should it be no directory, opening it will say so
    except FileNotFoundError:
        if (
            not with_parents
        ):  # such as below a link that leads nowhere: it is there, and nothing can be made in it
            raise
        _make_directories(parent, fs)
        return _make_directories(path, fs, with_parents=False)
    _sync_path(parent, fs)


def _sync_path(path: str, fs: FileSystem) -> None:
    try:
        dir_fd = fs.open_directory(path)
    except PermissionError:
        return  # a parent that we may pass through and not read, such as /
    with released_after(fs, dir_fd):
        sync_directory(fs, dir_fd)


def _write_spec(spec: FeatureSpec, store_fd: int, fs: FileSystem) -> None:
    with suppress(OSError, UnicodeDecodeError, StoreError):
        if _spec_text(store_fd, fs) == spec.to_json():
            return
    replace_file(fs, store_fd, SPEC_FILE, [spec.to_json().encode()])


# ---------------------------------------------------------------- which store is meant


def select_store(
    cache_dir: str,
    *,
    spec: FeatureSpec | None,
    fingerprint: str | None,
    context: str | None,
    modules: bool = False,
    fs: FileSystem = OPERATING_SYSTEM,
) -> FeatureSpec:
    """The one store in `cache_dir` that agrees with all that is given.

    `modules`: outputs of modules may be meant, by a fingerprint or where there are no features. A `spec` is always.

    Raises SettingsError, CacheNotFoundError, NotACacheError, AmbiguousCacheError, SpecMismatchError,
    CacheAccessError.
    """
    asked: list[tuple[str, Callable[[FeatureSpec], bool]]] = []
    if spec is not None:
        asked.append((describe_spec(spec), lambda found: found == spec))
    if context is not None:
        if context not in CONTEXTS:
            raise SettingsError(
                f"context is {context!r}, which is not one of {', '.join(CONTEXTS)}: choose one of these"
            )
        asked.append((f"context {context}", lambda found: context == found.context))
    if fingerprint is not None:
        if not fingerprint or set(fingerprint) - set("0123456789abcdef"):
            raise SettingsError(
                f"fingerprint is {fingerprint!r}, which is not hexadecimal digits: see `vggt-cache info`"
            )
        asked.append((f"fingerprint {fingerprint}", lambda found: found.fingerprint.startswith(fingerprint)))
    specs, unreadable = survey(cache_dir, fs)
    features = _of_features(specs)
    if spec is None and not (modules and (fingerprint or not features)):
        specs = features
    for name, error in unreadable:
        if not specs or (spec is not None and name == spec.short_name):
            raise error
    chosen = [found for found in specs if all(fits(found) for _, fits in asked)]
    if len(chosen) == 1:
        return chosen[0]
    raise _no_one_store(cache_dir, specs, chosen, " with ".join(words for words, _ in asked))


def _no_one_store(
    cache_dir: str, specs: Sequence[FeatureSpec], chosen: Sequence[FeatureSpec], wanted: str
) -> StoreError:
    listing = "; ".join(map(describe_spec, chosen or specs))
    if chosen:
        return AmbiguousCacheError(
            f"{cache_dir} holds {len(chosen)} caches: {listing}; say which one is meant, by context or by the "
            "first digits of its fingerprint (on the command line --context or --fingerprint)"
        )
    if specs:
        return SpecMismatchError(
            f"{cache_dir} holds {listing}, and {wanted} is wanted: such features are not in this "
            "cache; precompute them, or ask for what it holds"
        )
    if STORE_NAME.fullmatch(os.path.basename(absolute(cache_dir))):
        return NotACacheError(f"{cache_dir} is one store inside a cache: give the directory above it")
    return NotACacheError(
        f"{cache_dir} holds no feature cache: check the path, or make the cache with `vggt-cache precompute`"
    )


def _pixels_of(spec: FeatureSpec) -> str:
    made = spec.preprocessing
    return (
        "pixels as given"
        if made == GIVEN_PIXELS
        else f"image size {made.image_size} {made.resize_mode}, alpha {made.alpha}"
    )


def describe_spec(spec: FeatureSpec | CallSpec) -> str:
    """One specification in a few words, for messages and tables."""
    if isinstance(spec, CallSpec):
        return f"{spec.short_name} ({spec.text})"
    return (
        f"{spec.short_name} (context {spec.context}, {_pixels_of(spec)}, {spec.kept_text}, computed in "
        f"{spec.encoder.compute_dtype}, stored in {spec.feature_dtype}, weights {spec.encoder.weights_digest[:8]})"
    )
