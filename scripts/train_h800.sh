#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#   export VGGT_CACHE_DIR=/path/to/cache/vggt_features
#   bash scripts/train_h800.sh
#
# Every setting below can be exported, or edited here: a line that is left as it is takes the environment's value, one that
# is replaced by NAME="value" overrides it. Anything after the command goes to the training command as it is, for example
#   bash scripts/train_h800.sh --max_steps 100 --lam 0.3
# Started again with the same OUTPUT_DIR, training goes on from the last checkpoint there. The log is
# $OUTPUT_DIR/train_<time>.log. Ctrl-C, SIGTERM and SIGUSR1 end it with a checkpoint. Exit code: 2 if a setting or a path is
# wrong, before anything is started; else that of training: 130 or 143 where it was told to end.
# For several nodes: scripts/train_2node_h800.sh, which takes the settings from this file too.
set -euo pipefail

# ---- What is trained, on what, into which directory
MODEL_PATH="${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}" # directory, hub id, or a checkpoint
DATA_ROOT="${DATA_ROOT:-}"                              # folder with *.jsonl, *.json or episode folders
ANNOTATION_PATH="${ANNOTATION_PATH:-}"                  # instead of DATA_ROOT: annotation files, separated by commas
DATA_PATH="${DATA_PATH:-}"                              # with ANNOTATION_PATH: where relative image names start
OUTPUT_DIR="${OUTPUT_DIR:-./outputs/vln_h800_8gpu}"

# ---- Where VGGT's features come from
VGGT_CACHE_DIR="${VGGT_CACHE_DIR:-}"                   # empty: VGGT runs in every step
VGGT_CACHE_FINGERPRINT="${VGGT_CACHE_FINGERPRINT:-}"   # first digits of one, where the directory holds several caches
VGGT_CACHE_MISS="${VGGT_CACHE_MISS:-encode}"           # a feature is missing: encode, fill (and put it back), or error
VGGT_CACHE_IO="${VGGT_CACHE_IO:-auto}"                 # how features are read: auto, buffered (page cache), or direct (past it)
VGGT_CACHE_STAGE="${VGGT_CACHE_STAGE:-}"               # directory on a local disk, where features are kept and looked for first
VGGT_CACHE_STAGE_LIMIT="${VGGT_CACHE_STAGE_LIMIT:-}"   # of all that lies there, such as 2TB; empty: all but a tenth of its disk
VGGT_MODEL_PATH="${VGGT_MODEL_PATH:-facebook/VGGT-1B}" # need not exist when every feature is in the cache

# ---- Engine: scripts/zero3.json, scripts/zero2.json, scripts/zero2_offload.json, or none
DS_CONFIG="${DS_CONFIG:-scripts/zero3.json}"
DEVICE="${DEVICE:-auto}"                  # auto: the GPUs; cpu: for trying things out
NPROC_PER_NODE="${NPROC_PER_NODE:-}"      # empty: one process a GPU
PYTHON="${PYTHON:-}"                      # empty: the project's .venv, else python3
BF16="${BF16:-}"                          # empty: True on GPUs, False on the CPU
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-True}"

# ---- Batch and length of training. Samples a step: processes x PER_DEVICE_BATCH_SIZE x GRAD_ACCUM_STEPS
PER_DEVICE_BATCH_SIZE="${PER_DEVICE_BATCH_SIZE:-1}"
GRAD_ACCUM_STEPS="${GRAD_ACCUM_STEPS:-8}"
NUM_EPOCHS="${NUM_EPOCHS:-1}"
MAX_STEPS="${MAX_STEPS:--1}"              # -1: as many as NUM_EPOCHS has

# ---- Learning
LEARNING_RATE="${LEARNING_RATE:-2e-5}"
MM_PROJECTOR_LR="${MM_PROJECTOR_LR:-1e-5}" # both mergers
VISION_TOWER_LR="${VISION_TOWER_LR:-1e-6}" # has an effect with TUNE_MM_VISION=True
TUNE_MM_LLM="${TUNE_MM_LLM:-True}"
TUNE_MM_VISION="${TUNE_MM_VISION:-False}"
TUNE_MM_MLP="${TUNE_MM_MLP:-True}"
LAM="${LAM:-}"                            # weight of the spatial features; empty: the checkpoint's, else 0.2
WEIGHT_DECAY="${WEIGHT_DECAY:-0.01}"
WARMUP_RATIO="${WARMUP_RATIO:-0.03}"
LR_SCHEDULER_TYPE="${LR_SCHEDULER_TYPE:-cosine}"
OPTIM="${OPTIM:-adamw_torch_fused}"       # fused is fast on the CPU too, which zero2_offload.json needs
SEED="${SEED:-42}"

# ---- Samples
MODEL_MAX_LENGTH="${MODEL_MAX_LENGTH:-163840}"
MAX_PIXELS="${MAX_PIXELS:-$((576 * 28 * 28))}"
MIN_PIXELS="${MIN_PIXELS:-$((16 * 28 * 28))}"
MAX_HISTORY_IMAGES="${MAX_HISTORY_IMAGES:-8}"
GROUP_BY_MODALITY_LENGTH="${GROUP_BY_MODALITY_LENGTH:-True}"
NUM_WORKERS="${NUM_WORKERS:-8}"           # processes that decode frames, for each GPU

# ---- Logs and checkpoints
LOGGING_STEPS="${LOGGING_STEPS:-10}"
SAVE_STEPS="${SAVE_STEPS:-1000}"
SAVE_TOTAL_LIMIT="${SAVE_TOTAL_LIMIT:-1}"
REPORT_TO="${REPORT_TO:-tensorboard}"     # or none, wandb, ...
MASTER_PORT="${MASTER_PORT:-}"            # empty: a free one
EXTRA_ARGS="${EXTRA_ARGS:-}"              # more flags of the training command, separated by blanks

# ---- Nothing to edit from here on
# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

# scripts/train_2node_h800.sh and scripts/check_cluster.sh read this file for its settings, and go on themselves.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  prepare_node "$@"
  meet_on_this_machine
  train "$@"
fi
