"""What the user asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from vggt_cache.codec import NONE, codec_for, shard_codec
from vggt_cache.environment import rank_of
from vggt_cache.errors import SettingsError
from vggt_cache.identity import (
    COMPUTE_DTYPES,
    CONTEXTS,
    FEATURE_DTYPES,
    EncoderSpec,
    FeatureSpec,
    Preprocessing,
)


@dataclass(frozen=True, kw_only=True)
class PrecomputeSettings:
    """The flags of `precompute`, under their own names."""

    data_root: str
    cache_dir: str
    vggt_model_path: str
    model_path: str | None = None
    """A Qwen2.5-VL directory; where given, its patch and pixel settings are checked against the grid."""
    context: str = "frame"
    image_size: int = 518
    resize_mode: str = "crop"
    alpha: str = "white"
    layer: int = -2
    """Which pair's output is stored; negative counts from the end."""
    feature_dtype: str = "bfloat16"
    codec: str = NONE
    """How new shards are packed: `none` or `lossless`. Not part of the specification."""
    compute_dtype: str = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    batch_size: int = 8
    num_workers: int = 4
    max_samples: int = -1
    """The first N images (in `causal` context: features); -1 means all."""
    skip_existing: bool = True
    verify: bool = False
    recompute: int = 0
    """How many features, chosen at random, are computed again and compared."""
    dry_run: bool = False
    force: bool = False
    """Start even if the disk looks too small."""

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS:
            raise SettingsError(f"--context {self.context!r} is none of {', '.join(CONTEXTS)}")
        if self.feature_dtype not in FEATURE_DTYPES:
            raise SettingsError(
                f"--feature_dtype {self.feature_dtype!r} is none of {', '.join(FEATURE_DTYPES)}"
            )
        codec = codec_for(shard_codec(self.feature_dtype, self.codec))
        if codec is not None:
            codec.prepare()
        if self.compute_dtype not in ("auto", *COMPUTE_DTYPES):
            raise SettingsError(
                f"--compute_dtype {self.compute_dtype!r} is none of auto, {', '.join(COMPUTE_DTYPES)}"
            )
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
