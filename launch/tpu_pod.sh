#!/usr/bin/env bash
# A Cloud TPU slice: made, set up, trained on, made again where it was a spot one and was taken back,
# and removed at the end, however that comes.
#
#   NAME=proteus ZONE=us-west4-a TYPE=v5litepod-16 SPOT=1 SOURCE=https://... \
#     launch/tpu_pod.sh --config=configs/vitb14.py --workdir=gs://bucket/vitb14 ...
#
# SHARED=HOST:/FOLDER mounts a Filestore as /mnt/shared on every host, for a workdir or images there.
# KEEP=1 does not remove the slice. DRY_RUN=1 prints the commands. Needs gcloud, logged in, with a
# project set.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?zone, as us-west4-a}" "${TYPE:?type, as v5litepod-16}"
: "${SOURCE:?address to clone this repository from}"
# The image that goes with each type (cloud.google.com/tpu/docs/runtimes); VERSION names another.
case "$TYPE" in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  v2-* | v3-* | v4-*) image=tpu-ubuntu2204-base ;;
  *) image="" ;;
esac
VERSION="${VERSION:-$image}"
: "${VERSION:?the runtime version that goes with $TYPE}"
# Seconds to save after SIGTERM: a spot slice is taken back about 30 s after it is told.
STOP_WITHIN="${STOP_WITHIN:-25}"
PAUSE="${PAUSE:-30}"
# A slice that is there and fails so often in a row will not do better.
PATIENCE=3
said="$(mktemp)"

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

finish() {
  code=$?
  rm -f "$said"
  [ -n "${KEEP:-}" ] || tpu delete "$NAME" || true
  exit "$code"
}
trap finish EXIT
trap 'exit 75' INT TERM

# Waits for as long as there is no slice to have; any other refusal is final.
create() {
  local kind=()
  [ -z "${SPOT:-}" ] || kind=(--spot)
  # A spot slice that was taken back still has its name.
  tpu delete "$NAME" >/dev/null 2>&1 || true
  until tpu create "$NAME" "--accelerator-type=$TYPE" "--version=$VERSION" "${kind[@]}" 2>"$said"; do
    cat "$said" >&2
    grep -qiE 'capacity|exhausted|stockout|unavailable|internal error' "$said" || exit 1
    sleep "$PAUSE"
    tpu delete "$NAME" >/dev/null 2>&1 || true
  done
}

# Does nothing on a host that is set up; a mount does not outlive a restart of the host.
setup() {
  [ -z "${SHARED:-}" ] || everywhere "mountpoint -q /mnt/shared || { sudo apt-get install -y -q \
nfs-common && sudo mkdir -p /mnt/shared && sudo mount $SHARED /mnt/shared; }"
  everywhere "test -e proteus_jax/.ready || { rm -rf proteus_jax && git clone --depth=1 $SOURCE \
proteus_jax && cd proteus_jax && launch/setup.sh tpu requirements-gcs.txt && touch .ready; }"
}

failures=0
while true; do
  ready || create
  code=0
  # Each worker finds the others by the metadata of its TPU.
  { setup && everywhere "cd proteus_jax && .venv/bin/python main.py \
--config.stop_within=$STOP_WITHIN $(printf '%q ' "$@")"; } || code=$?
  case "$code" in
    # Done; or the run's input is wrong, or it diverged: again would be the same.
    0 | 2 | 3) exit "$code" ;;
    75) failures=0 ;;
    # A slice that was taken back is no failure of the run.
    *) if ready; then failures=$((failures + 1)); else failures=0; fi ;;
  esac
  [ "$failures" -lt "$PATIENCE" ] || exit "$code"
  sleep "$PAUSE"
done
