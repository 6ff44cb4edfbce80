"""Run by `test_export_transformers4.py` under transformers 4.50: an exported model's logits, by that version's code.

    python transformers4_logits.py EXPORTED CASE OUT [JANUSVLN_SRC]

CASE: safetensors of the inputs. With JanusVLN's own `src` folder its model runs, in evaluation mode, and VGGT computes
the feature from the frames. Without it, transformers' Qwen2.5-VL does, to whose image tokens the spatial tokens of the
feature in CASE are added here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

LAM = 0.3
Case = dict[str, Tensor]


def model_inputs(case: Case) -> Case:
    return {name: case[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}


def as_published(exported: Path, case: Case, source: str) -> Tensor:
    """JanusVLN's class; only the sizes that its code has written into it are the small encoder's."""
    sys.path.insert(0, source)
    from qwen_vl.model import modeling_qwen2_5_vl as published
    from qwen_vl.model.vggt.models.aggregator import Aggregator

    class SmallVGGT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aggregator = Aggregator(embed_dim=384, depth=4, num_heads=6, patch_embed="dinov2_vits14_reg")

    merger = published.VGGTMerger
    published.VGGT = SmallVGGT
    published.VGGTMerger = lambda **sizes: merger(**{**sizes, "context_dim": 768})
    torch.cuda.get_device_capability = lambda *device: (8, 0)  # asked for also where there is no GPU
    model = published.Qwen2_5_VLForConditionalGenerationForJanusVLN.from_pretrained(
        exported,
        config=AutoConfig.from_pretrained(exported),
        torch_dtype=torch.float32,
        attn_implementation="sdpa",
        mode="evaluation",
    ).eval()
    for frame in case["frames"]:
        image = frame.permute(2, 0, 1).float() / 255
        logits = model(**model_inputs(case), images_vggt=[image[None]]).logits
    return logits


def as_qwen(exported: Path, case: Case) -> Tensor:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        exported, torch_dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    weight = {name: tensor_of(exported, f"merger.{name}") for name in MERGER}
    h, w, channels = (side - side % 2 for side in case["feature"].shape)
    groups = case["feature"][:h, :w].reshape(h // 2, 2, w // 2, 2, channels).permute(0, 2, 1, 3, 4)
    normed = groups * (groups.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight["ln_q.weight"]
    x = normed.reshape(-1, 4 * channels) @ weight["mlp.0.weight"].T + weight["mlp.0.bias"]
    spatial = nn.functional.gelu(x) @ weight["mlp.2.weight"].T + weight["mlp.2.bias"]
    images = model.visual(case["pixel_values"], grid_thw=case["image_grid_thw"])
    images = images + LAM * spatial.repeat(len(case["image_grid_thw"]), 1)
    embeddings = model.model.embed_tokens(case["input_ids"])
    embeddings[case["input_ids"] == model.config.image_token_id] = images
    positions, _ = model.get_rope_index(
        case["input_ids"], case["image_grid_thw"], attention_mask=case["attention_mask"]
    )
    logits: Tensor = model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=case["attention_mask"]
    ).logits
    return logits


MERGER = ("ln_q.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")


def tensor_of(exported: Path, name: str) -> Tensor:
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(exported / index[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def processed(exported: Path, case: Case) -> Case:
    """What the exported tokenizer and processor make of a text and of the frames, as JanusVLN's evaluation asks."""
    tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="left")
    processor: Any = AutoProcessor.from_pretrained(exported, min_pixels=784, max_pixels=1605632)
    said = processor.apply_chat_template(
        [{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>"}], tokenize=False
    )
    images = [frame.permute(2, 0, 1)[:, :28, :56].float() / 255 for frame in case["frames"]]
    made = processor(text=[said] * len(images), images=images, do_rescale=False, return_tensors="pt")
    return {
        "pixel_values": made["pixel_values"],
        "said_ids": made["input_ids"][:1],
        "plain_ids": torch.tensor(tokenizer("<|im_start|>hello<|im_end|>")["input_ids"]),
    }


def main(exported: Path, case_file: str, out: str, source: str | None = None) -> None:
    case = load_file(case_file)
    with torch.no_grad():
        logits = as_published(exported, case, source) if source else as_qwen(exported, case)
    save_file({"logits": logits.contiguous(), **processed(exported, case)}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
