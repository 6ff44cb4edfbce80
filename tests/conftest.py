from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

import golden_recipe
from vggt_cache.encoder import EncoderConfig, expected_shapes

if TYPE_CHECKING:
    from bucket_kit import Proxy
    from train_kit import Kit

settings.register_profile("any machine", deadline=None)  # a busy one takes its time
settings.load_profile("any machine")


def pytest_configure() -> None:
    # On a busy machine, threads that wait for each other at every small operation take ten times as long as one.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
    # A shell starts what is put into the background with SIGINT ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The client of buckets leaves threads and connections behind, which no later test may fork or count.
    items.sort(key=lambda item: item.path.name.startswith("test_object_store"))


@pytest.fixture(scope="session")
def small_config() -> EncoderConfig:
    return EncoderConfig.from_dict(golden_recipe.SMALL_CONFIG)


@pytest.fixture(scope="session")
def small_checkpoint(small_config: EncoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A VGGT checkpoint directory (config.json, model.safetensors; 36 M parameters) with the golden weights."""
    directory = tmp_path_factory.mktemp("small_checkpoint")
    weights = golden_recipe.make_weights(expected_shapes(small_config))
    save_file(
        {f"aggregator.{name}": weight for name, weight in weights.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(golden_recipe.SMALL_CONFIG))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture(autouse=True)
def no_cache_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VGGT_CACHE_DIR", raising=False)


@pytest.fixture(scope="session")
def s3() -> Iterator[Proxy]:
    """A server of buckets; see bucket_kit."""
    from bucket_kit import s3_server

    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def bucket(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a cache directory, not yet there, in a bucket of its own."""
    from bucket_kit import ENVIRONMENT

    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3.port}"}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.new_bucket()}/some/cache"


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Kit:
    """What one training run needs, only to be read; see train_kit."""
    from train_kit import write_kit

    return write_kit(tmp_path_factory.mktemp("kit"), small_checkpoint)


@pytest.fixture(autouse=True)
def shelves_closed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test of wrapped modules leaves open must not be inherited by processes that later tests fork."""
    if not request.module.__name__.startswith("test_wrap"):
        yield
        return
    from vggt_cache.wrap.shelf import Shelf

    made: list[Shelf] = []
    begin = Shelf.__init__

    def noted(shelf: Shelf, *args: object, **kwargs: object) -> None:
        made.append(shelf)
        begin(shelf, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Shelf, "__init__", noted)
    yield
    for shelf in made:
        shelf.close()
