#!/usr/bin/env bash
# The whole pipeline on one machine with several GPUs: training and evaluation on every GPU, the rest in one process.
#   launchers/deepspeed.sh my.yaml train.deepspeed=zero2
# SIGTERM, SIGUSR1 and Ctrl-C reach every rank: they save at the next step, and the same command resumes.
# HOSTFILE=hosts starts ranks on the machines of that file, after checking it with `pst doctor`.
# NUM_GPUS=2 limits the number of ranks; on a machine without GPUs it is the number of CPU (gloo) ranks.
# MASTER_PORT=29500 sets the port where ranks meet; by default a free one, so that two runs on a machine do not collide.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0" >&2; exit 2; }
config=$1
shift

set -m # a child has its own process group, and signals are passed on below
child='' launching='' told=''
pass_on() {
  told=1
  local ranks=''
  # The launcher would signal its ranks twice, and the second signal ends them without saving: signal them here.
  [ -z "$launching" ] || ranks=$(pgrep -P "$(pgrep -P "$child" | head -n 1)" || true)
  # shellcheck disable=SC2086  # several process numbers
  kill "-$1" ${ranks:-$child} 2>/dev/null || true
}
for signal in TERM INT USR1; do
  # shellcheck disable=SC2064  # the name of the signal, now
  trap "pass_on $signal" "$signal"
done
run() {
  [ -z "$told" ] || exit 75
  local code=0
  "$@" &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the child
    code=0
    wait "$child" || code=$?
  done
  [ -z "$told" ] || { code=0; wait "$child" || code=$?; }
  [ "$code" = 0 ] || exit "$code"
}

[[ -z ${HOSTFILE:-} ]] || run pst doctor "$config" "$@" "hostfile=$HOSTFILE" --quiet
run pst shard "$config" "$@"
run pst embed "$config" "$@"
on_every_rank() {
  local port=${MASTER_PORT:-}
  if [ -z "$port" ] && [ -z "${HOSTFILE:-}" ]; then
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  fi
  [ -n "${HOSTFILE:-}" ] || launching=1
  run deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} \
    ${port:+--master_port "$port"} --module "$@"
  launching=''
}
on_every_rank pst_dist.train "$config" "$@"
on_every_rank pst_dist evaluate "$config" "$@"
run pst run "$config" "$@"
