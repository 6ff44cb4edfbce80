"""The model and VGGT together, answering for one episode or for several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from janusvln.data.dialogue import UnfitSampleError
from janusvln.data.images import QwenPixels
from janusvln.data.tokens import ChatEncoder
from janusvln.features.resolve import encoder_of, features_of
from janusvln.inference.episode import Episode, Frame
from janusvln.inference.prompt import Prompt, action_of
from janusvln.model import checkpoints
from janusvln.model.attention import attention_implementation
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from janusvln.model.streaming import StreamingFeatures
from vggt_cache.encoder import Encoder
from vggt_cache.errors import FrameError, SettingsError, errors_as
from vggt_cache.identity import Preprocessing
from vggt_cache.precompute.settings import choose_compute_dtype, choose_device

MOST_TOKENS = 256
"""Of an answer. Four lines of structured text stay well below; an action's name is a few tokens."""
FRAMES_SHOWN = 9
"""The current frame and eight earlier ones, as JanusVLN trains and evaluates."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said."""

    text: str
    action: str | None
    """STOP, MOVE_FORWARD, TURN_LEFT or TURN_RIGHT; None where the text names none of them."""
    complete: bool
    """Whether the model ended by itself, and not at the limit of tokens."""


class Navigator:
    """Answers greedily. Each new frame sees, in VGGT, the first 8 and the last 48 frames of its episode.

    For one thread. An episode holds up to 57 frames' keys and values on the device.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pixels: QwenPixels,
        encoder: Encoder,
        prompt: Prompt,
        *,
        frames_shown: int = FRAMES_SHOWN,
        max_new_tokens: int = MOST_TOKENS,
    ) -> None:
        """`load` makes these parts from directories. `frames_shown`: as in training, the current one included."""
        for name, value in (("frames_shown", frames_shown), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise SettingsError(f"{name} is {value}: give 1 or more")
        spec = {**checkpoints.RELEASED_FEATURES, **features_of("the model", model.config.feature_spec)}
        self.context = str(spec["context"])
        self._preprocessing = Preprocessing(
            image_size=spec["image_size"], resize_mode=spec["resize_mode"], alpha=spec.get("alpha", "white")
        )
        self._model = model
        self._tokenizer = tokenizer
        self._chat = ChatEncoder(tokenizer)
        self._pixels = pixels.on(model.device)
        self._encoder = encoder
        self._prompt = prompt
        self._frames_shown = frames_shown if prompt.shows_history else 1
        self._settings = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": [
                tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")
            ],
            "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        }

    @classmethod
    def load(
        cls, model: str, vggt_model_path: str, prompt: Prompt, *, device: str = "auto", **options: Any
    ) -> Navigator:
        """From the directory of a model trained here, or of a released JanusVLN, and the VGGT of its features.

        device: auto, cpu, cuda or cuda:N. Weights are bfloat16 on a GPU, and as they are stored on the CPU. options:
        those of `Navigator`. Raises CheckpointError and SettingsError.
        """
        chosen = choose_device(device)
        found = checkpoints.open_checkpoint(model)
        config = checkpoints.configure(found, None, {})
        spec = features_of(model, config.feature_spec)
        vggt = encoder_of(model, spec, vggt_model_path)
        pixels = QwenPixels(str(found.directory))
        fault = f"{model} has no tokenizer that can be read"
        remedy = ": copy its files from the Qwen2.5-VL that the model was trained from"
        with errors_as(SettingsError, fault, remedy, OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(found.directory)
        compute_dtype = spec.get("compute_dtype") or choose_compute_dtype("auto", chosen)
        encoder = vggt.load(device=chosen, compute_dtype=compute_dtype)
        loaded = JanusVLN.from_pretrained(
            model,
            dtype="auto" if chosen == "cpu" else torch.bfloat16,
            attn_implementation=attention_implementation(),
        )
        return cls(loaded.to(chosen).eval(), tokenizer, pixels, encoder, prompt, **options)

    def start(self, instruction: str) -> Episode:
        """A new episode that has seen nothing yet. Raises SettingsError for an instruction that is no text."""
        self._prompt.dialogue(instruction, 1)
        stream = StreamingFeatures(self._encoder, context=self.context)
        return Episode(instruction, stream, self._preprocessing)

    def act(self, episode: Episode, frame: Frame) -> Answer:
        """See one frame, and answer."""
        episode.see(frame)
        return self.answer([episode])[0]

    def answer_list(self, frames: Sequence[Frame], instruction: str) -> Answer:
        """The answer to an episode's frames, oldest first, as if they had been seen one by one."""
        episode = self.start(instruction)
        for frame in frames:
            episode.see(frame)
        return self.answer([episode])[0]

    def answer(self, episodes: Sequence[Episode]) -> list[Answer]:
        """What to do in each episode now. Changes nothing, so it may be asked again.

        Raises FrameError for an episode that has seen nothing, or frames that do not suit the model.
        """
        shown = [episode.shown(self._frames_shown) for episode in episodes]
        prompts = [self._tokens(episode, frames) for episode, frames in zip(episodes, shown, strict=True)]
        longest = max(map(len, prompts))
        # What fills a row must be in it anyway: a repetition penalty looks at all ids, masked or not.
        rows = [[ids[0]] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self._model.device
        said = self._model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            pixel_values=torch.cat([self._pixels.values(torch.stack(frames).to(device)) for frames in shown]),
            image_grid_thw=[(1, *self._pixels.grid(frame.numpy())) for frames in shown for frame in frames],
            spatial_features=[episode.feature for episode in episodes],
            **self._settings,
        )
        return [self._answer(ids) for ids in said[:, longest:]]

    def _tokens(self, episode: Episode, shown: Sequence[Tensor]) -> list[int]:
        if not shown:
            raise FrameError("the episode has seen no frame yet, so there is nothing to answer: show it one")
        try:
            sizes = [self._pixels.image_tokens(self._pixels.grid(frame.numpy())) for frame in shown]
        except UnfitSampleError as error:
            raise FrameError(f"a frame {error}") from error
        tokens = self._chat.encode(self._prompt.dialogue(episode.instruction, len(shown)), sizes)
        return tokens.input_ids[: tokens.answer_start]

    def _answer(self, said: Tensor) -> Answer:
        ids = said.tolist()
        ends = [at for at, token in enumerate(ids) if token in self._settings["eos_token_id"]]
        text = self._tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True).strip()
        return Answer(text=text, action=action_of(text), complete=bool(ends))
