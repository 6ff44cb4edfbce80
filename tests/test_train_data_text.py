"""Token ids, labels and weights: written out by hand, and the published trainer's rules one by one."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from janusvln.data.dialogue import (
    Dialogue,
    Segment,
    Turn,
    UnfitSampleError,
    action_class,
    check_dialogue,
    navigation_prompt,
    read_conversation,
    read_structured,
)
from janusvln.data.tokens import ChatEncoder, Tokens
from janusvln.demo.tiny_qwen import SPECIAL_TOKENS, TOKEN_IDS, VOCABULARY
from train_data_kit import IMAGE, SYSTEM, talk, text_of, tiny_tokenizer
from vggt_cache.samples import Sample

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


def encode(turns: list[Any], image_tokens: list[int] | None = None) -> Tokens:
    dialogue = read_conversation({"conversations": turns})
    return ChatEncoder(tiny_tokenizer()).encode(dialogue, image_tokens or [])


def learned_of(tokens: Tokens) -> str:
    return text_of([label for label in tokens.labels if label != -100])


# ---------------------------------------------------------------- conversations


def test_a_conversation_becomes_chatml_with_images_and_only_the_answer_is_learned() -> None:
    tokens = encode(talk("Was:<image>\nNow:<image>. Go é", "TURN_LEFT"), [2, 3])
    second = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
    assert text_of(tokens.input_ids) == (
        f"{SYSTEM}{USER}Was:{IMAGE}Now:{second}. Go é{END}{ASSISTANT}TURN_LEFT{END}"
    )
    assert learned_of(tokens) == f"TURN_LEFT{END}"
    prompt = text_of(tokens.input_ids[: tokens.answer_start])
    assert prompt.endswith(f"{END}{ASSISTANT}")
    where_learned = [label != -100 for label in tokens.labels]
    assert [token for token, on in zip(tokens.input_ids, where_learned, strict=True) if on] == [
        label for label in tokens.labels if label != -100
    ]
    assert tokens.weights == [float(on) for on in where_learned]


def test_ids_are_those_of_the_whole_text() -> None:
    tokens = encode(talk("Was:<image>\nNow:<image>. Go é", "TURN_LEFT"), [2, 2])
    text = f"{SYSTEM}{USER}Was:{IMAGE}Now:{IMAGE}. Go é{END}{ASSISTANT}TURN_LEFT{END}"
    assert tokens.input_ids == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_several_answers_are_all_learned() -> None:
    turns = [*talk("a", "one"), *talk("b", "two")]
    tokens = encode(turns)
    assert text_of(tokens.input_ids) == (
        f"{SYSTEM}{USER}a{END}{ASSISTANT}one{END}{USER}b{END}{ASSISTANT}two{END}"
    )
    assert learned_of(tokens) == f"one{END}two{END}"
    assert text_of(tokens.input_ids[tokens.answer_start :]) == f"two{END}"


def test_line_breaks_behind_tags_go_in_the_first_message_only() -> None:
    turns = [*talk("<image>\nx", "one"), *talk("<image>\ny", "two")]
    assert text_of(encode(turns, [2, 2]).input_ids) == (
        f"{SYSTEM}{USER}{IMAGE}x{END}{ASSISTANT}one{END}{USER}{IMAGE}\ny{END}{ASSISTANT}two{END}"
    )


def test_a_leading_answer_is_left_out_and_counts_as_the_first_message() -> None:
    turns = [{"from": "gpt", "value": "hello"}, *talk("<image>\nx", "one")]
    assert text_of(encode(turns, [2]).input_ids) == f"{SYSTEM}{USER}{IMAGE}\nx{END}{ASSISTANT}one{END}"


def test_tags_in_answers_are_text() -> None:
    assert learned_of(encode(talk("x", "see <image>"))) == f"see <image>{END}"


def test_roles_may_have_openais_names_and_a_system_message_is_kept_behind_the_default() -> None:
    turns = [
        {"role": "system", "content": "Be <image> brief."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    tokens = encode(turns)
    assert text_of(tokens.input_ids) == (
        f"{SYSTEM}<|im_start|>system\nBe <image> brief.{END}{USER}x{END}{ASSISTANT}y{END}"
    )
    assert learned_of(tokens) == f"y{END}"


def qwen_like() -> PreTrainedTokenizerFast:
    """Roles and double line breaks are one token, as in Qwen's vocabulary."""
    vocabulary, merges = dict(VOCABULARY), []
    for word in ("system", "user", "assistant", "ĊĊ"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = 1000 + len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("answer", ["STOP", "\nSTOP", "\n\nSTOP"])
def test_of_an_answer_exactly_the_first_three_tokens_are_not_learned(answer: str) -> None:
    tokenizer = qwen_like()
    dialogue = read_conversation({"conversations": talk("go", answer)})
    tokens = ChatEncoder(tokenizer).encode(dialogue, [])
    message = tokenizer(f"{ASSISTANT}{answer}{END}", add_special_tokens=False)["input_ids"]
    assert tokens.input_ids[-len(message) :] == message
    assert tokens.labels == [-100] * (len(tokens.labels) - len(message) + 3) + message[3:]
    assert tokens.answer_start == len(tokens.labels) - len(message) + 3
    assert len(tokenizer(ASSISTANT)["input_ids"]) == 3


@pytest.mark.parametrize(
    ("answer", "action"),
    [("STOP", 0), ("MOVE_FORWARD", 1), ("TURN_LEFT", 2), (" turn_right\n", 3), ("LEFT", -100), ("2", -100)],
)
def test_an_answer_that_is_the_name_of_an_action_has_its_class(answer: str, action: int) -> None:
    assert read_conversation({"conversations": talk("x", answer)}).action == action


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("stop", 0),
        ("Move_Forward", 1),
        (" 2 ", 2),
        ("3", 3),
        ("4", -100),
        ("-1", -100),
        ("²", -100),
        ("", -100),
    ],
)
def test_actions_have_names_and_numbers(name: str, action: int) -> None:
    assert action_class(name) == action


# ---------------------------------------------------------------- structured samples

RECORD = {
    "instruction": "Leave the\n room.",
    "subinstruction": "Go to the door.",
    "2D_description": "a door on the left",
    "3D_description": "the door is 2 m away",
    "action": "turn_left",
}


def structured(record: dict[str, Any], frames: int = 1) -> Sample:
    names = tuple(f"{number}.png" for number in range(frames))
    return Sample(frames=names, bases=("/",), source="a.jsonl:1", record=record, layout="structured")


def answer_of(record: dict[str, Any]) -> str:
    return read_structured(structured(record), (1, 1, 1, 1)).turns[1].text


def test_a_structured_sample_is_asked_for_four_lines() -> None:
    dialogue = read_structured(structured(RECORD, frames=3), (1.0, 1.0, 1.0, 1.0))
    assert dialogue.turns[0].text == navigation_prompt("Leave the room.", 3)
    assert navigation_prompt("Leave the room.", 3).count("<image>") == 3
    assert "Earlier views:<image><image>\nCurrent view:<image>\n" in navigation_prompt("x", 3)
    assert "Earlier views:\nCurrent view:<image>\n" in navigation_prompt("x", 1)
    assert dialogue.turns[1].text == (
        "SUBINSTRUCTION: Go to the door.\n"
        "2D_DESCRIPTION: a door on the left\n"
        "3D_DESCRIPTION: the door is 2 m away\n"
        "ACTION: TURN_LEFT"
    )
    assert dialogue.action == 2


def test_each_line_is_learned_with_its_weight_and_the_end_with_the_last() -> None:
    dialogue = read_structured(structured(RECORD), (0.5, 2.0, 3.0, 4.0))
    tokens = ChatEncoder(tiny_tokenizer()).encode(dialogue, [2])
    stretches = {
        weight: text_of([t for t, w in zip(tokens.input_ids, tokens.weights, strict=True) if w == weight])
        for weight in (0.5, 2.0, 3.0, 4.0)
    }
    assert stretches == {
        0.5: "SUBINSTRUCTION: Go to the door.\n",
        2.0: "2D_DESCRIPTION: a door on the left\n",
        3.0: "3D_DESCRIPTION: the door is 2 m away\n",
        4.0: f"ACTION: TURN_LEFT{END}",
    }
    assert learned_of(tokens) == "".join(stretches.values())
    assert all(
        (weight == 0) == (label == -100) for weight, label in zip(tokens.weights, tokens.labels, strict=True)
    )
    assert text_of(tokens.input_ids[tokens.answer_start :]) == "".join(stretches.values())


def test_lines_without_text_are_left_out() -> None:
    assert answer_of({"instruction": "x", "action": 3}) == "ACTION: TURN_RIGHT"
    assert (
        answer_of({"instruction": "x", "subinstruction": "y", "2D_description": " "}) == "SUBINSTRUCTION: y"
    )
    assert answer_of({**RECORD, "2D_description": None, "action": None}) == (
        "SUBINSTRUCTION: Go to the door.\n3D_DESCRIPTION: the door is 2 m away"
    )


@pytest.mark.parametrize("name", ["instruction", "instruction_text", "full_instruction"])
def test_an_instruction_has_several_names(name: str) -> None:
    dialogue = read_structured(structured({name: "Leave.", "action": 0}), (1, 1, 1, 1))
    assert dialogue.turns[0].text == navigation_prompt("Leave.", 1)


def test_of_several_wordings_the_first_is_taken() -> None:
    dialogue = read_structured(structured({"instructions": ["Leave.", "Go."], "action": 0}), (1, 1, 1, 1))
    assert dialogue.turns[0].text == navigation_prompt("Leave.", 1)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sub_instruction", "SUBINSTRUCTION"), ("sub_instruction_text", "SUBINSTRUCTION"),
        ("2d_description", "2D_DESCRIPTION"), ("description_2d", "2D_DESCRIPTION"),
        ("3d_description", "3D_DESCRIPTION"), ("description_3d", "3D_DESCRIPTION"),
    ],
)  # fmt: skip
def test_texts_have_several_names_and_are_one_line(name: str, line: str) -> None:
    assert answer_of({"instruction": "x", name: "a\n b "}) == f"{line}: a b"


@pytest.mark.parametrize("name", ["action", "action_label", "actions"])
@pytest.mark.parametrize("value", ["move_forward", 1, "1", ["MOVE_FORWARD"]])
def test_an_action_has_several_names_and_spellings(name: str, value: object) -> None:
    assert answer_of({"instruction": "x", name: value}) == "ACTION: MOVE_FORWARD"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        ([], "has no messages"),
        (None, "has no messages"),
        ("hello", "has no messages"),
        (["hello"], r"has a message \(number 1\)"),
        ([{"from": "human"}], r"has a message \(number 1\) without text"),
        (
            [*talk("a", "b"), {"from": "tool", "value": "x"}],
            r"has a message \(number 3\) .* unknown speaker \('tool'\)",
        ),
        ([{"value": "x"}], r"unknown speaker \(None\)"),
        ([{"from": ["human"], "value": "x"}], "has a message"),
    ],
)
def test_messages_without_text_or_speaker_are_refused(conversations: object, reason: str) -> None:
    with pytest.raises(UnfitSampleError, match=reason):
        read_conversation({"conversations": conversations})


def test_videos_are_refused() -> None:
    with pytest.raises(UnfitSampleError, match="names a video, which is not read"):
        read_conversation({"video": "a.mp4", "conversations": talk("<video> x", "y")})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"action": 1}, "has no instruction .looked for instruction, instruction_text"),
        ({"instruction": " ", "action": 1}, "has no instruction"),
        ({"instruction": 5, "action": 1}, "has a int where instruction is a text"),
        ({"instruction": "x", "subinstruction": {"a": 1}}, "has a dict where subinstruction is a text"),
        (
            {"instruction": "x", "action": "JUMP"},
            "has the action 'JUMP', which is not one of STOP, MOVE_FORWARD",
        ),
        ({"instruction": "x", "action": 4}, "has the action '4'"),
        ({"instruction": "x", "action": True}, "has the action 'True'"),
        ({"instruction": "x", "action": 1.5}, "has the action '1.5'"),
    ],
)
def test_structured_samples_that_cannot_be_asked_are_refused(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnfitSampleError, match=reason):
        read_structured(structured(record), (1, 1, 1, 1))


def test_a_structured_sample_without_a_frame_is_refused() -> None:
    with pytest.raises(UnfitSampleError, match="names no image"):
        read_structured(structured(RECORD, frames=0), (1, 1, 1, 1))


def dialogue_of(question: str, answer: str, weight: float = 1.0) -> Dialogue:
    return Dialogue((Turn("user", (Segment(question),)), Turn("assistant", (Segment(answer, weight),))))


@pytest.mark.parametrize(
    ("dialogue", "frames", "reason"),
    [
        (dialogue_of("<image>", "x"), 2, "has 1 <image> tags in its questions but names 2 frames"),
        (dialogue_of("<image><image>", "x"), 1, "has 2 <image> tags in its questions but names 1 frames"),
        (dialogue_of("x", "<image>"), 1, "has 0 <image> tags"),
        (dialogue_of("<|image_pad|>", "x"), 0, r"has <\|image_pad\|> in a text"),
        (dialogue_of("x", "<|video_pad|>"), 0, r"has <\|video_pad\|> in a text"),
        (dialogue_of("x", "y", 0.0), 0, "has no answer to learn from"),
        (Dialogue((Turn("user", (Segment("x"),)),)), 0, "has no answer to learn from"),
        (
            Dialogue((Turn("user", (Segment("x"),)), Turn("assistant", ()))),
            0,
            "has no answer to learn from",
        ),
    ],
)
def test_texts_that_do_not_fit_their_frames_are_refused(dialogue: Dialogue, frames: int, reason: str) -> None:
    with pytest.raises(UnfitSampleError, match=reason):
        check_dialogue(dialogue, frames)


def test_the_tiny_vocabulary_has_the_tokens_that_stand_for_images() -> None:
    assert ChatEncoder(tiny_tokenizer()).image_token == TOKEN_IDS["<|image_pad|>"]
