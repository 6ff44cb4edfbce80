#!/usr/bin/env bash
# Before a run on several nodes: do they reach each other, and do they agree?
#
# Run it on every node at about the same time, with the settings that train_2node_h800.sh is going to have. Each node prints
# the same table: connections, fingerprint and snapshot of the cache, training data, output directory, versions, GPUs, clocks.
#
#   TIMEOUT_S      how long to wait for the other nodes (default 120)
#   COUNT_SAMPLES  1: read all annotations and compare the number of samples, which may take minutes (default 0)
#
# Exit code: 0 all agree, 1 they do not or one did not come, 2 a setting is wrong.
set -euo pipefail

TIMEOUT_S="${TIMEOUT_S:-120}"
COUNT_SAMPLES="${COUNT_SAMPLES:-0}"

# shellcheck source=scripts/train_2node_h800.sh
source "$(dirname "${BASH_SOURCE[0]}")/train_2node_h800.sh"

# The store's own warnings would come before the sentence that says who is missing.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
choose_python
require_nodes
whole_number TIMEOUT_S

flags=(--nodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
flags+=(--annotation_path "$ANNOTATION_PATH" --data_path "$DATA_PATH")
flags+=(--cache_dir "$VGGT_CACHE_DIR" --data_root "$DATA_ROOT" --output_dir "$OUTPUT_DIR" --timeout_s "$TIMEOUT_S")
if [[ $COUNT_SAMPLES == 1 ]]; then flags+=(--count_samples); fi
echo "[INFO] node $NODE_RANK of $NNODES, meeting at $MASTER_ADDR:$MASTER_PORT; waiting up to $TIMEOUT_S s for the others"
exec "$python" -m vggt_cache.cluster check "${flags[@]}"
