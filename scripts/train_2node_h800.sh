#!/usr/bin/env bash
# Train on several nodes: run this on every node, with the same settings except NODE_RANK.
#
#   export MASTER_ADDR=192.168.1.100   # address of node 0
#   export NODE_RANK=0                 # 1 on the second node
#   export NNODES=2
#   export VGGT_CACHE_DIR=/shared/cache/vggt_features
#   bash scripts/train_2node_h800.sh
#
# Model, data and hyperparameters are set as in scripts/train_h800.sh, by exporting them or by editing that file.
# Before the first run: bash scripts/check_cluster.sh, on every node, with the same settings. See docs/multi_node.md.
set -euo pipefail

# ---- Which nodes
NNODES="${NNODES:-2}"
NODE_RANK="${NODE_RANK:-}"                # required: 0 on the master node, then 1, ...
MASTER_ADDR="${MASTER_ADDR:-}"            # required: address of node 0 in the network that all nodes share
MASTER_PORT="${MASTER_PORT:-29500}"       # free on node 0, the same on every node
export MEET_TIMEOUT_S="${MEET_TIMEOUT_S:-600}" # how long the nodes wait for each other at the start

# ---- Which network. Empty: found out
NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-}" # empty: the interface towards MASTER_ADDR
GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-}" # empty: the same
NCCL_IB_HCA="${NCCL_IB_HCA:-}"               # InfiniBand cards, e.g. mlx5_0,mlx5_1; empty: NCCL takes all that are up

# ---- On storage that all nodes share: each writes a part of every checkpoint
OUTPUT_DIR="${OUTPUT_DIR:-./outputs/vln_h800_2node}"

# ---- Nothing to edit from here on; all other settings are those of train_h800.sh
# shellcheck source=scripts/train_h800.sh
source "$(dirname "${BASH_SOURCE[0]}")/train_h800.sh"

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  prepare_node "$@"
  meet_over_the_network
  train "$@"
fi
