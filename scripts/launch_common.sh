#!/usr/bin/env bash
# What the launchers share: functions that act on the settings of train_h800.sh. Not to be started by itself.
#
#   prepare_node              interpreter, device, number of processes
#   meet_on_this_machine      sets rendezvous: one node
#   meet_over_the_network     sets rendezvous: several nodes, and the interfaces
#   train                     checks everything, says what will be done, starts torchrun, keeps a log
#
# Needs bash 4.4 or newer.
# shellcheck disable=SC2153,SC2154  # the settings come from train_h800.sh and train_2node_h800.sh

# Otherwise a check that fails inside $(...) would be passed over.
shopt -s inherit_errexit

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"

refuse() {
  echo "[ERROR] $1" >&2
  exit 2
}

whole_number() {
  [[ ${!1} =~ ^[0-9]+$ ]] || refuse "$1 is '${!1}', which is not a whole number: give one"
}

# Everything that has a form is looked at before anything starts; what only the training command knows, it refuses itself.
check_settings() {
  local name
  for name in SEED MODEL_MAX_LENGTH MAX_PIXELS MIN_PIXELS MAX_HISTORY_IMAGES NUM_WORKERS SAVE_TOTAL_LIMIT; do
    whole_number "$name"
  done
  ((MIN_PIXELS <= MAX_PIXELS)) || refuse "MIN_PIXELS is $MIN_PIXELS and MAX_PIXELS $MAX_PIXELS, so no image would do: give MAX_PIXELS the larger one"
  [[ $MAX_STEPS =~ ^(-1|[0-9]+)$ ]] || refuse "MAX_STEPS is '$MAX_STEPS', which is no number of steps: give one, or -1 for as many as NUM_EPOCHS has"
  for name in NUM_EPOCHS LEARNING_RATE MM_PROJECTOR_LR VISION_TOWER_LR WEIGHT_DECAY WARMUP_RATIO LOGGING_STEPS SAVE_STEPS LAM; do
    [[ ${!name} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ || $name == LAM && -z $LAM ]] \
      || refuse "$name is '${!name}', which is not a number: give one of 0 or more, such as 2 or 1e-5"
  done
  for name in BF16 GRADIENT_CHECKPOINTING TUNE_MM_LLM TUNE_MM_VISION TUNE_MM_MLP GROUP_BY_MODALITY_LENGTH; do
    [[ ${!name,,} =~ ^(true|false|yes|no|t|f|y|n|1|0)$ || $name == BF16 && -z $BF16 ]] \
      || refuse "$name is '${!name}', and True and False are known: give one of them"
  done
  [[ $VGGT_CACHE_MISS =~ ^(encode|fill|error)$ ]] \
    || refuse "VGGT_CACHE_MISS is '$VGGT_CACHE_MISS', and encode, fill and error are known: give one of them"
  [[ $VGGT_CACHE_IO =~ ^(auto|direct|buffered)$ ]] \
    || refuse "VGGT_CACHE_IO is '$VGGT_CACHE_IO', and auto, direct and buffered are known: give one of them"
}

# A setting that would be passed over: in lower case, as the guide spells per_device_batch_size, or behind the command.
refuse_overlooked() {
  local name argument
  local -A known=()
  while read -r name; do known[$name]=1; done < <(sed -n 's/^\([A-Z][A-Z0-9_]*\)=.*/\1/p' "$root"/scripts/train_*h800.sh)
  for name in "${!known[@]}"; do
    local other=${name,,}
    [[ -z ${!other+set} ]] || refuse "$other is set to '${!other}', and settings are read in capitals: write $name=${!other} instead, and unset $other"
  done
  # What is looked at before the start must be what is trained with.
  local -A variable=(
    [model_name_or_path]=MODEL_PATH [train_data_root]=DATA_ROOT [annotation_path]=ANNOTATION_PATH [data_path]=DATA_PATH
    [output_dir]=OUTPUT_DIR [vggt_cache_dir]=VGGT_CACHE_DIR [vggt_cache_miss]=VGGT_CACHE_MISS
    [vggt_model_path]=VGGT_MODEL_PATH [deepspeed]=DS_CONFIG [report_to]=REPORT_TO
    [per_device_train_batch_size]=PER_DEVICE_BATCH_SIZE [per_device_batch_size]=PER_DEVICE_BATCH_SIZE
    [gradient_accumulation_steps]=GRAD_ACCUM_STEPS
  )
  local extra=()
  read -r -a extra <<<"$EXTRA_ARGS" || true
  for argument in "${extra[@]}" "$@"; do
    name=${argument%%=*}
    if [[ $name == --* ]]; then
      name=${name#--} name=${name//-/_}
      [[ -z ${variable[$name]+set} ]] \
        || refuse "--$name stands behind the command, and what is checked before the start is ${variable[$name]}: set that instead"
      continue
    fi
    [[ $argument != *=* || -z ${known[${name^^}]+set} ]] \
      || refuse "'$argument' stands behind the command, where flags are read: write ${name^^}=${argument#*=} before it"
  done
}

choose_python() {
  python=${PYTHON:-$root/.venv/bin/python}
  if ! command -v "$python" >/dev/null; then
    [[ -z $PYTHON ]] || refuse "PYTHON is '$PYTHON', which is not a program: give the interpreter that has torch and transformers"
    python=python3
  fi
}

# The visible GPUs. An empty CUDA_VISIBLE_DEVICES, or -1, hides all of them.
count_gpus() {
  local visible=()
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    if [[ $CUDA_VISIBLE_DEVICES != "-1" ]]; then IFS=', ' read -r -a visible <<<"$CUDA_VISIBLE_DEVICES" || true; fi
    echo "${#visible[@]}"
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
  else
    echo 0
  fi
}

prepare_node() {
  refuse_overlooked "$@"
  check_settings
  choose_python
  local gpus
  gpus=$(count_gpus)
  case "$DEVICE" in
    auto | cuda | gpu)
      if [[ $gpus -eq 0 && ${ALLOW_CPU:-0} != 1 ]]; then
        refuse "no GPU is visible (CUDA_VISIBLE_DEVICES, nvidia-smi), so there is nothing to train on: set DEVICE=cpu to try things out on the CPU"
      fi
      if [[ $gpus -eq 0 ]]; then device=cpu; else device=cuda; fi
      ;;
    cpu) device=cpu ;;
    *) refuse "DEVICE is '$DEVICE', and auto, cuda and cpu are known: give one of them" ;;
  esac

  if [[ $device == cpu ]]; then
    # Without this, libraries would still find the GPUs of a machine that has some.
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    gpus=1
  fi
  NPROC_PER_NODE=${NPROC_PER_NODE:-$gpus}
  whole_number NPROC_PER_NODE
  whole_number PER_DEVICE_BATCH_SIZE
  whole_number GRAD_ACCUM_STEPS
  if [[ $device == cuda && $NPROC_PER_NODE -gt $gpus ]]; then
    refuse "NPROC_PER_NODE is $NPROC_PER_NODE and $gpus GPUs are visible, so two processes would share one: give at most $gpus"
  fi
  if [[ -z $BF16 ]]; then
    if [[ $device == cpu ]]; then BF16=False; else BF16=True; fi
  fi

  # A path such as scripts/zero3.json is meant from the project, wherever the script is started.
  if [[ $DS_CONFIG != none && ! -e $DS_CONFIG && -e $root/$DS_CONFIG ]]; then DS_CONFIG=$root/$DS_CONFIG; fi
}

# ---- Where the processes meet

require_nodes() {
  [[ -n $NODE_RANK ]] || refuse "NODE_RANK is not set, so this node does not know which one it is: export NODE_RANK=0 on the master node, 1 on the next"
  [[ -n $MASTER_ADDR ]] || refuse "MASTER_ADDR is not set, so the nodes cannot meet: export the IP address of node 0, the same on every node"
  whole_number NNODES
  whole_number NODE_RANK
  whole_number MASTER_PORT
}

meet_on_this_machine() {
  # The variables of a run on several nodes may still be exported: here they do not count, except the port.
  NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1
  if [[ -z $MASTER_PORT ]]; then MASTER_PORT=$("$python" -m vggt_cache.cluster port); fi
  whole_number MASTER_PORT
  "$python" -m vggt_cache.cluster rendezvous --nodes 1 --node_rank 0 --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
}

meet_over_the_network() {
  require_nodes
  local line lines
  lines=$("$python" -m vggt_cache.cluster rendezvous --nodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --nccl "$NCCL_SOCKET_IFNAME" --gloo "$GLOO_SOCKET_IFNAME")
  while IFS= read -r line; do
    if [[ -n $line ]]; then export "${line?}"; fi
  done <<<"$lines"
  # An empty value would be taken for a choice.
  if [[ -n $NCCL_IB_HCA ]]; then export NCCL_IB_HCA; else unset NCCL_IB_HCA; fi
}

# ---- Start

training_flags() {
  flags=(
    --model_name_or_path "$MODEL_PATH"
    --vggt_model_path "$VGGT_MODEL_PATH"
    --output_dir "$OUTPUT_DIR"
    --tune_mm_llm "$TUNE_MM_LLM"
    --tune_mm_vision "$TUNE_MM_VISION"
    --tune_mm_mlp "$TUNE_MM_MLP"
    --bf16 "$BF16"
    --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE"
    --gradient_accumulation_steps "$GRAD_ACCUM_STEPS"
    --num_train_epochs "$NUM_EPOCHS"
    --max_steps "$MAX_STEPS"
    --learning_rate "$LEARNING_RATE"
    --mm_projector_lr "$MM_PROJECTOR_LR"
    --weight_decay "$WEIGHT_DECAY"
    --warmup_ratio "$WARMUP_RATIO"
    --lr_scheduler_type "$LR_SCHEDULER_TYPE"
    --optim "$OPTIM"
    --seed "$SEED"
    --model_max_length "$MODEL_MAX_LENGTH"
    --max_pixels "$MAX_PIXELS"
    --min_pixels "$MIN_PIXELS"
    --max_history_images "$MAX_HISTORY_IMAGES"
    --group_by_modality_length "$GROUP_BY_MODALITY_LENGTH"
    --dataloader_num_workers "$NUM_WORKERS"
    --gradient_checkpointing "$GRADIENT_CHECKPOINTING"
    --logging_steps "$LOGGING_STEPS"
    --save_steps "$SAVE_STEPS"
    --save_total_limit "$SAVE_TOTAL_LIMIT"
    --report_to "$REPORT_TO"
  )
  if [[ -n $DATA_ROOT ]]; then flags+=(--train_data_root "$DATA_ROOT"); fi
  if [[ -n $ANNOTATION_PATH ]]; then flags+=(--annotation_path "$ANNOTATION_PATH"); fi
  if [[ -n $DATA_PATH ]]; then flags+=(--data_path "$DATA_PATH"); fi
  if [[ -n $VGGT_CACHE_DIR ]]; then flags+=(--vggt_cache_dir "$VGGT_CACHE_DIR" --vggt_cache_miss "$VGGT_CACHE_MISS"); fi
  if [[ $DS_CONFIG != none ]]; then flags+=(--deepspeed "$DS_CONFIG"); fi
  # A frozen tower has no learning rate, and the training command warns of one.
  if [[ ${TUNE_MM_VISION,,} == true ]]; then flags+=(--vision_tower_lr "$VISION_TOWER_LR"); fi
  if [[ -n $LAM ]]; then flags+=(--lam "$LAM"); fi
  if [[ $device == cpu ]]; then flags+=(--use_cpu True); fi
  local extra=()
  read -r -a extra <<<"$EXTRA_ARGS" || true
  flags+=("${extra[@]}" "$@")
}

check_and_describe() {
  "$python" -m vggt_cache.cluster preflight --model_path "$MODEL_PATH" --vggt_model_path "$VGGT_MODEL_PATH" \
    --data_root "$DATA_ROOT" --annotation_path "$ANNOTATION_PATH" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \
    --cache_dir "$VGGT_CACHE_DIR" --cache_miss "$VGGT_CACHE_MISS" --stage "$VGGT_CACHE_STAGE" \
    --stage_limit "$VGGT_CACHE_STAGE_LIMIT" --ds_config "$DS_CONFIG" --device "$device" \
    --report_to "$REPORT_TO" --optim "$OPTIM" --lr_scheduler_type "$LR_SCHEDULER_TYPE" --nodes "$NNODES" --processes "$NPROC_PER_NODE" \
    --batch_size "$PER_DEVICE_BATCH_SIZE" --accumulation "$GRAD_ACCUM_STEPS"
  if [[ $NNODES -gt 1 ]]; then
    echo "[INFO] node $NODE_RANK of $NNODES, meeting at $MASTER_ADDR:$MASTER_PORT"
    echo "[INFO] network: NCCL_SOCKET_IFNAME=$NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME NCCL_IB_HCA=${NCCL_IB_HCA:-(not set: NCCL takes all InfiniBand cards that are up)}"
  fi
}

# Each process its share of the cores; torchrun's own default of 1 would slow down an optimizer that is offloaded to the CPU.
threads_of_a_process() {
  local threads=$(($(nproc) / NPROC_PER_NODE))
  if ((threads < 1)); then threads=1; fi
  if ((threads > 16)); then threads=16; fi
  echo "$threads"
}

train() {
  training_flags "$@"
  local summary
  summary=$(check_and_describe)
  # Nodes may share OUTPUT_DIR, and only the log of node 0 has the run's progress.
  local log=train
  if [[ $NODE_RANK -gt 0 ]]; then log=node$NODE_RANK; fi
  log="$OUTPUT_DIR/${log}_$(date +%Y%m%d_%H%M%S).log"
  summary+=$'\n'"[INFO] log: $log"
  if [[ $NODE_RANK -gt 0 ]]; then summary+="; the progress of the run is in that of node 0"; fi
  echo "$summary" | tee "$log"

  # These are read by libraries: exported, so that an edited line counts too.
  export VGGT_CACHE_DIR VGGT_CACHE_FINGERPRINT VGGT_CACHE_IO VGGT_CACHE_STAGE VGGT_CACHE_STAGE_LIMIT DS_CONFIG OMP_NUM_THREADS PYTHONUNBUFFERED=1
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_of_a_process)}
  # Where torchrun is told to end itself, as by scancel; its own 30 s are too short for a checkpoint.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
  export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink SHARP takes memory at the start, and fails on some drivers
  run_logged "$log" "$python" -m vggt_cache.cluster.torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --nproc_per_node "$NPROC_PER_NODE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    -m janusvln.train "${flags[@]}"
}

# Runs torchrun with a log; a signal goes to its processes once. The exit code is the command's; if that is not 0 and
# the run was told to stop, 130 after Ctrl-C, else 143.
run_logged() {
  local log=$1 code=0 signalled=1 stopped=""
  shift
  # Own process group: Ctrl-C then reaches this script alone, which passes it on.
  set -m
  # SLURM sends signals to all processes of a step. torchrun would end at once by SIGUSR1, and without tee nothing
  # could be printed any more.
  (trap '' USR1 && exec "$@") 2>&1 </dev/null | (trap '' INT TERM HUP USR1 && exec tee -a "$log") &
  local job=$! command
  command=$(jobs -p %+)
  trap 'tell INT 130' INT
  trap 'tell TERM 143' TERM HUP USR1
  # A signal ends a wait early; the same wait again then gives the true code.
  while [[ -n $signalled ]]; do
    signalled="" code=0
    wait "$job" || code=$?
  done
  # Node 0's last line is the trainer's own, and the others have none.
  if ((code == 0 && NODE_RANK > 0)); then echo "[INFO] training has come to its end"; fi
  if ((code != 0)); then
    code=${stopped:-$code}
    echo "[INFO] training ended with exit code $code: see $log"
    # All ranks say the same.
    sed -n 's/^\[ERROR\] \(\[rank [0-9]*\] \)\?/[ERROR] /p' "$log" | tail -n 1 >&2
  fi
  exit "$code"
}

# To the processes that train: torchrun, told itself, would kill them half a minute later, in the midst of a checkpoint.
tell() {
  signalled=1 stopped=$2
  local ranks=()
  read -r -a ranks 2>/dev/null <"/proc/$command/task/$command/children" || true
  if ((${#ranks[@]} == 0)); then ranks=("$command"); fi
  kill -s "$1" "${ranks[@]}" 2>/dev/null || true
}
