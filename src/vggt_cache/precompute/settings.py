"""What the user asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from vggt_cache.codec import CODECS, NONE, codec_for, shard_codec
from vggt_cache.context import CONTEXTS
from vggt_cache.environment import rank_of
from vggt_cache.errors import SettingsError
from vggt_cache.flags import check_choices, flag
from vggt_cache.identity import (
    ALPHA_MODES,
    COMPUTE_DTYPES,
    FEATURE_DTYPES,
    RESIZE_MODES,
    EncoderSpec,
    FeatureSpec,
    Preprocessing,
)


@dataclass(frozen=True, kw_only=True)
class PrecomputeSettings:
    """The flags of `precompute`, under their own names."""

    vggt_model_path: str = flag(
        help="VGGT checkpoint: a directory, or a hub id such as facebook/VGGT-1B", required=False
    )
    data_root: str = flag(help="folder with annotations (*.jsonl, *.json) or episode folders")
    cache_dir: str = flag(help="where the features are kept")
    model_path: str | None = flag(
        None, help="Qwen2.5-VL directory; its patch and pixel settings are checked against the grid"
    )
    context: str = flag(
        next(iter(CONTEXTS)),
        help="; ".join(f"{name}: {rule.seen}" for name, rule in CONTEXTS.items()),
        choices=CONTEXTS,
    )
    image_size: int = flag(518, help="width in pixels, a multiple of 14; JanusVLN uses 644")
    resize_mode: str = flag("crop", help="VGGT's two ways to treat the height", choices=RESIZE_MODES)
    alpha: str = flag("white", help="RGBA images: blend over white, or drop alpha", choices=ALPHA_MODES)
    layer: int = flag(-2, help="which pair's output is stored; negative counts from the end")
    feature_dtype: str = flag(
        "bfloat16", help="dtype on disk; int8: quantised from bfloat16", choices=FEATURE_DTYPES
    )
    codec: str = flag(
        NONE, help="lossless: new shards packed, a third smaller, the same bits", choices=CODECS
    )
    compute_dtype: str = flag(
        "auto", help="auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", *COMPUTE_DTYPES)
    )
    device: str = flag("auto", help="cpu, cuda or cuda:N; auto takes a GPU where there is one")
    batch_size: int = flag(8, help="frames encoded together; halved when memory runs out")
    num_workers: int = flag(4, help="processes that decode images; 0: in this one")
    max_samples: int = flag(-1, help="only the first N images (causal: features); -1: all")
    skip_existing: bool = flag(True, help="do not compute what is stored already")
    verify: bool = flag(False, help="check afterwards that every feature is present and intact")
    recompute: int = flag(0, metavar="K", help="compute K random features again and compare")
    dry_run: bool = flag(False, help="say what would be computed, what it takes, and stop")
    force: bool = flag(False, help="start even if the disk looks too small")

    def __post_init__(self) -> None:
        check_choices(self)
        codec = codec_for(shard_codec(self.feature_dtype, self.codec))
        if codec is not None:
            codec.prepare()
        if self.batch_size < 1:
            raise SettingsError(f"--batch_size {self.batch_size} is not a number of frames: give 1 or more")
        if self.num_workers < 0:
            raise SettingsError(
                f"--num_workers {self.num_workers} is negative: give 0 (decode in this process) or more"
            )
        if self.max_samples == 0 or self.max_samples < -1:
            raise SettingsError(
                f"--max_samples {self.max_samples} selects nothing: give a positive number, or -1 for all"
            )
        if self.recompute < 0:
            raise SettingsError(f"--recompute {self.recompute} is negative: give a number of features")
        _ = self.preprocessing

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(image_size=self.image_size, resize_mode=self.resize_mode, alpha=self.alpha)

    @property
    def noun(self) -> str:
        """What is counted."""
        return CONTEXTS[self.context].noun

    def feature_spec(self, encoder: EncoderSpec) -> FeatureSpec:
        return FeatureSpec(
            encoder=encoder,
            preprocessing=self.preprocessing,
            context=self.context,
            feature_dtype=self.feature_dtype,
        )


def choose_device(wanted: str) -> str:
    """The torch device of this process. A launcher's LOCAL_RANK picks the card where no other is named."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind != "cuda" or (index and not index.isdigit()):
        raise SettingsError(f"--device {wanted!r} is not known: give cpu, cuda, or cuda:N")
    if not torch.cuda.is_available():
        raise SettingsError(
            f"--device {wanted} asks for a GPU, but this PyTorch ({torch.__version__}) finds none: "
            "check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --device cpu"
        )
    card = int(index or 0)
    if card == 0:
        card = rank_of("LOCAL_RANK", 0)
    if card >= torch.cuda.device_count():
        raise SettingsError(
            f"--device cuda:{card} does not exist: {torch.cuda.device_count()} GPUs are visible here, counted from 0"
        )
    return f"cuda:{card}"


def choose_compute_dtype(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.startswith("cuda") else "float32"
