#!/usr/bin/env bash
# One machine with NVIDIA GPUs (8 x A100 or H100), or none: every GPU that is here trains.
#
#   launch/node.sh --config=configs/vitb14.py --workdir=~/runs/vitb14 --config.data.root=~/imagenet/train
#   launch/detached.sh start launch/node.sh --config=...
#
# The second outlives this terminal; launch/detached.sh attach, logs and stop go with it. DRY_RUN=1
# prints the commands. A run that was interrupted (exit code 75) is started again; any other end, as
# when the system kills it for want of memory, is one.
set -euo pipefail
cd "$(dirname "$0")/.."

# Does nothing where JAX for this machine's devices is installed.
[ -n "${PYTHON:-}" ] || launch/setup.sh
# shellcheck source=launch/gpu.sh
[ ! -e /dev/nvidia0 ] || source launch/gpu.sh

# A signal to this script is one to the run, and the end.
stopped=
child=
trap 'stopped="1$stopped"; kill -TERM "$child" 2>/dev/null || true' INT TERM

# A trap ends a wait before its time; the code of a process is had as often as it is asked for.
wait_for() {
  local waited
  while true; do
    code=0 waited="$stopped"
    wait "$1" || code=$?
    [ "$stopped" != "$waited" ] || return 0
  done
}

while true; do
  echo "+ ${PYTHON:-.venv/bin/python} main.py $*"
  [ -z "${DRY_RUN:-}" ] || exit 0
  "${PYTHON:-.venv/bin/python}" main.py "$@" &
  child=$!
  wait_for "$child"
  [ "$code" -eq 75 ] && [ -z "$stopped" ] || exit "$code"
  sleep "${PAUSE:-10}" &
  child=$!
  wait_for "$child"
  # Asked to end in the pause: the run stays what it was, interrupted.
  [ -z "$stopped" ] || exit 75
done
