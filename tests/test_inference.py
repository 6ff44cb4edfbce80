"""Answers of a trained model: one by one, several at once, frame by frame or as a list, they are the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from evaluation_kit import PROMPT, make_frames, write_trained
from janusvln.data.dialogue import read_conversation
from janusvln.data.images import QwenPixels
from janusvln.data.tokens import ChatEncoder
from janusvln.inference import Answer, Navigator, Prompt
from janusvln.inference.prompt import action_of
from vggt_cache.encoder import Checkpoint
from vggt_cache.encoder.causal import encode_lists
from vggt_cache.errors import CheckpointError, FrameError, SettingsError
from vggt_cache.frames import decode_frame
from vggt_cache.identity import Preprocessing

INSTRUCTION = "walk to the door"
STEPS = 12
TOKENS = 8


@pytest.fixture(scope="module")
def trained(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained(tmp_path_factory.mktemp("trained"), small_checkpoint, lam=2.0)


@pytest.fixture(scope="module")
def navigator(trained: Path, small_checkpoint: Path) -> Navigator:
    return Navigator.load(
        str(trained), str(small_checkpoint), Prompt(text=PROMPT), device="cpu", max_new_tokens=TOKENS
    )


@pytest.fixture(scope="module")
def frames() -> list[npt.NDArray[np.uint8]]:
    return make_frames(STEPS)


@pytest.fixture(scope="module")
def streamed(navigator: Navigator, frames: list[npt.NDArray[np.uint8]]) -> list[Answer]:
    episode = navigator.start(INSTRUCTION)
    return [navigator.act(episode, frame) for frame in frames]


def png(frame: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def test_frame_by_frame_it_answers_as_to_the_whole_list(
    navigator: Navigator, frames: list[npt.NDArray[np.uint8]], streamed: list[Answer]
) -> None:
    assert len({answer.text for answer in streamed}) > STEPS // 2  # what it sees matters
    for count in (1, 2, 9, 10, STEPS):
        assert navigator.answer_list(frames[:count], INSTRUCTION) == streamed[count - 1], count


def test_it_asks_what_training_asked_and_shows_what_training_showed(
    navigator: Navigator,
    trained: Path,
    frames: list[npt.NDArray[np.uint8]],
    streamed: list[Answer],
    small_checkpoint: Path,
) -> None:
    """Against the parts of training: a sample of nine frames, its feature that of all frames as a causal list."""
    seen = [torch.from_numpy(decode_frame(png(frame), Preprocessing(image_size=56))) for frame in frames]
    encoder = Checkpoint.open(str(small_checkpoint)).load()
    ((_, feature),) = encode_lists(encoder, [range(STEPS)], lambda index: seen[int(str(index))], batch_size=1)
    shown = [seen[index] for index in np.linspace(0, STEPS - 1, 9, dtype=int)]
    text = PROMPT.replace("{history}", "<image>" * 8).replace("{instruction}", INSTRUCTION)
    said = [{"from": "human", "value": text}, {"from": "gpt", "value": "STOP"}]
    pixels = QwenPixels(str(trained))
    tokens = ChatEncoder(navigator._tokenizer).encode(read_conversation({"conversations": said}), [2] * 9)
    prompt = torch.tensor([tokens.input_ids[: tokens.answer_start]])
    inputs: dict[str, Any] = {"input_ids": prompt, "pixel_values": pixels.values(torch.stack(shown))}
    inputs["image_grid_thw"] = [(1, 2, 4)] * 9
    said = navigator._model.generate(**inputs, spatial_features=[feature], **navigator._settings)
    assert navigator._answer(said[0, prompt.shape[1] :]) == streamed[-1]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_episodes_answered_together_are_answered_as_alone(
    navigator: Navigator,
    frames: list[npt.NDArray[np.uint8]],
    penalty: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of different lengths, so that all but the longest are padded; a repetition penalty must not see the padding."""
    monkeypatch.setattr(navigator._model.generation_config, "repetition_penalty", penalty)
    generate, given = navigator._model.generate, []
    monkeypatch.setattr(
        navigator._model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs)
    )
    episodes = []
    for count, instruction in ((1, "stop"), (5, "turn left and walk past the table"), (3, "")):
        episodes.append(navigator.start(instruction))
        for frame in frames[:count]:
            episodes[-1].see(frame)
    alone = [navigator.answer([episode])[0] for episode in episodes]
    assert len({answer.text for answer in alone}) == 3
    assert navigator.answer(episodes) == alone
    assert navigator.answer(episodes[::-1]) == alone[::-1]
    for ids, mask in zip(given[-1]["input_ids"], given[-1]["attention_mask"].bool(), strict=True):
        assert set(ids[~mask].tolist()) <= set(ids[mask].tolist())


def test_a_right_padded_prompt_is_refused(navigator: Navigator) -> None:
    inputs = {"input_ids": torch.tensor([[10, 20, 30], [10, 20, 0]])}
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(SettingsError, match="row 1 of attention_mask is padded on the right"):
        navigator._model.generate(**inputs, attention_mask=mask, max_new_tokens=1)
    navigator._model.generate(**inputs, attention_mask=mask.flip(1), max_new_tokens=1)


def test_a_file_and_its_pixels_are_the_same_frame(
    navigator: Navigator, frames: list[npt.NDArray[np.uint8]], streamed: list[Answer]
) -> None:
    assert navigator.answer_list([png(frame) for frame in frames], INSTRUCTION) == streamed[-1]


def test_answers_may_be_asked_again_and_change_nothing(
    navigator: Navigator, frames: list[npt.NDArray[np.uint8]], streamed: list[Answer]
) -> None:
    episode = navigator.start(INSTRUCTION)
    for frame, answer in zip(frames[:3], streamed, strict=False):
        episode.see(frame)
        assert [navigator.answer([episode])[0] for _ in range(2)] == [answer, answer]


def test_a_refused_frame_leaves_the_episode_as_it_was(
    navigator: Navigator, frames: list[npt.NDArray[np.uint8]], streamed: list[Answer]
) -> None:
    episode = navigator.start(INSTRUCTION)
    navigator.act(episode, frames[0])
    refused: list[tuple[Any, str]] = [
        (np.zeros((64, 48, 3), np.uint8), "becomes 56 x 56 pixels, and the episode's first became 56 x 42"),
        (np.zeros((48, 64, 4), np.uint8), r"not uint8 \[48, 64, 4\]"),
        (np.zeros((48, 64, 3), np.float32), "not float32"),
        (b"no image", "it is no image in a format that is read"),
    ]
    for frame, sentence in refused:
        with pytest.raises(FrameError, match=sentence):
            episode.see(frame)
    assert navigator.act(episode, frames[1]) == streamed[1]


def test_an_episode_that_has_seen_nothing_has_no_answer(navigator: Navigator) -> None:
    with pytest.raises(FrameError, match="has seen no frame yet"):
        navigator.answer([navigator.start(INSTRUCTION)])


def test_in_frame_context_earlier_frames_do_not_enter_the_feature(
    small_checkpoint: Path, tmp_path: Path, frames: list[npt.NDArray[np.uint8]]
) -> None:
    trained = write_trained(tmp_path, small_checkpoint, context="frame")
    navigator = Navigator.load(str(trained), str(small_checkpoint), Prompt(), device="cpu", max_new_tokens=4)
    features = []
    for first in frames[:2]:
        episode = navigator.start(INSTRUCTION)
        for frame in (first, frames[2]):
            episode.see(frame)
        features.append(episode.feature)
    assert features[0] is not None
    assert features[1] is not None
    assert torch.equal(features[0], features[1])


def test_the_wrong_vggt_and_a_model_that_does_not_say_its_features_are_refused(
    trained: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="does not say which features it was trained with"):
        Navigator.load(str(trained.parent / "qwen"), str(small_checkpoint), Prompt(), device="cpu")
    other = tmp_path / "other"
    other.mkdir()
    config = (trained / "config.json").read_text().replace('"weights_digest": "', '"weights_digest": "0')
    for path in trained.iterdir():
        (other / path.name).symlink_to(path)
    (other / "config.json").unlink()
    (other / "config.json").write_text(config)
    with pytest.raises(SettingsError, match="holds another VGGT"):
        Navigator.load(str(other), str(small_checkpoint), Prompt(), device="cpu")


# ---------------------------------------------------------------- prompts and answers


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("TURN_LEFT", "TURN_LEFT"),
        ("SUBINSTRUCTION: go\n3D_DESCRIPTION: a wall\nACTION: MOVE_FORWARD", "MOVE_FORWARD"),
        (" stop \n", "STOP"),
        ("TURN_LEFT and then TURN_RIGHT", None),
        ("ACTION: TURN_LEFT\nand so on", None),
        ("", None),
    ],
)
def test_the_action_is_the_last_line_of_an_answer(text: str, action: str | None) -> None:
    assert action_of(text) == action


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{history} {instruction}", "the prompt has 0 times <image>"),
        ("<image><image>{instruction}", "the prompt has 2 times <image>"),
        ("<image>", "0 times {instruction}"),
        ("<image>{history}{instruction}", "{history} behind <image>"),
        ("<|image_pad|><image>{instruction}", r"the prompt has <\|image_pad\|> in it"),
    ],
)
def test_a_prompt_that_does_not_show_the_current_view_last_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        Prompt(text=text)


def test_an_instruction_with_an_image_tag_is_refused(navigator: Navigator) -> None:
    with pytest.raises(SettingsError, match="the instruction has <image> in it"):
        navigator.start("look at <image>")


def test_a_prompt_without_history_shows_the_current_view_alone(
    navigator: Navigator, frames: list[npt.NDArray[np.uint8]]
) -> None:
    lone = Navigator(
        navigator._model,
        navigator._tokenizer,
        navigator._pixels,
        navigator._encoder,
        Prompt(text="<image>{instruction}"),
        max_new_tokens=TOKENS,
    )
    assert lone.answer_list(frames[:3], INSTRUCTION).text
    with pytest.raises(SettingsError, match="max_new_tokens is 0"):
        Navigator(
            navigator._model,
            navigator._tokenizer,
            navigator._pixels,
            navigator._encoder,
            Prompt(),
            max_new_tokens=0,
        )
