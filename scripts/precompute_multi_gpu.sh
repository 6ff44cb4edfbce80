#!/usr/bin/env bash
# Precompute on every GPU of this machine: one process per GPU, all on the same cache directory.
#
#   bash scripts/precompute_multi_gpu.sh --vggt_model_path ... --data_root ... --cache_dir ...
#
# All flags go to scripts/precompute_vggt_features.py, except --device, which is chosen here. The processes
# share the work among themselves (see "claims" in docs/), so this script may be started on several nodes, and
# again at any time.
#
#   CUDA_VISIBLE_DEVICES  the GPUs to use; all of them if it is not set
#   NUM_PROCS             number of processes, if it is to be another than that of the GPUs; needed without a GPU
#   LOG_DIR               where each process writes its log; <cache_dir>.logs by default, of a bucket precompute.logs
#   PROGRESS_S            seconds between two progress reports (default 30)
#   PYTHON                the interpreter; the project's .venv, else python3
#
# Exit code: 0 if all processes ended with 0, otherwise the largest of their codes. Needs bash 4.4 or newer.
set -uo pipefail
# Own process group for each child: Ctrl-C then reaches this script alone, which passes it on exactly once.
set -m

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "[ERROR] $1" >&2
  exit 2
}

# 1. Which flags concern this script? A device of the user's would put all processes on one GPU.
cache_dir=""
previous=""
for argument in "$@"; do
  case "$argument" in
    --device | --device=*)
      fail "--device is chosen by this script, one GPU per process: drop the flag, and name GPUs with CUDA_VISIBLE_DEVICES=0,1,..."
      ;;
    --cache_dir=* | --cache-dir=*) cache_dir=${argument#*=} ;;
  esac
  case "$previous" in --cache_dir | --cache-dir) cache_dir=$argument ;; esac
  previous=$argument
done

# 2. Which GPUs are there? An empty CUDA_VISIBLE_DEVICES, or -1, hides all of them.
gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  if [[ $CUDA_VISIBLE_DEVICES != "-1" ]]; then
    IFS=', ' read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
  fi
elif command -v nvidia-smi >/dev/null; then
  count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
  for ((i = 0; i < count; i++)); do gpus+=("$i"); done
fi

# 3. How many processes? On the CPU somebody has to say it: each takes all cores and the memory of one encoder.
processes=${NUM_PROCS:-${#gpus[@]}}
if [[ ! $processes =~ ^[0-9]+$ || ($processes -eq 0 && -n ${NUM_PROCS:-}) ]]; then
  fail "NUM_PROCS is '$NUM_PROCS', which is not a positive whole number: give the number of processes"
fi
if [[ $processes -eq 0 ]]; then
  fail "no GPU is visible (CUDA_VISIBLE_DEVICES, nvidia-smi), so there is nothing to start: set NUM_PROCS=2 to run two processes on the CPU"
fi

# 4. Where do logs go? Beside the cache, not into it: a cache directory holds nothing but a cache.
cache_dir=${cache_dir%/}
[[ $cache_dir != *://* ]] || cache_dir="" # logs stay on this machine
log_dir=${LOG_DIR:-${cache_dir:-precompute}.logs}
mkdir -p "$log_dir" || fail "the log directory $log_dir cannot be made: set LOG_DIR to one that can"

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

# 5. Pass signals on, so that each process commits what is finished and says how to go on.
pids=()
signalled=""
# shellcheck disable=SC2317,SC2329  # the traps call it
forward() {
  signalled=$1
  echo "[INFO] $1: passed on to ${#pids[@]} processes, waiting for them to commit"
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done
}
trap 'forward INT' INT
trap 'forward TERM' TERM HUP

# 6. Start. Each process sees its own GPU only, so that it is cuda:0 there. Host and process id make the log's name
#    unique where several nodes share the directory.
names=()
logs=()
for ((i = 0; i < processes; i++)); do
  [[ -z $signalled ]] || break
  if [[ ${#gpus[@]} -gt 0 ]]; then
    gpu=${gpus[i % ${#gpus[@]}]}
    names+=("process $i on GPU $gpu")
    device=cuda:0
  else
    gpu=""
    names+=("process $i on the CPU")
    device=cpu
  fi
  logs+=("$log_dir/$(hostname 2>/dev/null || echo node)-$$-$i.log")
  CUDA_VISIBLE_DEVICES=$gpu "$python" "$root/scripts/precompute_vggt_features.py" "$@" --device "$device" \
    >"${logs[i]}" 2>&1 </dev/null &
  pids+=("$!")
  echo "[INFO] ${names[i]}: log ${logs[i]}"
done

[[ ${#pids[@]} -gt 0 ]] || exit 130

# 7. Report now and then the last line of each log; a progress bar separates its states by carriage returns.
last_line() {
  tail -c 2000 "$1" | tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1
}
running() {
  for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && return 0; done
  return 1
}
next_report=$((SECONDS + ${PROGRESS_S:-30}))
while running; do
  # In the background, because a signal is handled only when the command in the foreground has ended.
  sleep 0.5 &
  wait "$!"
  if ((SECONDS >= next_report)); then
    for i in "${!pids[@]}"; do echo "[INFO] ${names[i]}: $(last_line "${logs[i]}")"; done
    next_report=$((SECONDS + ${PROGRESS_S:-30}))
  fi
done

# 8. Collect the exit codes. A signal ends a wait early; the same wait again then gives the true code.
worst=0
for i in "${!pids[@]}"; do
  signalled=""
  wait "${pids[i]}"
  code=$?
  while [[ -n $signalled ]]; do
    signalled=""
    wait "${pids[i]}"
    code=$?
  done
  echo "[INFO] ${names[i]}: exit code $code: $(last_line "${logs[i]}")"
  if ((code > worst)); then worst=$code; fi
done
exit "$worst"
