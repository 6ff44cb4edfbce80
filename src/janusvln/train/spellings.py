"""Flags under names of other times and places: what they are called here, or why they mean nothing here."""

from __future__ import annotations

from vggt_cache.errors import SettingsError

OLD_SPELLINGS = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "per_device_batch_size": "per_device_train_batch_size",
    "use_lora": "lora_enable",
    "lora_rank": "lora_r",
}
"""Flags of transformers 4, of the guide and of other launchers. A share of all steps is given to --warmup_steps as a
number below 1."""

_OF_VIDEO = "it belongs to video files, which no VLN data set has: leave it out"
MEANINGLESS = {
    "dataset_use": "data sets have no names here: give --annotation_path and --data_path, or --train_data_root",
    "base_interval": _OF_VIDEO,
    "video_max_frames": _OF_VIDEO,
    "video_min_frames": _OF_VIDEO,
    "video_max_frame_pixels": _OF_VIDEO,
    "video_min_frame_pixels": _OF_VIDEO,
    "shuffle": "the published trainer never reads it: leave it out",
    **{
        old: f"transformers calls it {present} now: give that"
        for old, present in {
            "per_gpu_train_batch_size": "--per_device_train_batch_size",
            "no_cuda": "--use_cpu",
            "adafactor": "--optim adafactor",
            "fp16_backend": "--fp16",
            "half_precision_backend": "--fp16",
            "fp16_opt_level": "--fp16",
            "torchdynamo": "--torch_compile_backend",
            "deepspeed_config": "--deepspeed",
            "sharded_ddp": "--deepspeed",
            "push_to_hub_model_id": "--hub_model_id",
            "push_to_hub_token": "--hub_token",
            "dispatch_batches": "--accelerator_config",
            "split_batches": "--accelerator_config",
        }.items()
    },
    "group_by_length": "samples of similar length meet with --group_by_modality_length True: give that",
    **dict.fromkeys(("use_liger", "liger_kernel"), "it would replace the model's forward: leave it out"),
    **dict.fromkeys(
        (
            "use_mps_device",
            "use_ipex",
            "jit_mode_eval",
            "xpu_backend",
            "tpu_num_cores",
            "tpu_metrics_debug",
            "ray_scope",
            "mp_parameters",
            "past_index",
            "use_legacy_prediction_loop",
            "include_inputs_for_metrics",
            "model_parallel",
        ),
        "transformers has removed it: leave it out",
    ),
    "logging_dir": "where TensorBoard's files go is said by the environment's TENSORBOARD_LOGGING_DIR: set that",
    "save_safetensors": "models are always saved as safetensors: leave it out",
    "include_tokens_per_second": "the log has samples_per_s: leave it out",
    "lora_weight_path": "adapters are gone on from with --resume_from_checkpoint; or merge them first "
    "(python -m janusvln.export.merge), and give the result to --model_name_or_path",
    "overwrite_output_dir": "a directory with checkpoints is resumed; to start anew, give an empty one",
}


def modern(argument: str) -> str:
    """An argument in today's spelling. Raises SettingsError for one that means nothing here."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name in MEANINGLESS:
        raise SettingsError(f"--{name}: {MEANINGLESS[name]}")
    return f"--{OLD_SPELLINGS.get(name, name)}{equals}{value}"
