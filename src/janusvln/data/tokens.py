"""From a dialogue to token ids, labels, loss weights and positions: ChatML as Qwen2.5 has it, message after message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from janusvln.data.dialogue import IMAGE_TAG, SYSTEM_MESSAGE, Dialogue, Segment, Turn

NOT_LEARNED = -100

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_HEADER = "<|im_start|>{}\n"
_END = "<|im_end|>\n"


@dataclass(slots=True)
class Tokens:
    """The tokens of one sample; the three lists have one length."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """-100 where nothing is learned: everywhere but in answers, and there on the message's header."""
    weights: list[float] = field(default_factory=list)
    """Of the loss of each token; 0 where nothing is learned."""
    answer_start: int = 0
    """Where the first learned token of the last answer is; the one before it is the last of the prompt."""

    def add(self, ids: Sequence[int], *, hidden: int, weight: float = 0.0) -> None:
        """`hidden`: how many of the ids, from the first on, are not learned."""
        self.input_ids += ids
        self.labels += [NOT_LEARNED] * hidden
        self.labels += ids[hidden:]
        self.weights += [0.0] * hidden + [weight] * (len(ids) - hidden)


class ChatEncoder:
    """Encodes dialogues with one tokenizer. An image is `<|image_pad|>` n times between the vision marks."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.image_token: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        # 3 tokens in Qwen's vocabulary. Counted, not cut at the text: "\n\n" is one token, and belongs to the header.
        self._hidden = len(self._ids(_HEADER.format("assistant")))

    def encode(self, dialogue: Dialogue, image_tokens: Sequence[int]) -> Tokens:
        """`image_tokens`: for each image tag, in order, how many tokens its image takes."""
        tokens = Tokens()
        places = iter(image_tokens)
        for turn in (Turn("system", (Segment(SYSTEM_MESSAGE),)), *dialogue.turns):
            if turn.role == "assistant":
                self._add_answer(tokens, turn)
            else:
                ids = self._question(turn, places)
                tokens.add(ids, hidden=len(ids))
        return tokens

    def text_length(self, dialogue: Dialogue, images: int) -> int:
        """Tokens without those that stand for what the images hold."""
        return len(self.encode(dialogue, [0] * images).input_ids)

    def _question(self, turn: Turn, places: Iterator[int]) -> list[int]:
        shown = turn.text.replace(IMAGE_TAG, _IMAGE) if turn.role == "user" else turn.text
        ids: list[int] = []
        for token in self._ids(f"{_HEADER.format(turn.role)}{shown}{_END}"):
            ids += [token] * (next(places) if token == self.image_token else 1)
        return ids

    def _add_answer(self, tokens: Tokens, turn: Turn) -> None:
        """Each segment is encoded on its own, so that a token belongs to one."""
        tokens.answer_start = len(tokens.input_ids) + self._hidden
        texts = [segment.text for segment in turn.segments]
        texts[0] = _HEADER.format(turn.role) + texts[0]
        texts[-1] += _END
        for number, (text, segment) in enumerate(zip(texts, turn.segments, strict=True)):
            tokens.add(self._ids(text), hidden=0 if number else self._hidden, weight=segment.weight)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def text_at_most(dialogue: Dialogue) -> int:
    """No less than `ChatEncoder.text_length`, and quick: no token is shorter than a byte.

    Before they become tokens texts are brought into Unicode's form C, in which UTF-8 is at most three times as long.
    """
    texts = [SYSTEM_MESSAGE, *(turn.text for turn in dialogue.turns)]
    header_and_end = len(_HEADER + _END) + len("assistant")
    return sum(header_and_end + len(text) * (1 if text.isascii() else 3 * 4) for text in texts)


class RopePositions:
    """Position ids of a sample by transformers' own rule, which reads nothing of Qwen2_5_VLModel but its config."""

    get_rope_index: Any = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids: Any = Qwen2_5_VLModel.get_vision_position_ids

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, input_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """Temporal, height and width positions int64 [3, L] of one sample's `input_ids` [L].

        `image_grid_thw`: int64 [images, 3] in patches, or None for text alone.
        """
        is_image = (input_ids == self.config.image_token_id).int()
        positions, _ = self.get_rope_index(input_ids[None], is_image[None], image_grid_thw=image_grid_thw)
        result: Tensor = positions[:, 0]
        return result
