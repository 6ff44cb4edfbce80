"""Qwen2.5-VL with spatial tokens added to its image tokens; everything else is transformers' own.

Features come in as a batch field. Where they were computed, and whether they were, is not the model's business.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import set_zero3_state
from transformers.utils.generic import can_return_tuple

from janusvln.model import checkpoints, lora
from janusvln.model.attention import attend_by_length, tower_inputs
from janusvln.model.config import JanusVLNConfig
from janusvln.model.fusion import (
    VIEW_FIELDS,
    SpatialFeatureError,
    SpatialMerger,
    Views,
    checked_counts,
    image_tokens,
    merge,
)
from vggt_cache.errors import SettingsError

ACTIONS = 4
"""STOP, MOVE_FORWARD, TURN_LEFT, TURN_RIGHT."""
NOT_LEARNED = -100
"""Label of tokens and samples that are not learned from."""
# What transformers calls the keys and values of earlier tokens: `past_key_values`, and `cache` from 5.24 on.
KEPT = ({field.name for field in fields(CausalLMOutputWithPast)} & {"cache", "past_key_values"}).pop()
# transformers is typed in part, and its parts do not agree with each other.
_Qwen: Any = Qwen2_5_VLForConditionalGeneration


class Qwen2_5_VLForConditionalGenerationForJanusVLN(_Qwen):  # type: ignore[misc]
    """Adds `merger` and, where the configuration has it, `action_head`. `checkpoints` says what can be loaded."""

    config_class = JanusVLNConfig
    # `checkpoints` has already refused whatever else is missing or unexpected; a report would only repeat it.
    _keys_to_ignore_on_load_missing = checkpoints.MAY_BE_FRESH
    _keys_to_ignore_on_load_unexpected = checkpoints.LEFT_OUT

    def __init__(self, config: JanusVLNConfig) -> None:
        super().__init__(config)
        hidden_size = self.config.text_config.hidden_size
        self.merger = SpatialMerger(config.spatial_channels, config.spatial_hidden_size, hidden_size)
        if config.action_head:
            self.action_head = nn.Linear(hidden_size, ACTIONS)
        attend_by_length(self.model.visual)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers', from a plain Qwen2.5-VL, a checkpoint made here or a released JanusVLN checkpoint.

        From a directory or a hub id. Fields of JanusVLNConfig may be given as arguments, and go before those of the
        checkpoint. Raises CheckpointError for anything but exactly the weights that the configuration describes;
        only what a plain Qwen2.5-VL cannot have starts from fresh weights, and that is said.
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "revision", "token") if name in kwargs}
        found = checkpoints.open_checkpoint(pretrained_model_name_or_path, **hub)
        config = checkpoints.configure(found, config, kwargs)
        checkpoints.check(found, config, cls._shapes(config))
        wanted = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(str(found.directory), *args, config=config, **kwargs)
        # The same question put to transformers, should it map names otherwise than we foresaw.
        checkpoints.refuse(found, "did not give", sorted(info["missing_keys"]))
        # Names are mapped anew when it is saved: what transformers keeps of loading under ZeRO-3 (5.23) would save
        # model.model.norm.weight for model.norm.weight.
        model._weight_conversions = None
        return (model, info) if wanted else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """As transformers', readable for whom the umask allows. With LoRA, what was trained: see `lora`."""
        if lora.is_adapted(self):
            lora.save(self, Path(save_directory), state_dict)
        else:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        checkpoints.share(Path(save_directory))

    @classmethod
    def _shapes(cls, config: JanusVLNConfig) -> dict[str, tuple[int, ...]]:
        # set_zero3_state: parts of the model would otherwise be spread over processes, which meta tensors cannot be.
        with torch.device("meta"), set_zero3_state():  # type: ignore[no-untyped-call]
            return {name: tuple(weight.shape) for name, weight in cls(config).state_dict().items()}

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Sequence[int]] | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        spatial_features: list[Tensor] | None = None,
        image_positions: Sequence[Tensor] | None = None,
        action_labels: Tensor | None = None,
        action_positions: Tensor | None = None,
        loss_weights: Tensor | None = None,
        loss_shares: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' (`past_key_values` and `cache` are two names of the same), and:

        spatial_features: per sample that has images, the feature [h, w, C] of its current frame, any float dtype.
        image_positions: of the same samples int64 [image tokens], the places of their image tokens as indices into
            [B * L]; None: each row of input_ids is a sample.
        action_labels, action_positions: int64 [samples], classes 0 to 3 (-100: none) and the token whose hidden
            state they are read from, as an index into [B * L].
        loss_weights: [B, L], weight of each token in the language loss.
        loss_shares: [2], factors of the language loss and of the action head's.

        With image_positions, and image_grid_thw as numbers, nothing here waits for the device. Raises
        SpatialFeatureError where images and features do not belong together.
        """
        kept = past_key_values if cache is None else cache
        if inputs_embeds is None and input_ids is not None:
            views = Views.of(pixel_values, image_grid_thw, spatial_features, image_positions)
            is_prompt = kept is None or kept.get_seq_length() == 0
            inputs_embeds = self._embed(input_ids, views, is_prompt=is_prompt, is_learned=labels is not None)
        if mm_token_type_ids is None and input_ids is not None:
            mm_token_type_ids = self._token_types(input_ids)
        # Rows of packed samples too: with a cache, transformers would let each sample see the ones before it.
        packed = position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4
        if use_cache is None and (labels is not None or packed):
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            image_grid_thw=None if image_grid_thw is None else torch.as_tensor(image_grid_thw),
            mm_token_type_ids=mm_token_type_ids,
            **{KEPT: kept},
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, wanted])
        loss = None
        if labels is not None:
            if loss_weights is None:
                vocab_size = self.config.text_config.vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
            else:
                loss = weighted_token_loss(logits, labels, loss_weights)
            if loss_shares is not None:
                loss = loss * loss_shares[0]
            if self.config.action_head:
                own = self._action_loss(hidden, action_labels, action_positions)
                loss = loss + (own if loss_shares is None else own * loss_shares[1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{KEPT: outputs.get(KEPT)},
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with `spatial_features` and `image_positions` as in `forward`.

        The prompt's embeddings and positions are made here, once, so that the steps after it (and several beams of
        it) are those of a text model. Raises SettingsError for a batch that is padded on the right.
        """
        _refuse_right_padding(kwargs.get("attention_mask"))
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        views = Views.of(*(kwargs.pop(name, None) for name in VIEW_FIELDS))
        types = kwargs.pop("mm_token_type_ids", None)
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self._embed(input_ids, views, is_prompt=True, is_learned=False)
            if views.grids is not None and kwargs.get("position_ids") is None:
                kwargs["position_ids"], _ = self.model.get_rope_index(
                    input_ids,
                    mm_token_type_ids=self._token_types(input_ids) if types is None else types,
                    image_grid_thw=torch.tensor(views.grids, device=input_ids.device),
                    attention_mask=kwargs.get("attention_mask"),
                )
        return super().generate(input_ids, *args, **kwargs)

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """1 at places of images: without it, transformers numbers image tokens as if they were text."""
        types: Tensor = (input_ids == self.config.image_token_id).int()
        return types

    def _embed(self, input_ids: Tensor, views: Views, *, is_prompt: bool, is_learned: bool) -> Tensor:
        is_image = input_ids == self.config.image_token_id
        images = None
        if views.pixel_values is not None or views.features:
            places = views.places(is_image)
            images = self._images(views, [len(place) for place in places])
        elif is_prompt and is_image.any():
            raise SpatialFeatureError(
                f"the prompts have {int(is_image.sum())} image tokens, but no image is given: the model would answer "
                "without seeing; give pixel_values, image_grid_thw and spatial_features"
            )
        elif is_learned and (self.training or is_deepspeed_zero3_enabled()):  # type: ignore[no-untyped-call]
            images = self._unused_image(input_ids.device)
            places = [torch.zeros(0, dtype=torch.long, device=input_ids.device)]
        embeddings: Tensor = self.get_input_embeddings()(input_ids)
        if images is None:
            return embeddings
        # Not masked_scatter: its gradient selects by a mask, and waits for the device to know how much that is.
        tokens = embeddings.flatten(0, 1)
        return tokens.index_copy(0, torch.cat(tuple(places)), images.to(tokens)).view_as(embeddings)

    def _images(self, views: Views, tokens_per_sample: Sequence[int]) -> Tensor:
        """Image tokens with their spatial tokens, [tokens, D], in the order of the prompt's places."""
        counts = checked_counts(views, tokens_per_sample)
        assert views.pixel_values is not None
        assert views.grids is not None
        tower = self.model.visual
        pixels = views.pixel_values.type(tower.dtype)
        tokens = tower(pixels, **tower_inputs(tower, views.grids, pixels.device)).pooler_output
        images = torch.split(tokens, [image_tokens(grid) for grid in views.grids])
        spatial = merge(self.merger, [feature.to(tokens.device) for feature in views.features or []])
        owners = [own for own, count in zip(spatial, counts, strict=True) for _ in range(count)]
        lam = self.config.lam
        return torch.cat([image + lam * own.to(image) for image, own in zip(images, owners, strict=True)])

    def _unused_image(self, device: torch.device) -> Tensor:
        """What a batch of text alone runs through visual tower and merger, [0, D]: one token, which is then dropped.

        Every parameter gets a gradient (zeros), and where weights are spread over processes (ZeRO-3), all of them
        make the same calls whatever their batches hold.
        """
        vision = self.config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        views = Views(
            pixel_values=torch.zeros(4, values, device=device),
            grids=((1, 2, 2),),
            features=[torch.zeros(2, 2, self.config.spatial_channels, device=device)],
        )
        return self._images(views, [1])[:0]

    def _action_loss(self, hidden: Tensor, labels: Tensor | None, positions: Tensor | None) -> Tensor:
        if labels is None or positions is None:
            positions = torch.zeros(1, dtype=torch.long, device=hidden.device)
            labels = torch.full_like(positions, NOT_LEARNED)
        logits = self.action_head(hidden.flatten(0, 1)[positions])
        weight: float = self.config.distill_loss_weight
        return weight * action_loss(logits, labels)


def weighted_token_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum(weight * cross entropy) / sum(weight) over the learned tokens, in float32; 0 where no weight is left.

    logits: [B, L, vocabulary]; labels: int64 [B, L], -100 where not learned; weights: [B, L], of the token itself (not
    of the place that predicts it). Labels and weights are shifted here.
    """
    targets = labels[:, 1:].flatten()
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=NOT_LEARNED, reduction="none"
    )
    counted = weights[:, 1:].flatten().float() * (targets != NOT_LEARNED)
    total = counted.sum()
    return (each * counted).sum() / total.where(total > 0, 1.0)


def action_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of action logits [samples, 4] in float32 over labels 0 to 3; -100 is left out.

    With no label left it is 0 and still hangs on the logits, so that every process has the same gradients to reduce.
    """
    kept = labels != NOT_LEARNED
    total = F.cross_entropy(logits.float(), labels, ignore_index=NOT_LEARNED, reduction="sum")
    return total / kept.sum().clamp(min=1)


def learned(batch: Mapping[str, Any]) -> Tensor:
    """float64 [2]: what the two losses of a batch are means over, the (weighted) learned tokens and the actions."""
    labels, weights, actions = batch["labels"][:, 1:], batch.get("loss_weights"), batch.get("action_labels")
    tokens = labels != NOT_LEARNED
    counted = tokens if weights is None else tokens * weights[:, 1:]
    none = tokens.new_zeros((), dtype=torch.float64)
    chosen = none if actions is None else (actions != NOT_LEARNED).sum()
    return torch.stack([counted.sum().double(), chosen.double()])


def _refuse_right_padding(attention_mask: Tensor | None) -> None:
    """A row's answer is what follows its last place, whatever stands there."""
    if attention_mask is None or attention_mask.ndim != 2:
        return
    rows = (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if rows:
        raise SettingsError(
            f"row {rows[0]} of attention_mask is padded on the right, so its answer would go on from padding, and be "
            "wrong without a word: pad prompts on the left (padding_side='left')"
        )


# Saved like a plain Qwen2.5-VL, and read in either layout: transformers maps names by the class's name.
register_checkpoint_conversion_mapping(
    Qwen2_5_VLForConditionalGenerationForJanusVLN.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),  # type: ignore[no-untyped-call]
    overwrite=True,
)
