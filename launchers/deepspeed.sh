#!/usr/bin/env bash
# The whole pipeline on one machine with several GPUs: data stages in one process, training on every GPU, then the report.
#   launchers/deepspeed.sh my.yaml train.deepspeed=zero2
# HOSTFILE=hosts starts ranks on the machines of that file, after checking it with `pst doctor`.
# NUM_GPUS=2 limits the number of ranks; on a machine without GPUs it is the number of CPU (gloo) ranks.
set -euo pipefail
config=$1
shift
[[ -z ${HOSTFILE:-} ]] || pst doctor "$config" "$@" "hostfile=$HOSTFILE" --quiet
pst shard "$config" "$@"
pst embed "$config" "$@"
deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} --module pst_dist.train "$config" "$@"
pst run "$config" "$@"
