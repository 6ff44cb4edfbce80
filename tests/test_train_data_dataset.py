"""A training sample: what it holds, how often its files are read, and what is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import janusvln.data.images as frames_module
from janusvln.data.dataset import DataOptions, NavigationDataset, sentence_of
from janusvln.data.dialogue import navigation_prompt
from small_data import write_image
from store_kit import make_feature
from train_data_kit import (
    CAUSAL,
    IMAGE,
    SPEC,
    SYSTEM,
    learned,
    make_dataset,
    talk,
    text_of,
    tiny_qwen,
    tiny_tokenizer,
    write_frames,
    write_records,
)
from vggt_cache.errors import DataError, SettingsError, VggtCacheError
from vggt_cache.frames import decode_frame
from vggt_cache.identity import FeatureSpec, feature_key, frame_digest
from vggt_cache.store import FeatureCache, ShardWriter, create_store

TALK = talk("<image><image>\nNow:<image> Go.", "TURN_LEFT")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three frames, and conversation samples of three, one and no frame."""
    names = write_frames(tmp_path / "data", 3)
    write_records(
        tmp_path / "data",
        [
            {"images": names, "conversations": TALK},
            {"images": names[2:], "conversations": talk("<image>?", "Left.")},
            {"conversations": talk("Who are you?", "Nobody.")},
        ],
    )
    return tmp_path / "data"


def cache_of(cache_dir: Path, spec: FeatureSpec, lists: Sequence[Sequence[Path]]) -> FeatureCache:
    with ShardWriter(create_store(cache_dir, spec), spec) as writer:
        for number, paths in enumerate(lists):
            key = feature_key(spec, [frame_digest(path.read_bytes()) for path in paths])
            writer.append(key, make_feature(number, spec))
        writer.commit()
    return FeatureCache.open(cache_dir, spec=spec)


def decoded(path: Path) -> torch.Tensor:
    return torch.from_numpy(decode_frame(path.read_bytes(), SPEC.preprocessing))


# ---------------------------------------------------------------- what a sample holds


def test_a_sample_holds_its_tokens_and_the_pixels_of_the_frames_that_vggt_sees(root: Path) -> None:
    dataset = make_dataset(root)
    item = dataset[0]
    assert text_of(item["input_ids"]) == (
        f"{SYSTEM}<|im_start|>user\n{IMAGE}{IMAGE}Now:{IMAGE} Go.<|im_end|>\n".replace(
            f"{IMAGE}Now", f"{IMAGE}Now"
        )
        + "<|im_start|>assistant\nTURN_LEFT<|im_end|>\n"
    )
    assert learned(item) == "TURN_LEFT<|im_end|>\n"
    assert item["image_grid_thw"].tolist() == [[1, 2, 4]] * 3
    assert item["position_ids"].shape == (3, len(item["input_ids"]))
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_qwen())
    shown = [decoded(root / f"{number}.png")[:28].numpy() for number in range(3)]
    expected = processor(shown, input_data_format="channels_last", return_tensors="pt")
    assert torch.equal(dataset.pixels.values(item["feature_request"].frames), expected["pixel_values"])
    assert torch.equal(item["image_grid_thw"], expected["image_grid_thw"])
    assert not {"loss_weights", "action_label", "action_position"} & set(item)


@pytest.mark.parametrize("spec", [SPEC, CAUSAL], ids=["frame", "causal"])
def test_the_key_is_the_caches_own_for_the_same_frames(root: Path, tmp_path: Path, spec: FeatureSpec) -> None:
    paths = [root / f"{number}.png" for number in range(3)]
    with cache_of(tmp_path / "cache", spec, [paths[:1]]) as cache:
        request = make_dataset(root, spec)[0]["feature_request"]
        assert request.key == cache.key_of(paths)
    used = paths[-1:] if spec.context == "frame" else paths
    assert request.paths == tuple(map(str, used))
    assert request.digests == tuple(frame_digest(path.read_bytes()) for path in used)
    assert request.grid == (3, 4)
    assert request.index == 0
    assert torch.equal(request.frames, torch.stack([decoded(path) for path in paths]))
    assert torch.equal(request.frames_used, torch.stack([decoded(path) for path in used]))


def test_a_sample_of_text_alone_has_no_images(root: Path) -> None:
    item = make_dataset(root)[2]
    assert set(item) == {"input_ids", "labels", "position_ids"}
    assert item["position_ids"].tolist() == [list(range(len(item["input_ids"])))] * 3


def test_a_file_is_read_once_for_pixels_and_digest_however_often_it_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(
        root, [{"images": ["0.png", "0.png", "./0.png", "1.png"], "conversations": talk("<image>" * 4, "x")}]
    )
    read: list[str] = []
    real = frames_module.read_in_state
    monkeypatch.setattr(frames_module, "read_in_state", lambda path: read.append(str(path)) or real(path))
    request = make_dataset(root, CAUSAL)[0]["feature_request"]
    assert read == [str(root / "0.png"), str(root / "1.png")]
    assert torch.equal(
        request.frames, torch.stack([decoded(root / f"{number}.png") for number in (0, 0, 0, 1)])
    )


def test_a_step_of_an_episode_folder_is_a_structured_sample(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "17"
    for number, action in enumerate(["MOVE_FORWARD", "stop"]):
        write_image(folder / f"step_{number:04d}_{action}.png", number)
    (folder / "milestones_result.json").write_text(
        json.dumps({"instruction_text": "Go\nout.", "subinstructions": ["Turn."]})
    )
    (folder / "step_0001_stop.json").write_text(json.dumps({"spatial_description": "near"}))
    dataset = make_dataset(tmp_path, CAUSAL, action_head=True)
    item = dataset[1]
    assert text_of(item["input_ids"]) == (
        f"{SYSTEM}<|im_start|>user\n{navigation_prompt('Go out.', 9).replace('<image>', IMAGE)}<|im_end|>\n"
        "<|im_start|>assistant\nSUBINSTRUCTION: Turn.\n3D_DESCRIPTION: near\nACTION: STOP<|im_end|>\n"
    )
    paths = [str(folder / "step_0000_MOVE_FORWARD.png")] * 8 + [str(folder / "step_0001_stop.png")]
    assert list(item["feature_request"].paths) == paths
    assert item["action_label"] == 0
    assert learned(dataset[0]).endswith("ACTION: MOVE_FORWARD<|im_end|>\n")


def test_with_an_action_head_a_sample_says_its_class_and_the_last_token_of_its_prompt(root: Path) -> None:
    dataset = make_dataset(root, action_head=True)
    first, second = dataset[0], dataset[1]
    assert (first["action_label"], second["action_label"]) == (2, -100)
    assert text_of(first["input_ids"][: first["action_position"] + 1]).endswith("<|im_start|>assistant\n")
    assert first["labels"][first["action_position"]] == -100
    assert first["labels"][first["action_position"] + 1] != -100


def test_with_weights_every_sample_carries_them(root: Path) -> None:
    write_records(
        root,
        [
            {"image": "0.png", "instruction": "x", "subinstruction": "y", "action": 0},
            {"image": "0.png", "conversations": talk("<image>", "z")},
        ],
    )
    structured, conversation = (make_dataset(root, action_weight=2.0)[at] for at in range(2))
    weights = structured["loss_weights"]
    assert text_of(structured["input_ids"][weights == 2.0]) == "ACTION: STOP<|im_end|>\n"
    assert text_of(structured["input_ids"][weights == 1.0]) == "SUBINSTRUCTION: y\n"
    assert torch.equal(conversation["loss_weights"], (conversation["labels"] != -100).float())


def test_lengths_are_known_without_reading_a_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(root)
    monkeypatch.setattr(NavigationDataset, "__getitem__", None)
    assert list(dataset.lengths) == [3 * 252 + 4, 252 + 2, 4]


# ---------------------------------------------------------------- what is refused


def refusal(root: Path, record: dict[str, Any], **options: Any) -> str:
    write_records(root, [record])
    with pytest.raises(DataError) as refused:
        make_dataset(root, CAUSAL, **options)[0]
    sentence = str(refused.value)
    assert sentence.startswith(f"the sample {root}/train.jsonl:1 ")
    assert "\n" not in sentence
    return sentence


def test_a_missing_image_stops_training_and_no_other_sample_takes_its_place(root: Path) -> None:
    (root / "1.png").unlink()
    assert f"needs a frame that cannot be used: '{root}/1.png' does not exist" in refusal(
        root, {"images": ["0.png", "1.png", "2.png"], "conversations": TALK}
    )


def test_a_damaged_image_is_named_with_its_sample(root: Path) -> None:
    whole = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(whole[: len(whole) // 2])
    sentence = refusal(root, {"image": "1.png", "conversations": talk("<image>", "x")})
    assert f"needs a frame that cannot be used: {root}/1.png: it is damaged or cut short" in sentence


def test_tags_and_frames_that_differ_are_refused(root: Path) -> None:
    sentence = refusal(root, {"images": ["0.png", "1.png"], "conversations": TALK})
    assert "has 3 <image> tags in its questions but names 2 frames" in sentence
    assert "has 2 <image> tags" in refusal(root, {"image": "0.png", "instruction": "<image>go", "action": 1})


def test_a_sample_that_is_too_long_is_refused_and_one_that_just_fits_is_not(root: Path) -> None:
    record = {"images": ["0.png", "1.png", "2.png"], "conversations": TALK}
    write_records(root, [record])
    length = len(make_dataset(root)[0]["input_ids"])
    assert len(make_dataset(root, model_max_length=length)[0]["input_ids"]) == length
    sentence = refusal(root, record, model_max_length=length - 1)
    assert f"has {length} tokens with its 3 frames, over --model_max_length {length - 1}" in sentence


def test_longer_histories_than_allowed_are_refused(root: Path) -> None:
    record = {"images": ["0.png", "1.png", "2.png"], "conversations": TALK}
    assert "has 2 earlier frames, over --max_history_images 1" in refusal(root, record, max_history_images=1)
    write_records(root, [record])
    assert make_dataset(root, max_history_images=2)[0]["image_grid_thw"].shape == (3, 3)


def test_frames_of_different_sizes_are_refused(root: Path) -> None:
    write_image(root / "tall.png", 9, (48, 64))
    record = {"images": ["0.png", "tall.png"], "conversations": talk("<image><image>", "x")}
    assert "has frames of different sizes (3x4 and 4x4 patches)" in refusal(root, record)


def test_images_that_qwen_would_resize_are_refused(root: Path) -> None:
    record = {"image": "0.png", "conversations": talk("<image>", "x")}
    sentence = refusal(root, record, max_pixels=1000)
    assert "have 1568 pixels, outside the model's 784 to 1000: its processor would resize them" in sentence


def test_texts_of_an_episode_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    write_image(folder / "step_0_STOP.png", 1)
    (folder / "milestones_result.json").write_text("{}")
    with pytest.raises(DataError, match=r"milestones_result\.json has no instruction_text"):
        make_dataset(tmp_path)[0]
    (folder / "milestones_result.json").write_text('{"instruction_text": "x"}')
    (folder / "step_0_STOP.png").rename(folder / "step_0_JUMP.png")
    with pytest.raises(DataError, match=r"the sample .*/1:0 has the action 'JUMP'"):
        make_dataset(tmp_path)[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_max_length": 0}, "--model_max_length is 0"),
        ({"max_history_images": -1}, "--max_history_images is -1"),
        ({"action_weight": -0.5}, "--action_weight is -0.5, which is no weight"),
        ({"desc2d_weight": float("nan")}, "--desc2d_weight is nan"),
        (
            dict.fromkeys(["subinstruction_weight", "desc2d_weight", "desc3d_weight", "action_weight"], 0),
            "are all 0",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        DataOptions(**options)


def test_a_directory_without_a_model_is_refused(root: Path, tmp_path: Path) -> None:
    index = make_dataset(root).index
    for content in (None, '{"model_type": "llama"}'):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(SettingsError, match=r"config\.json that can be read|holds a llama"):
            NavigationDataset(
                index, tiny_tokenizer(), model_dir=str(tmp_path), spec=SPEC, options=DataOptions()
            )


# ---------------------------------------------------------------- workers


def only(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = [name for name in first if isinstance(first[name], torch.Tensor)]
    requests = [
        vars(item["feature_request"]).copy() if "feature_request" in item else {} for item in (first, second)
    ]
    frames = [request.pop("frames", None) for request in requests]
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in tensors)
        and requests[0] == requests[1]
        and (frames[0] is None) == (frames[1] is None)
        and (frames[0] is None or torch.equal(frames[0], frames[1]))
    )


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_make_the_same_samples(root: Path, method: str) -> None:
    dataset = make_dataset(root, CAUSAL)
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context=method, collate_fn=only)
    for at, item in enumerate(loader):
        assert same(item, dataset[at])
    assert at == 2


def test_a_workers_error_keeps_its_class_and_its_sentence(root: Path) -> None:
    records = [
        {"conversations": talk("x", "y")},
        {"image": "gone.png", "conversations": talk("<image>", "x")},
    ]
    write_records(root, records)
    dataset = make_dataset(root, CAUSAL)
    arriving = iter(DataLoader(dataset, num_workers=2, multiprocessing_context="fork", collate_fn=only))
    assert same(next(arriving), dataset[0])
    with pytest.raises(DataError) as direct:
        dataset[1]
    with pytest.raises(DataError) as travelled:
        next(arriving)
    assert (
        list(arriving) == []
    )  # the workers leave at the end; torch's garbage collection would wait for each
    assert str(travelled.value).startswith("Caught DataError in DataLoader worker process 1")
    assert sentence_of(travelled.value) == str(direct.value)


@pytest.mark.parametrize("kind", [DataError, SettingsError])
@pytest.mark.parametrize("sentence", ["plain", "with\na line break: x", "Caught DataError in it"])
def test_a_sentence_is_found_again_behind_a_workers_traceback(
    kind: type[VggtCacheError], sentence: str
) -> None:
    try:
        try:
            raise ValueError("cause")
        except ValueError as cause:
            raise kind(sentence) from cause
    except VggtCacheError as error:
        told = "".join(traceback.format_exception(error))
    assert (
        sentence_of(kind(f"Caught {kind.__name__} in DataLoader worker process 1.\nOriginal {told}"))
        == sentence
    )
    assert sentence_of(kind(sentence)) == sentence


def test_a_moved_data_set_has_the_same_keys(root: Path, tmp_path: Path) -> None:
    keys = [make_dataset(root, CAUSAL)[at]["feature_request"].key for at in range(2)]
    shutil.move(root, tmp_path / "elsewhere")
    assert [
        make_dataset(tmp_path / "elsewhere", CAUSAL)[at]["feature_request"].key for at in range(2)
    ] == keys
