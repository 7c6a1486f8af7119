#!/usr/bin/env bash
# A Cloud TPU slice: made, set up, trained on, and made again where it was a spot one and was taken
# back; removed at the end.
#
#   NAME=proteus ZONE=us-west4-a TYPE=v5litepod-16 SPOT=1 SOURCE=https://... \
#     launch/tpu_pod.sh --config=configs/vitb14.py --workdir=gs://bucket/vitb14 ...
#
# SHARED=HOST:/FOLDER mounts a Filestore as /mnt/shared on every host, for a workdir or images there.
#
# DRY_RUN=1 prints the commands. Needs gcloud, logged in, with a project set.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?zone, as us-west4-a}" "${TYPE:?type, as v5litepod-16}"
: "${SOURCE:?address to clone this repository from}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"

run() {
  echo "+ $*"
  [ -n "${DRY_RUN:-}" ] || "$@"
}

tpu() {
  run gcloud compute tpus tpu-vm "$@" "--zone=$ZONE" --quiet
}

everywhere() {
  tpu ssh "$NAME" --worker=all "--command=$1"
}

ready() {
  [ -n "${DRY_RUN:-}" ] && return 1
  [ "$(gcloud compute tpus tpu-vm describe "$NAME" "--zone=$ZONE" '--format=value(state)' 2>/dev/null)" = READY ]
}

create() {
  # A spot slice that was taken back still has its name.
  tpu delete "$NAME" >/dev/null 2>&1 || true
  local kind=()
  [ -z "${SPOT:-}" ] || kind=(--spot)
  tpu create "$NAME" "--accelerator-type=$TYPE" "--version=$VERSION" "${kind[@]}"
  [ -z "${SHARED:-}" ] || everywhere "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/shared \
&& sudo mount $SHARED /mnt/shared"
  everywhere "git clone --depth=1 $SOURCE proteus_jax && cd proteus_jax && make .venv/run.stamp \
&& .venv/bin/python -m pip install --quiet 'jax[tpu]>=0.10.2,<0.13' -r requirements-gcs.txt"
}

while true; do
  ready || create
  code=0
  # Each worker finds the others by the metadata of its TPU.
  everywhere "cd proteus_jax && .venv/bin/python main.py $(printf '%q ' "$@")" || code=$?
  case "$code" in
    # Done; or the run's input is wrong, or it diverged: again would be the same.
    0 | 2 | 3) break ;;
  esac
  sleep "${PAUSE:-30}"
done
tpu delete "$NAME"
exit "$code"
