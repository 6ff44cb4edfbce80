"""What the model is asked in each step. It answers well only to the question that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from janusvln.data.dialogue import (
    ACTIONS,
    IMAGE_TAG,
    NO_ACTION,
    RESERVED,
    Dialogue,
    Segment,
    Turn,
    action_class,
    navigation_prompt,
    read_conversation,
)
from vggt_cache.errors import SettingsError, SmallFileError
from vggt_cache.small_files import read_text

STRUCTURED = "structured"
_MAX_BYTES = 1 << 20
_ACTION_LINE = "ACTION:"
_MARKS = (*RESERVED, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The question of a step. Raises SettingsError for a text that does not show the current view exactly once."""

    text: str | None = None
    """A user message with `{history}` where the earlier views are shown, `<image>` where the current one is, and
    `{instruction}`. None: the question of structured samples and episode folders."""

    def __post_init__(self) -> None:
        if self.text is None:
            return
        _refuse_tags("the prompt", self.text, _MARKS)
        counts = [self.text.count(part) for part in (IMAGE_TAG, "{history}", "{instruction}")]
        if counts[0] != 1 or counts[1] > 1 or not counts[2]:
            raise SettingsError(
                f"the prompt has {counts[0]} times {IMAGE_TAG}, {counts[1]} times {{history}} and {counts[2]} times "
                f"{{instruction}}: it needs one {IMAGE_TAG} (the current view), {{history}} before it once where "
                "earlier views are shown, and {instruction}"
            )
        if self.text.find("{history}") > self.text.index(IMAGE_TAG):
            raise SettingsError(
                f"the prompt has {{history}} behind {IMAGE_TAG}: views are shown in order, the current one last"
            )

    @classmethod
    def read(cls, name: str) -> Prompt:
        """`structured`, or the text of a file. Raises SettingsError."""
        if name == STRUCTURED:
            return cls()
        try:
            return cls(text=read_text(name, _MAX_BYTES).removesuffix("\n"))
        except SmallFileError as error:
            raise SettingsError(
                f"--prompt {error}; give {STRUCTURED}, or a file with the question's text"
            ) from error

    def dialogue(self, instruction: str, frames: int) -> Dialogue:
        """The question of a step that shows `frames` frames, and the place of its answer, as training has them.

        Raises SettingsError for an instruction that has an image tag in it.
        """
        _refuse_tags("the instruction", instruction, (IMAGE_TAG, *_MARKS))
        if self.text is None:
            question = navigation_prompt(" ".join(instruction.split()), frames)
            return Dialogue((Turn("user", (Segment(question),)), Turn("assistant", (Segment(""),))))
        shown = self.text.replace("{history}", IMAGE_TAG * (frames - 1)).replace("{instruction}", instruction)
        said = [{"from": "human", "value": shown}, {"from": "gpt", "value": ""}]
        return read_conversation({"conversations": said})

    @property
    def shows_history(self) -> bool:
        return self.text is None or "{history}" in self.text


def _refuse_tags(what: str, text: str, tags: Sequence[str]) -> None:
    for tag in tags:
        if tag in text:
            raise SettingsError(f"{what} has {tag} in it, which the model does not take for text: remove it")


def action_of(text: str) -> str | None:
    """The action that an answer gives, one of `ACTIONS`: its last line, with or without `ACTION:` in front."""
    lines = text.strip().splitlines() or [""]
    found = action_class(lines[-1].strip().removeprefix(_ACTION_LINE))
    return None if found == NO_ACTION else ACTIONS[found]
