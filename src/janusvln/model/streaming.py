"""Features while an episode runs: each new frame sees the first 8 and the last 48 of the frames before it.

As JanusVLN evaluates. Keys and values of the earlier frames were computed with the history of their own time, so this
is not the feature of the kept frames as a list.
"""

from __future__ import annotations

from torch import Tensor

from vggt_cache.encoder import Encoder, History
from vggt_cache.errors import SettingsError
from vggt_cache.identity import CONTEXTS

FIRST_FRAMES = 8
LATEST_FRAMES = 48
SEEN_FRAMES = FIRST_FRAMES + LATEST_FRAMES + 1
"""At most, the new one included."""


class StreamingFeatures:
    """Features of one episode at a time. Holds at most 57 frames' keys and values beside the encoder.

    context: what the model was trained with. `causal`: a frame sees earlier ones; `frame`: itself alone.
    """

    def __init__(self, encoder: Encoder, *, context: str = "causal") -> None:
        if context not in CONTEXTS:
            raise SettingsError(
                f"context is {context!r}, which is not one of {', '.join(CONTEXTS)}: choose the one that the model was "
                "trained with (feature_spec in its config.json)"
            )
        if CONTEXTS[context].of_all_frames:
            raise SettingsError(
                f"context is {context!r}, in which a frame also sees later ones: a running episode has features "
                "of causal, or of frame; choose the one that the model was trained with"
            )
        self._encoder = encoder
        self._rule = CONTEXTS[context]
        self.reset()

    def reset(self) -> None:
        """A new episode begins."""
        self._history: History | None = None
        self._pushed = 0

    def push(self, frame: Tensor) -> Tensor:
        """The feature [h, w, C] in float32, on the encoder's device, of the episode's next frame.

        frame: uint8 [H, W, 3], sides multiples of 14. To be called once per frame. Raises FrameError when the
        frame has another grid than an earlier one; the episode may then go on with a fitting frame.
        """
        pixels = frame[None]
        if not self._rule.shares_prefixes:
            return self._encoder.frame_features(pixels)[0]
        tokens = self._encoder.patch_tokens(pixels)
        place, seen = place_of(self._pushed), min(self._pushed + 1, SEEN_FRAMES)
        if self._history is None:
            grid = tokens.shape[1], tokens.shape[2]
            self._history = self._encoder.new_history(grid, rows=1, frames=FIRST_FRAMES)
        elif seen > self._history.frames:
            self._history.grow(min(2 * self._history.frames, SEEN_FRAMES))
        feature = self._encoder.extend(tokens, self._history, [0], place, frames=seen, want_feature=[True])
        assert feature is not None
        self._pushed += 1
        return feature[0]


def place_of(number: int) -> int:
    """Where an episode's frame stands: the first 8 stay, the others go round, each in the place of the oldest."""
    ring = SEEN_FRAMES - FIRST_FRAMES
    return number if number < FIRST_FRAMES else FIRST_FRAMES + (number - FIRST_FRAMES) % ring
