#!/bin/bash
# One job per branch of an experiment, on a file system that all nodes share, and one job for everything after them:
#   bash examples/slurm_branches.sh EXPERIMENT.yaml OUT code law math
# In EXPERIMENT.yaml, `launch: torchrun --nproc-per-node 8` uses the eight GPUs of a node for each training. A job that was
# cut short goes on where it was when it is submitted again.
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  experiment=$1 out=$2
  shift 2
  options=(--parsable --nodes=1 --ntasks=1 --gpus-per-node=8 --time=7-00:00:00 --export=ALL)
  seed=$(PHASE=seed sbatch "${options[@]}" --job-name=seed "$0" "$experiment" "$out")
  branches=$(PHASE=branch sbatch "${options[@]}" --job-name=branch --array=0-$(($# - 1)) \
    --dependency=afterok:"$seed" "$0" "$experiment" "$out" "$@")
  PHASE=rest sbatch "${options[@]}" --job-name=mixtures --dependency=afterok:"$branches" "$0" "$experiment" "$out"
  exit
fi

experiment=$1 out=$2
shift 2
case $PHASE in
  # A seed that is given, not trained, has no steps of its own.
  seed) bamoe run "$experiment" "$out" --only text --only 'run-*/untrained' --only 'run-*/seed' ;;
  branch)
    domains=("$@")
    bamoe run "$experiment" "$out" --only "branch/${domains[$SLURM_ARRAY_TASK_ID]}"
    ;;
  rest) bamoe run "$experiment" "$out" ;;
esac
