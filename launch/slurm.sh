#!/usr/bin/env bash
# Several nodes under SLURM: one task a node takes all of its GPUs; the tasks find each other by
# SLURM's own variables.
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/vitl14.py --workdir=/shared/vitl14 ...
#
# The workdir and this folder must lie where all nodes see them. What is missing is installed into
# .venv, and the teacher fetched, once, on the first node; where nodes have no network, do both before,
# where there is one: launch/setup.sh cuda12, then .venv/bin/python main.py --prepare --config=...
#
# One minute before the time limit or a preemption SLURM sends SIGTERM: the run saves, or gives that
# up after 50 s, exits with 75, and is queued again. Any other end is one: SLURM itself queues again
# what a lost node ended. CHECK=0 leaves out the look at the network between the nodes.
#SBATCH --job-name=proteus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=proteus-%j.txt
set -euo pipefail
# sbatch runs a copy of this file: the folder is where it was given.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

if [ -z "${PYTHON:-}" ] && ! launch/setup.sh; then
  echo "this node cannot install what is needed: run launch/setup.sh cuda12 (or cuda13) where there" \
    "is a network and the folder is seen, then submit again" >&2
  exit 2
fi
PYTHON="${PYTHON:-.venv/bin/python}"
# shellcheck source=launch/gpu.sh
source launch/gpu.sh

# Since 22.05 srun does not take the job's --cpus-per-task by itself.
on_all_nodes() {
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$PYTHON" main.py "$@"
}

run() {
  "$PYTHON" main.py --prepare "$@" || return
  if [ "${CHECK:-1}" != 0 ] && [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    on_all_nodes --devices || return
  fi
  on_all_nodes "--config.hosts=${SLURM_NNODES}" --config.preemption_timeout_s=50 "$@"
}

code=0
run "$@" || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
