#!/usr/bin/env bash
# The whole pipeline as Slurm jobs, each waiting for the previous one: shard -> embed -> train -> evaluate, export, report.
#
#   cluster/pipeline.sh my.yaml train.deepspeed=zero2 -- --nodes=2 --gpus-per-node=8 --time=04:00:00
#
# The words after -- are sbatch's options for the training job. ALL="--account=…" sets options of every job.
# EMBED="--nodes=4 --gpus-per-node=8" embeds with Ray on that many nodes; without it, one process on one node does.
# Prints the job numbers. A job skips a stage that is already complete, so after a failure the same command resumes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
words=() training=()
while (($#)) && [[ $1 != -- ]]; do
  words+=("$1")
  shift
done
(($#)) && shift && training=("$@")
((${#words[@]})) || { echo "usage: $0 config.yaml [key.sub=value …] [-- sbatch options of the training]" >&2; exit 2; }
read -ra all <<<"${ALL:-}"
read -ra embedding <<<"${EMBED:-}"

# Inside a job (salloc, a notebook), these jobs would inherit the outer job's memory, tasks and export settings.
for variable in $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SRUN|SALLOC|PMI|PMIX)_'); do
  case $variable in
    SLURM_CONF | SLURM_CONF_SERVER | SLURM_JWT | SLURM_CLUSTERS | SBATCH_CLUSTERS | SBATCH_ACCOUNT) ;;
    *) unset "$variable" ;;
  esac
done

submit() { # prints only the job number; Slurm removes a job whose predecessor failed instead of letting it wait forever
  sbatch --parsable --kill-on-invalid-dep=yes "${all[@]}" "$@" | cut -d ';' -f 1
}
pst() { # pst VERB: the command of a job that runs the verb in one process on one node
  printf '%q ' "${PST_PYTHON:-python}" -m pst_dist.cli "$1" "${words[@]}"
}

shard=$(submit --job-name=pst-shard --output=pst-shard-%j.log --wrap "$(pst shard)")
if ((${#embedding[@]})); then
  embed=$(submit --dependency="afterok:$shard" "${embedding[@]}" "$here/ray.sbatch" "${words[@]}")
else
  embed=$(submit --dependency="afterok:$shard" --job-name=pst-embed --output=pst-embed-%j.log --wrap "$(pst embed)")
fi
train=$(submit --dependency="afterok:$embed" "${training[@]}" "$here/train.sbatch" "${words[@]}")
report=$(submit --dependency="afterok:$train" --job-name=pst-report --output=pst-report-%j.log \
  --wrap "$(pst evaluate) && $(pst export) && $(pst report)")
echo "shard $shard -> embed $embed -> train $train -> report $report"
