#!/usr/bin/env bash
# Watch a training run through its log: a live table on a terminal, plain lines in a pipe.
#
#   bash scripts/monitor_training.sh /path/to/outputs/vln_h800_8gpu/train_*.log
#
# Takes log files, quoted patterns and output directories; patterns and directories also find logs that begin
# later. The flags are those of `vggt-cache monitor` (--once, --json, --interval, ...; --help lists them), and so
# are the exit codes. See docs/monitor.md.
#
#   PYTHON  the interpreter; the project's .venv, else python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

if [[ $# -eq 0 ]]; then
  echo "[ERROR] no log is named, so there is nothing to watch: bash scripts/monitor_training.sh <log, pattern or output directory>" >&2
  exit 2
fi

export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m vggt_cache monitor "$@"
