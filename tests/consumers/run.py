"""Other people's own code, live and with a `CachedAggregator`: does it give the same?

    python tests/consumers/run.py CHECKOUTS [NAME ...]

CHECKOUTS holds clones of the repositories below, under the names below; nothing of them is part of this project. Each
runs in a process of its own on a CPU, with small random weights in place of the published ones and sizes to go with
them: the class that calls VGGT is theirs, unchanged. Prints a table: the largest difference of the output from the live
one, relative to its largest value, where the cache misses and where it hits. VG-LLM, JanusVLN and NewJanusVLN need
transformers 4.50.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import golden_recipe
from vggt_cache import CachedAggregator

SMALL = {"embed_dim": 384, "depth": 4, "num_heads": 6, "patch_embed": "dinov2_vits14_reg"}
SIDE, FRAMES = 56, 3
Run = Callable[[], Tensor]
Wrap = Callable[[nn.Module], nn.Module]


def with_weights(module: nn.Module) -> nn.Module:
    state = {
        name: golden_recipe.make_weight(name, tuple(weight.shape))
        for name, weight in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.requires_grad_(False).eval()


def images(seed: int, frames: int = FRAMES) -> Tensor:
    pixels = [golden_recipe.image(seed, SIDE, SIDE, step) for step in range(frames)]
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def small_vggt(package: str, wrap: Wrap = lambda module: module) -> type[nn.Module]:
    """In place of a repository's VGGT, which has the sizes of VGGT-1B written into it."""
    aggregator = importlib.import_module(f"{package}.models.aggregator").Aggregator

    class SmallVGGT(nn.Module):
        def __init__(self, **sizes: Any) -> None:
            super().__init__()
            self.aggregator = wrap(with_weights(aggregator(**SMALL)))

        @classmethod
        def from_pretrained(cls, *where: object, **sizes: Any) -> nn.Module:
            return cls()

    return SmallVGGT


# ---------------------------------------------------------------- each consumer: its output, live or wrapped


def qwen(source: Path, published: str, *, mode: str | None = None) -> Callable[[Wrap], Iterator[Run]]:
    """A whole Qwen2.5-VL with VGGT, tiny: logits of two prompts of different images."""

    def make(wrap: Wrap) -> Iterator[Run]:
        sys.path.insert(0, str(source / "src"))
        module = importlib.import_module("qwen_vl.model.modeling_qwen2_5_vl")
        merger = module.VGGTMerger
        module.VGGTMerger = lambda **sizes: merger(**{**sizes, "context_dim": 2 * SMALL["embed_dim"]})  # type: ignore[attr-defined]
        module.VGGT = small_vggt("qwen_vl.model.vggt")  # type: ignore[attr-defined]
        text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
        }
        config = module.Qwen2_5_VLConfig(
            **text,
            num_key_value_heads=2,
            vocab_size=128,
            vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 112},
            rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
            image_token_id=100,
            video_token_id=101,
            vision_start_token_id=102,
            vision_end_token_id=103,
            use_vggt_feature=True,
        )
        torch.manual_seed(0)
        model = getattr(module, published)._from_config(config, attn_implementation="sdpa").eval()
        with_weights(model.vggt.aggregator)
        model.mode = mode
        model.vggt.aggregator = wrap(model.vggt.aggregator)
        for seed in (1, 2):
            ids = torch.tensor([[5, *([102, *([100] * 4), 103] * FRAMES), 6, 7]])
            tiles = torch.randn((FRAMES * 16, 1176), generator=torch.Generator().manual_seed(seed))
            grid = torch.tensor([[1, 4, 4]] * FRAMES)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiles}
            yield (
                lambda given=given, grid=grid, seed=seed: (
                    model(**given, image_grid_thw=grid, images_vggt=[images(seed)]).logits
                )
            )

    return make


def spatial_stack(source: Path, method: str) -> Callable[[Wrap], Iterator[Run]]:
    def make(wrap: Wrap) -> Iterator[Run]:
        package = source / "src" / "qwen_vl"
        for name, folder in (("qwen_vl", package), ("qwen_vl.model", package / "model")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder)]  # its own imports much more than is needed here
        encoders = importlib.import_module("qwen_vl.model.geometry_encoders.vggt_encoder")
        base = importlib.import_module("qwen_vl.model.geometry_encoders.base")
        importlib.import_module("qwen_vl.model.vggt.models.vggt").VGGT = small_vggt(
            "qwen_vl.model.vggt", wrap
        )
        encoder = encoders.VGGTEncoder(base.GeometryEncoderConfig())
        for seed in (1, 2):
            if method == "encode":
                yield lambda seed=seed: joined(encoder.encode(images(seed)))
            else:
                yield lambda seed=seed: torch.cat(
                    encoder.encode_layers(images(seed), [1, 2, 3], 2, include_camera_token=True)
                ).float()

    return make


def joined(output: Any) -> Tensor:
    """GeoThinker's encoder gives patches and camera tokens."""
    return torch.cat(output, dim=1) if isinstance(output, tuple) else output


def vggt_dp(source: Path) -> Callable[[Wrap], Iterator[Run]]:
    """Each image is a list of one frame."""

    def make(wrap: Wrap) -> Iterator[Run]:
        sys.path.insert(0, str(source))
        module = importlib.import_module("diffusion_policy_3d.model.vision.vggt.models.vggt_enc")
        aggregator = module.Aggregator
        module.Aggregator = lambda **sizes: wrap(with_weights(aggregator(**SMALL)))  # type: ignore[attr-defined]
        encoder = module.VGGT_ENC()
        module.Aggregator = aggregator  # type: ignore[attr-defined]
        for seed in (1, 2):
            yield lambda seed=seed: encoder(images(seed)[:, None])

    return make


def spatial_mllm(source: Path) -> Callable[[Wrap], Iterator[Run]]:
    def make(wrap: Wrap) -> Iterator[Run]:
        sys.path[:0] = [str(source), str(source / "src" / "qwenvl" / "external")]
        for name in ("src", "src.qwenvl", "src.qwenvl.model"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(source / name.replace(".", "/"))]
        module = importlib.import_module("src.qwenvl.model.spatial_encoder")
        module.VGGT = small_vggt("vggt", wrap)  # type: ignore[attr-defined]
        encoder = module.VGGTSpatialEncoderPreTrainedModel(module.VGGTSpatialEncoderConfig())

        def run(seed: int) -> Tensor:
            outputs, starts = encoder([images(seed), images(seed + 10), images(seed + 20, 2)])
            return torch.cat(
                [sample[-1][:, start:].flatten(0, 1) for sample, start in zip(outputs, starts, strict=True)]
            )

        for seed in (1, 2):
            yield lambda seed=seed: run(seed)

    return make


def vlm_3r(source: Path, vggt: Path) -> Callable[[Wrap], Iterator[Run]]:
    """Its repository names VGGT's own as a submodule; 3DRS carries a copy."""

    def make(wrap: Wrap) -> Iterator[Run]:
        sys.path.insert(0, str(vggt))
        for name in ("llava", "llava.utils"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["llava.utils"].rank0_print = print  # type: ignore[attr-defined]
        folder = source / "llava" / "model" / "multimodal_spatial_encoder"
        sys.path.insert(0, str(folder))
        module = importlib.import_module("vggt_spatial_encoder")
        module.VGGT = small_vggt("vggt", wrap)  # type: ignore[attr-defined]
        encoder = module.VGGT_Encoder(module.VGGTSpatialConfig())
        for seed in (1, 2):
            yield lambda seed=seed: torch.cat(encoder(images(seed) * 2 - 1), dim=1)

    return make


def three_drs(source: Path) -> Callable[[Wrap], Iterator[Run]]:
    """A script: it is run, and the file that it writes is compared."""

    def make(wrap: Wrap) -> Iterator[Run]:
        sys.path.insert(0, str(source / "vggt"))
        if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
            _stand_in_for_torchvision()
        small = small_vggt("vggt", wrap)
        importlib.import_module("vggt.models.vggt").VGGT = small
        state = small_vggt("vggt")().state_dict()
        torch.load = lambda *where, **how: state

        def run(seed: int) -> Tensor:
            with tempfile.TemporaryDirectory() as folder:
                scene = Path(folder) / "data" / "scannet" / "posed_images" / "scene"
                scene.mkdir(parents=True)
                for step in range(4):
                    Image.fromarray(golden_recipe.image(seed, 20, 370, step).numpy()).save(
                        scene / f"{step:03d}.jpg"
                    )
                before = Path.cwd()
                os.chdir(folder)
                try:
                    runpy.run_path(str(source / "extract_vggt_feature.py"))
                finally:
                    os.chdir(before)
                with np.load(next(Path(folder).rglob("vggt.npz"))) as file:
                    return torch.from_numpy(file["feature"])

        yield lambda: run(1)

    return make


def _stand_in_for_torchvision() -> None:
    """Of it, VGGT's loader of images takes one thing."""

    class ToTensor:
        def __call__(self, image: Image.Image) -> Tensor:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    transforms = types.ModuleType("torchvision.transforms")
    transforms.ToTensor = ToTensor  # type: ignore[attr-defined]
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision"].transforms = transforms  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms"] = transforms


def consumers(checkouts: Path) -> dict[str, tuple[str, Callable[[Wrap], Iterator[Run]], dict[str, Any]]]:
    """By name: the class that calls VGGT, how to run it, and what of VGGT it takes (docs/consumers.md)."""
    patches = {"tokens": "patches"}
    janus = "Qwen2_5_VLForConditionalGenerationForJanusVLN"
    return {
        "VG-LLM": (
            "the whole model",
            qwen(checkouts / "VG-LLM", "Qwen2_5_VLForConditionalGenerationWithVGGT"),
            patches,
        ),
        "SpatialStack": (
            "VGGTEncoder.encode",
            spatial_stack(checkouts / "SpatialStack", "encode"),
            {"layers": -2, **patches},
        ),
        "SpatialStack layers": (
            "VGGTEncoder.encode_layers, whose results are bfloat16",
            spatial_stack(checkouts / "SpatialStack", "encode_layers"),
            {"layers": (1, 2, 3), "tokens": "patches+camera"},
        ),
        "GeoThinker": (
            "VGGTEncoder.encode",
            spatial_stack(checkouts / "GeoThinker", "encode"),
            {"tokens": "patches+camera"},
        ),
        "Spatial-MLLM": (
            "VGGTSpatialEncoderPreTrainedModel",
            spatial_mllm(checkouts / "Spatial-MLLM"),
            {"layers": -1, **patches},
        ),
        "VLM-3R": (
            "VGGT_Encoder",
            vlm_3r(checkouts / "VLM-3R", checkouts / "3DRS" / "vggt"),
            {"layers": -1, "tokens": "patches+camera"},
        ),
        "3DRS": ("extract_vggt_feature.py", three_drs(checkouts / "3DRS"), {"layers": -1}),
        "VGGT-DP": ("VGGT_ENC", vggt_dp(checkouts / "VGGT-DP"), {"layers": -1}),
        "JanusVLN": ("the whole model, training", qwen(checkouts / "JanusVLN", janus), patches),
        "JanusVLN evaluation": (
            "the whole model, evaluation",
            qwen(checkouts / "JanusVLN", janus, mode="evaluation"),
            patches,
        ),
        "NewJanusVLN": ("the whole model, training", qwen(checkouts / "NewJanusVLN", janus), patches),
    }


def measure(make: Callable[[Wrap], Iterator[Run]], settings: dict[str, Any]) -> tuple[float, float, int]:
    """Largest relative difference where the cache misses and where it hits; calls of the module while it hits."""
    torch.cuda.get_device_capability = lambda *device: (8, 0)  # asked for also where there is no GPU
    wrapped: list[CachedAggregator] = []
    calls: list[int] = []

    def wrap(module: nn.Module) -> nn.Module:
        module.register_forward_pre_hook(lambda *given: calls.append(1))
        wrapped.append(CachedAggregator(module, cache_dir, **settings))
        return wrapped[-1]

    with tempfile.TemporaryDirectory() as cache_dir, torch.no_grad():
        live = [run() for run in make(lambda module: module)]
        missed = [run() for run in make(wrap)]
        for cached in wrapped:
            cached.flush()
        calls.clear()
        found = [run() for run in make(wrap)]
    return difference(missed, live), difference(found, live), len(calls)


def difference(found: list[Tensor], live: list[Tensor]) -> float:
    pairs = zip(found, live, strict=True)
    return float(torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max())


def main(checkouts: Path, names: list[str]) -> int:
    known = consumers(checkouts)
    print(
        "| consumer | snapshot | what ran | miss | hit | calls of VGGT while all is found |\n|---|---|---|---|---|---|"
    )
    failed = 0
    for name in names or known:
        command = [sys.executable, __file__, str(checkouts), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        folder = checkouts / name.split(" ")[0]
        snapshot = (
            (folder / "SNAPSHOT").read_text().strip()[:7] if (folder / "SNAPSHOT").exists() else _head(folder)
        )
        failed += not lines
        told = (
            lines[0].removeprefix("RESULT ")
            if lines
            else "did not run: " + (done.stderr.strip().splitlines() or ["?"])[-1]
        )
        print(f"| {name} | `{snapshot}` | {known[name][0]} | {told} |", flush=True)
    return failed


def _head(folder: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip()[:7]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:3] == ["--one"]:
        _, make, settings = consumers(Path(sys.argv[1]).resolve())[sys.argv[3]]
        missed, found, calls = measure(make, settings)
        print(f"RESULT {missed:.1e} | {found:.1e} | {calls}")
    else:
        sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
