"""Where a training step gets its features from: hits, misses, damage, and what is put back."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from codec_kit import INT8, NUMBERS, given_back, write_packed
from janusvln.data.images import FeatureRequest
from janusvln.features.computed import CacheFiller, LiveEncoder
from store_kit import SPEC, failing, make_feature, make_key, shard_path, write_shard
from train_kit import CPU, make_request, make_source, small_spec, write_images
from vggt_cache.delivery import ReadAhead
from vggt_cache.encoder import Encoder
from vggt_cache.errors import CacheAccessError, CheckpointError, CorruptRecordError, DataError, SettingsError
from vggt_cache.identity import pixel_key
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.rows import hash_array

CONTEXTS = ("frame", "causal")


def stored_request(number: int, *, index: int = 0) -> FeatureRequest:
    """A request for a feature that `store_kit.write_shard` has written."""
    return FeatureRequest(
        index=index,
        key=make_key(number),
        paths=(f"{number}.png",),
        digests=(bytes(32),),
        state_hashes=(b"",),
        frames=torch.zeros(1, 28, 42, 3, dtype=torch.uint8),
    )


def requests_for(numbers: Sequence[int]) -> list[FeatureRequest]:
    return [stored_request(number, index=number) for number in numbers]


def flip_a_bit(path: Path) -> None:
    os.chmod(path, 0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class TestHits:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> FeatureCache:
        write_shard(tmp_path, range(8))
        return FeatureCache.open(tmp_path)

    @pytest.mark.parametrize("announced", [True, False])
    def test_a_stored_feature_arrives_as_it_was_written(self, cache: FeatureCache, announced: bool) -> None:
        source = make_source(SPEC, cache, None)
        batch = requests_for([3, 5])
        if announced:
            source.expect(batch)
        features = source.take(batch)
        assert torch.equal(features[0], make_feature(3))
        assert torch.equal(features[1], make_feature(5))
        assert (source.counts.hits, source.counts.misses) == (2, 0)

    def test_what_others_stored_for_the_same_pixels_is_a_hit(self, tmp_path: Path) -> None:
        given = SPEC.of_given_pixels
        request = stored_request(1)
        with ShardWriter(create_store(tmp_path, given), given) as writer:
            writer.append(pixel_key(SPEC, request.pixel_digests), make_feature(7))
            writer.commit()
        create_store(tmp_path, SPEC)
        source = make_source(SPEC, FeatureCache.open(tmp_path, spec=SPEC), None, miss="error")
        assert torch.equal(source.take([request])[0], make_feature(7))
        other = dataclasses.replace(request, frames=request.frames + 1)
        with pytest.raises(DataError):
            source.take([other])

    def test_what_is_filled_is_found_by_its_pixels(self, tmp_path: Path) -> None:
        request = stored_request(1)
        filler = CacheFiller(str(tmp_path), SPEC)
        filler.put([request], [make_feature(7)])
        filler.close()
        with FeatureCache.open(tmp_path, context="frame") as cache:
            (pixels,) = request.frames_used
            assert torch.equal(cache.get([pixels], strict=True), make_feature(7))
            assert cache.get([pixels + 1]) is None

    def test_batches_announced_ahead_keep_their_features_apart(self, cache: FeatureCache) -> None:
        source = make_source(SPEC, cache, None)
        batches = [requests_for([number, (number + 1) % 8]) for number in range(8)]
        source.expect(batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            if following is not None:
                source.expect(following)
            features = source.take(batch)
            for request, feature in zip(batch, features, strict=True):
                assert torch.equal(feature, make_feature(request.index))
            source.step_done()
        assert cache.stats.hits == 16  # each once: what was announced is not read again

    def test_int8_travels_as_it_lies_in_the_store_and_is_decoded_on_the_device(self, tmp_path: Path) -> None:
        write_packed(tmp_path, NUMBERS, INT8)
        with FeatureCache.open(tmp_path) as cache:
            reader = ReadAhead(cache, torch.device("cpu"))
            h, w, channels = given_back(1, INT8).shape
            reads = {number: reader.start(make_key(number)) for number in NUMBERS}
            for number, read in reads.items():
                buffer = read.result.result().buffer
                assert buffer is not None
                assert buffer.dtype == torch.uint8
                assert buffer.nbytes == 2 * channels + (4 + channels) * h * w
                assert torch.equal(reader.wait(read), given_back(number, INT8))
            absent = reader.start(make_key(9))
            assert reader.wait(absent) is None
            reader.close()

    def test_buffers_are_used_again_after_the_step_and_not_before(self, cache: FeatureCache) -> None:
        source = make_source(SPEC, cache, None)
        (first,) = source.take(requests_for([0]))
        (second,) = source.take(requests_for([1]))
        assert first.data_ptr() != second.data_ptr()
        assert torch.equal(first, make_feature(0))
        source.step_done()
        (third,) = source.take(requests_for([2]))
        assert third.data_ptr() in (first.data_ptr(), second.data_ptr())

    def test_what_was_announced_and_never_taken_is_forgotten(self, cache: FeatureCache) -> None:
        source = make_source(SPEC, cache, None)
        source.expect(requests_for([1]))
        source.forget()
        (feature,) = source.take(requests_for([2]))
        assert torch.equal(feature, make_feature(2))

    def test_what_was_not_announced_may_come_between(self, cache: FeatureCache) -> None:
        source = make_source(SPEC, cache, None)
        announced = requests_for([1])
        source.expect(announced)
        (between,) = source.take(requests_for([2]))
        assert torch.equal(between, make_feature(2))
        (feature,) = source.take(announced)
        assert torch.equal(feature, make_feature(1))

    def test_each_hit_is_told_by_the_index_of_its_sample(self, cache: FeatureCache) -> None:
        told: list[int] = []
        make_source(SPEC, cache, None, on_hit=told.append).take(requests_for([4, 6]))
        assert told == [4, 6]

    def test_counts_start_anew_when_they_are_taken(self, cache: FeatureCache) -> None:
        source = make_source(SPEC, cache, None)
        source.take(requests_for([4, 6]))
        assert source.take_counts().hits == 2
        assert source.take_counts().hits == 0


class TowerCalls:
    """How many frames each call of the patch tower had, and how many it has memory for."""

    def __init__(self, patch_tokens: Callable[..., torch.Tensor]) -> None:
        self.frames: list[int] = []
        self.room = 1000
        self._patch_tokens = patch_tokens

    def __call__(self, encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        self.frames.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return self._patch_tokens(encoder, pixels)


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> TowerCalls:
    calls = TowerCalls(Encoder.patch_tokens)
    monkeypatch.setattr(Encoder, "patch_tokens", lambda encoder, pixels: calls(encoder, pixels))
    return calls


class TestMisses:
    def test_error_names_the_frame_and_the_remedy(self, tmp_path: Path) -> None:
        write_shard(tmp_path, range(2))
        source = make_source(SPEC, FeatureCache.open(tmp_path), None, miss="error")
        with pytest.raises(DataError, match=r"9\.png is not in the cache .* --vggt_cache_miss encode"):
            source.take(requests_for([1, 9]))

    def test_without_an_encoder_the_sentence_says_what_to_give(self, tmp_path: Path) -> None:
        write_shard(tmp_path, range(2))
        source = make_source(SPEC, FeatureCache.open(tmp_path), None)
        with pytest.raises(CheckpointError, match="--vggt_model_path is not given"):
            source.take(requests_for([9]))

    @pytest.mark.parametrize("context", CONTEXTS)
    def test_a_computed_feature_equals_the_stored_one(
        self, tmp_path: Path, small_checkpoint: Path, context: str
    ) -> None:
        images = write_images(tmp_path / "data", 4)
        (tmp_path / "data" / "a.jsonl").write_text(
            "".join(
                f'{{"images": {[path.name for path in images[: n + 1]]!r}}}\n'.replace("'", '"')
                for n in range(4)
            )
        )
        settings = PrecomputeSettings(
            vggt_model_path=str(small_checkpoint), data_root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"),
            context=context, image_size=56, feature_dtype="float32", num_workers=0, device="cpu",
        )  # fmt: skip
        assert precompute(settings) == 0
        spec = small_spec(small_checkpoint, context)
        cache = FeatureCache.open(tmp_path / "cache")
        requests = [make_request(spec, images[: n + 1], index=n) for n in range(4)]
        stored = make_source(spec, cache, None).take(requests)
        live = make_source(spec, None, small_checkpoint)
        for one, two in zip(stored, live.take(requests), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        assert (live.counts.hits, live.counts.misses) == (0, 4)
        assert live.counts.encode_s > 0

    def test_a_feature_is_computed_in_the_dtype_of_storage(
        self, tmp_path: Path, small_checkpoint: Path
    ) -> None:
        spec = small_spec(small_checkpoint, "frame", feature_dtype="bfloat16")
        request = make_request(spec, write_images(tmp_path, 1))
        (feature,) = make_source(spec, None, small_checkpoint).take([request])
        assert feature.dtype == torch.bfloat16
        assert feature.shape == (3, 4, 768)

    def test_live_features_are_those_of_a_lossy_store_bit_for_bit(
        self, tmp_path: Path, small_checkpoint: Path
    ) -> None:
        spec = small_spec(small_checkpoint, "frame", feature_dtype="int8")
        requests = [make_request(spec, [image]) for image in write_images(tmp_path, 2)]
        filler = CacheFiller(str(tmp_path / "cache"), spec)
        cache = FeatureCache.open(tmp_path / "cache")
        filling = make_source(spec, cache, small_checkpoint, miss="fill", filler=filler)
        live = filling.take(requests)
        filling.flush()
        filling.refresh()
        for one, two in zip(live, filling.take(requests), strict=True):
            assert torch.equal(one, two)
        assert filling.counts.hits == 2
        exact = LiveEncoder(str(small_checkpoint), spec, CPU).encode(requests)
        assert not torch.equal(exact[0], live[0])
        filling.close()

    def test_an_image_is_noted_in_the_state_it_was_read_in_or_not_at_all(self, tmp_path: Path) -> None:
        state, digest = b"s" * 16, b"d" * 32
        filler = CacheFiller(str(tmp_path), SPEC)
        requests = [
            dataclasses.replace(stored_request(number), state_hashes=states, digests=(digest,))
            for number, states in enumerate([(state,), (b"",)])
        ]
        filler.put(requests, [torch.zeros(2, 3, SPEC.encoder.channels, dtype=torch.bfloat16)] * 2)
        filler.close()
        table = DigestTable(str(tmp_path))
        assert len(table) == 1
        assert table.lookup(hash_array([state]))[1].tobytes() == digest

    @pytest.mark.parametrize(
        ("context", "lengths", "expected"),
        [
            ("causal", [9], [9]),
            ("causal", [9, 9], [9, 9]),
            ("causal", [13], [7, 6]),
            ("causal", [1, 1, 1], [3]),
            ("frame", [3, 3, 3, 3, 3], [5]),
        ],
    )
    def test_a_list_goes_through_the_patch_tower_in_one_go_or_in_equal_parts(
        self,
        tmp_path: Path,
        small_checkpoint: Path,
        tower: TowerCalls,
        context: str,
        lengths: list[int],
        expected: list[int],
    ) -> None:
        spec = small_spec(small_checkpoint, context)
        paths = iter(write_images(tmp_path, sum(lengths)))
        requests = [make_request(spec, list(itertools.islice(paths, length))) for length in lengths]
        LiveEncoder(str(small_checkpoint), spec, CPU).encode(requests)
        assert tower.frames == expected

    def test_what_was_halved_for_want_of_memory_stays_so(
        self, tmp_path: Path, small_checkpoint: Path, tower: TowerCalls
    ) -> None:
        spec = small_spec(small_checkpoint, "causal")
        request = make_request(spec, write_images(tmp_path, 9))
        tower.room = 4
        encoder = LiveEncoder(str(small_checkpoint), spec, CPU)
        for _ in range(2):
            encoder.encode([request])
        assert tower.frames[0] == 9
        assert max(tower.frames[1:]) == 4

    @pytest.mark.promise("Never silent")
    def test_an_encoder_with_other_weights_is_refused(self, tmp_path: Path, small_checkpoint: Path) -> None:
        request = make_request(small_spec(small_checkpoint, "frame"), write_images(tmp_path, 1))
        with pytest.raises(SettingsError, match="another encoder"):
            LiveEncoder(str(small_checkpoint), SPEC, CPU).encode([request])


class TestDamage:
    def test_a_damaged_record_is_computed_with_one_warning(
        self, tmp_path: Path, small_checkpoint: Path
    ) -> None:
        spec = small_spec(small_checkpoint, "frame")
        request = make_request(spec, write_images(tmp_path, 1))
        encoder = LiveEncoder(str(small_checkpoint), spec, CPU)
        (right,) = encoder.encode([request])
        filler = CacheFiller(str(tmp_path / "cache"), spec)
        filler.put([request], [right])
        filler.close()
        (shard,) = (tmp_path / "cache").rglob("*.safetensors")
        flip_a_bit(shard)
        source = make_source(spec, FeatureCache.open(tmp_path / "cache"), small_checkpoint)
        with pytest.warns(UserWarning, match="cannot be read from the cache and is computed") as warned:
            taken = [source.take([request])[0], source.take([request])[0]]
        assert torch.equal(taken[0], right)
        assert torch.equal(taken[1], right)
        assert len(warned) == 1
        assert (source.counts.hits, source.counts.misses) == (0, 2)

    def test_with_error_a_damaged_record_stops(self, tmp_path: Path) -> None:
        name = write_shard(tmp_path, [1])
        flip_a_bit(shard_path(tmp_path, name))
        source = make_source(SPEC, FeatureCache.open(tmp_path), None, miss="error")
        with pytest.raises(CorruptRecordError):
            source.take(requests_for([1]))

    @pytest.mark.parametrize(("failures", "succeeds"), [(2, True), (3, False)])
    def test_a_mount_that_stumbles_is_tried_again_a_bounded_number_of_times(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, succeeds: bool
    ) -> None:
        monkeypatch.setattr("vggt_cache.delivery.RETRY_PAUSES_S", (0.0, 0.0))
        write_shard(tmp_path, [1])
        disk = StumblingDisk()
        cache = FeatureCache.open(tmp_path, fs=disk)
        disk.failures = failures
        reader = ReadAhead(cache, CPU)
        read = reader.start(make_key(1))
        if succeeds:
            feature = reader.wait(read)
            assert feature is not None
            assert torch.equal(feature, make_feature(1))
        else:
            with pytest.raises(CacheAccessError):
                reader.wait(read)


class StumblingDisk(FileSystem):
    """Refuses the next `failures` reads of records."""

    failures = 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        return super().preadv(fd, buffers, offset)


class TestFilling:
    @pytest.mark.parametrize("context", CONTEXTS)
    def test_what_was_computed_is_found_after_a_refresh(
        self, tmp_path: Path, small_checkpoint: Path, context: str
    ) -> None:
        spec = small_spec(small_checkpoint, context)
        images = write_images(tmp_path, 3)
        requests = [make_request(spec, images[: n + 1]) for n in range(3)]
        filler = CacheFiller(str(tmp_path / "cache"), spec)
        cache = FeatureCache.open(tmp_path / "cache")
        source = make_source(spec, cache, small_checkpoint, miss="fill", filler=filler)
        computed = [feature.clone() for feature in source.take([*requests, requests[0]])]
        source.flush()
        source.refresh()
        assert len(cache) == 3  # each once
        stored = source.take(requests)
        for one, two in zip(computed, stored, strict=False):
            assert torch.equal(one, two)
        assert (source.counts.hits, source.counts.misses) == (3, 4)
        source.close()

    def test_closing_commits(self, tmp_path: Path, small_checkpoint: Path) -> None:
        spec = small_spec(small_checkpoint, "frame")
        filler = CacheFiller(str(tmp_path / "cache"), spec)
        cache = FeatureCache.open(tmp_path / "cache")
        source = make_source(spec, cache, small_checkpoint, miss="fill", filler=filler)
        source.take([make_request(spec, write_images(tmp_path, 1))])
        source.close()
        cache.refresh()
        assert len(cache) == 1


class Filling:
    """A source that fills a cache, what it says, and what it is asked for."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        spec = small_spec(checkpoint, "frame")
        self.cache_dir = folder / "cache"
        self.said: list[str] = []
        filler = CacheFiller(str(self.cache_dir), spec, warn=self.said.append)
        self.cache = FeatureCache.open(self.cache_dir)
        self.source = make_source(spec, self.cache, checkpoint, miss="fill", filler=filler)
        self.requests = [make_request(spec, [image]) for image in write_images(folder, 4)]
        self.right = LiveEncoder(str(checkpoint), spec, CPU).encode(self.requests)

    def epoch(self) -> None:
        """Every step gets the right features, wherever they come from."""
        for request, right in zip(self.requests, self.right, strict=True):
            torch.testing.assert_close(self.source.take([request])[0], right, rtol=1e-4, atol=1e-4)
            self.source.step_done()
        self.source.flush()
        self.source.refresh()


class TestWhatCannotBeStored:
    """Storing saves work: where it fails, training goes on."""

    @pytest.mark.parametrize(
        ("operation", "error"),
        [
            ("pwrite", errno.ENOSPC),
            ("fsync", errno.EDQUOT),
            ("open_directory", errno.ENOENT),
            ("link", errno.EROFS),
        ],
    )
    def test_it_is_computed_on_with_one_warning_and_a_count(
        self,
        tmp_path: Path,
        small_checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
        operation: str,
        error: int,
    ) -> None:
        filling = Filling(tmp_path, small_checkpoint)
        disk = failing(operation, error)
        monkeypatch.setattr("janusvln.features.computed.ShardWriter", partial(ShardWriter, fs=disk))
        for _ in range(2):
            filling.epoch()
        (warning,) = filling.said
        assert os.strerror(error) in warning
        assert "computed here and not stored, in every epoch again, and training goes on" in warning
        assert filling.source.not_stored == 4  # not eight: of the second epoch they are the same
        filling.source.close()
        assert filling.said[1:] == [
            f"4 of 4 features that were computed here are not stored in {filling.cache_dir}"
        ]
        assert (filling.source.counts.hits, filling.source.counts.misses) == (0, 8)
        assert len(filling.cache) == 0

    def test_the_last_commit_may_fail_too(
        self, tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filling = Filling(tmp_path, small_checkpoint)
        monkeypatch.setattr(
            "janusvln.features.computed.ShardWriter", partial(ShardWriter, fs=failing("fsync", errno.ENOSPC))
        )
        filling.source.take(filling.requests)
        filling.source.close()
        assert len(filling.said) == 2
        assert "disk is full" in filling.said[0]
        assert filling.said[1].startswith("4 of 4 features")

    def test_what_was_stored_before_is_found(
        self, tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filling = Filling(tmp_path, small_checkpoint)
        filling.source.take(filling.requests[:3])
        filling.source.flush()
        monkeypatch.setattr(
            "janusvln.features.computed.ShardWriter", partial(ShardWriter, fs=failing("pwrite", errno.ENOSPC))
        )
        filling.epoch()
        assert filling.source.not_stored == 1
        filling.source.take_counts()
        filling.epoch()
        assert (filling.source.counts.hits, filling.source.counts.misses) == (3, 1)
        filling.source.close()

    def test_the_directory_may_vanish(self, tmp_path: Path, small_checkpoint: Path) -> None:
        filling = Filling(tmp_path, small_checkpoint)
        filling.source.take(filling.requests[:3])
        filling.source.flush()
        shutil.rmtree(filling.cache_dir)
        for _ in range(2):
            filling.epoch()
        assert len(filling.said) == 1
        filling.source.close()
        assert not filling.cache_dir.exists()

    def test_what_others_have_stored_may_be_out_of_reach(
        self, tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(cache: FeatureCache) -> None:
            raise CacheAccessError("the mount is stale")

        filling = Filling(tmp_path, small_checkpoint)
        monkeypatch.setattr(FeatureCache, "refresh", refuse)
        with pytest.warns(UserWarning, match=r"computed instead.*the mount is stale"):
            filling.epoch()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filling.epoch()  # told once
        filling.source.close()
        assert filling.said == []

    def test_a_fault_of_our_own_still_ends_the_run(
        self, tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filling = Filling(tmp_path, small_checkpoint)
        monkeypatch.setattr("janusvln.features.computed.ShardWriter", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            filling.epoch()

    def test_what_is_not_finite_is_counted(self, tmp_path: Path, small_checkpoint: Path) -> None:
        filling = Filling(tmp_path, small_checkpoint)
        said: list[str] = []
        filler = CacheFiller(str(filling.cache_dir), small_spec(small_checkpoint, "frame"), warn=said.append)
        filler.put(filling.requests, [filling.right[0], filling.right[1] * torch.nan, *filling.right[2:]])
        filler.close()
        assert "is not finite" in said[0]
        assert said[1].startswith("1 of 4 features")
        filling.source.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_feature_that_int8_cannot_hold_is_not_made_finite(
    tmp_path: Path, small_checkpoint: Path, value: float
) -> None:
    """Else training would go on from rubbish."""
    spec = small_spec(small_checkpoint, "frame", feature_dtype="int8")
    feature = torch.ones(3, 4, 8, dtype=torch.bfloat16)
    feature[1, 2, 3] = value
    found = LiveEncoder(str(small_checkpoint), spec, CPU).as_stored(feature)
    assert torch.equal(found.isfinite(), feature.isfinite())
