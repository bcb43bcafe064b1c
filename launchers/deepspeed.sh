#!/usr/bin/env bash
# The whole pipeline on one machine with several GPUs: data stages once, training on every GPU, then the report.
#   launchers/deepspeed.sh my.yaml train.deepspeed=zero2
# NUM_GPUS=2 limits the ranks; on a machine without GPUs it is the number of CPU (gloo) ranks.
set -euo pipefail
config=$1
shift
pst shard "$config" "$@"
pst embed "$config" "$@"
deepspeed ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} --module pst_dist.train "$config" "$@"
pst run "$config" "$@"
