#!/usr/bin/env bash
# Cloud TPU slices: made, set up, trained on, made again where spot ones were taken back, and removed
# when the run is at its end.
#
#   export NAME=proteus ZONE=us-west4-a TYPE=v5litepod-16 SPOT=1 SOURCE=https://...
#   launch/tpu_pod.sh start --config=configs/vitb14.py --workdir=gs://bucket/vitb14 ...
#   launch/tpu_pod.sh attach | logs [LINES] | status | stop | delete
#
# The run outlives this terminal: where that ends, or with Ctrl-C, slice and run stay, and the same
# start watches them again. stop saves, ends the run and removes the slice; a slice that nobody watches
# costs until then.
#
# QUEUED=1 waits in Google's queue of resources instead of asking again and again. SLICES=2 makes so
# many slices for one run (queued, too). SHARED=HOST:/FOLDER mounts a Filestore as /mnt/shared on every
# host, for a workdir or images there. KEEP=1 does not remove slices. DRY_RUN=1 prints the commands.
# Needs gcloud, logged in, with a project set.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?zone, as us-west4-a}"
SLICES="${SLICES:-1}"
[ "$SLICES" -eq 1 ] || QUEUED=1
# Seconds to save after SIGTERM: a spot slice is taken back about 30 s after it is told.
STOP_WITHIN="${STOP_WITHIN:-25}"
PAUSE="${PAUSE:-30}"
# A slice that is there and fails so often in a row will not do better.
PATIENCE=3
case "${1:-}" in
  start | attach | logs | status | stop | delete)
    what="$1"
    shift
    ;;
  --*) what=start ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
said="$(mktemp)"
trap 'rm -f "$said"' EXIT
# Whether there has been a slice, whether this call made it, and whether it began a run there.
made=""
mine=""
begun=""

run() {
  echo "+ $*" >&2
  [ -n "${DRY_RUN:-}" ] || "$@"
}

tpu() {
  run gcloud compute tpus tpu-vm "$@" "--zone=$ZONE" --quiet
}

queue() {
  run gcloud compute tpus queued-resources "$@" "--zone=$ZONE" --quiet
}

# The slices: NAME or, where they are several, NAME-0, NAME-1 and so on.
nodes() {
  if [ "$SLICES" -eq 1 ]; then
    echo "$NAME"
  else
    for ((number = 0; number < SLICES; number++)); do echo "$NAME-$number"; done
  fi
}

# gcloud starts a command again where its connection breaks: what is run so must bear that.
everywhere() {
  local node pids=() code=0
  for node in $(nodes); do
    tpu ssh "$node" --worker=all "--command=$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

on_the_first() {
  tpu ssh "$(nodes | head -n 1)" "--worker=${WORKER:-0}" "--command=cd proteus_jax && $1"
}

detached="NAME=$NAME launch/detached.sh"

# READY or another state of a slice, or of its place in the queue; NONE where there is none; nothing
# where gcloud cannot tell, as without a network.
state_of() {
  if gcloud compute tpus "$1" describe "$2" "--zone=$ZONE" "--format=value($3)" 2>"$said"; then
    return
  fi
  ! grep -qiE 'not_found|not found' "$said" || echo NONE
}

look() {
  local node found
  if [ -n "${DRY_RUN:-}" ]; then
    echo "${made:-NONE}"
    return
  fi
  if [ -n "${QUEUED:-}" ]; then
    found="$(state_of queued-resources "$NAME" state.state)"
    [ "$found" = ACTIVE ] || { echo "$found"; return; }
  fi
  for node in $(nodes); do
    found="$(state_of tpu-vm "$node" state)"
    [ "$found" = READY ] || { echo "$found"; return; }
  done
  echo READY
}

remove() {
  if [ -n "${QUEUED:-}" ]; then
    queue delete "$NAME" --force || true
  else
    tpu delete "$NAME" || true
  fi
}

lacks_capacity() {
  cat "$said" >&2
  grep -qiE 'capacity|exhausted|stockout|unavailable|internal error' "$said"
}

# Asks for as long as there is no slice to have; any other refusal is final, unless there is one all the
# same, as where a connection broke while it was made. What is queued is there later.
create() {
  local place=("--node-id=$NAME")
  mine=1
  if [ -n "${QUEUED:-}" ]; then
    [ "$SLICES" -eq 1 ] || place=("--node-count=$SLICES" "--node-prefix=$NAME")
    queue create "$NAME" "--accelerator-type=$TYPE" "--runtime-version=$VERSION" "${place[@]}" \
      ${SPOT:+--spot} || [ "$(look)" != NONE ] || exit 1
    return
  fi
  until tpu create "$NAME" "--accelerator-type=$TYPE" "--version=$VERSION" ${SPOT:+--spot} 2>"$said"; do
    if ! lacks_capacity; then
      [ "$(look)" != NONE ] || exit 1
      return 0
    fi
    sleep "$PAUSE"
    remove >/dev/null 2>&1
  done
  cat "$said" >&2
}

# Until all slices are there. One that was taken back is made again; one that was there and is gone
# was deleted by somebody, who means it.
prepare() {
  local state
  while true; do
    state="$(look)"
    case "$state" in
      READY) return ;;
      "") echo "$(date +%H:%M:%S) gcloud does not answer: $(head -c 300 "$said")" >&2 ;;
      NONE)
        if [ -n "$made" ]; then
          echo "$NAME was deleted: start makes it again" >&2
          exit 75
        fi
        create
        made=READY
        continue
        ;;
      # Taken back: what is left of it still has its name.
      PREEMPTED | TERMINATED | SUSPENDING | SUSPENDED)
        echo "$(date +%H:%M:%S) $NAME: $state; it is made again"
        remove >/dev/null 2>&1
        create
        ;;
      FAILED)
        gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" >&2 || true
        exit 1
        ;;
      STOPPED | HIDING | HIDDEN)
        echo "$NAME is $state: start it with gcloud, or remove it with launch/tpu_pod.sh delete" >&2
        exit 1
        ;;
      # On its way to be there or, where somebody deletes it, not to be.
      *) echo "$(date +%H:%M:%S) $NAME: $state" ;;
    esac
    sleep "$PAUSE"
  done
}

# Does nothing on a host that is set up; a mount does not outlive a restart of the host.
setup() {
  [ -z "${SHARED:-}" ] || everywhere "mountpoint -q /mnt/shared || { sudo apt-get install -y -q \
nfs-common && sudo mkdir -p /mnt/shared && sudo mount $SHARED /mnt/shared; }" || return
  everywhere "test -e proteus_jax/.ready || { rm -rf proteus_jax && git clone --depth=1 $SOURCE \
proteus_jax && cd proteus_jax && launch/setup.sh tpu gcs && touch .ready; }"
}

# Each worker finds the others by the metadata of its TPU. Each fetches the teacher for itself, unless
# PROTEUS_JAX_CACHE names a shared disk. Where another terminal has begun the run it is left alone.
begin() {
  local found=""
  [ -n "$mine$begun" ] || found="$(on_the_first "$detached status" 2>/dev/null)" || true
  begun=1
  if [[ "$found" != running* ]]; then
    setup || return 1
    everywhere "cd proteus_jax && $cache .venv/bin/python main.py --prepare $words" || return
  fi
  everywhere "cd proteus_jax && $cache $detached start .venv/bin/python main.py \
--config.preemption_timeout_s=$STOP_WITHIN $words" || return 1
}

# Until the run is at its end: with its exit code, or 255 where the slice is gone.
watch() {
  local found last="" silent=0
  while true; do
    if found="$(on_the_first "$detached status" 2>"$said")"; then
      silent=0
    else
      # A connection that breaks is no end of the run.
      [ $((silent++ % 10)) -ne 0 ] ||
        echo "$(date +%H:%M:%S) host ${WORKER:-0} does not answer: $(tail -n 1 "$said")" >&2
      case "$(look)" in READY | "") found="" ;; *) return 255 ;; esac
    fi
    [ -z "${DRY_RUN:-}" ] || return 0
    if [ "$(tail -n 1 <<<"$found")" != "$last" ]; then
      last="$(tail -n 1 <<<"$found")"
      echo "$(date +%H:%M:%S) $last"
    fi
    case "$found" in
      running* | "") ;;
      "ended "[0-9]*)
        ended=1
        found="$(head -n 1 <<<"$found")"
        [ "$found" = "ended 0" ] || on_the_first "$detached logs 20" || true
        return "${found#ended }"
        ;;
      "stopped "*)
        echo "$NAME was asked to stop, and did: start goes on" >&2
        exit 75
        ;;
      *) return 1 ;;
    esac
    sleep "$PAUSE"
  done
}

start() {
  local code failures=0 ended
  : "${TYPE:?type, as v5litepod-16}" "${SOURCE:?address to clone this repository from}"
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
  words="$(printf '%q ' "$@")"
  cache="${PROTEUS_JAX_CACHE:+PROTEUS_JAX_CACHE=$(printf %q "${PROTEUS_JAX_CACHE:-}")}"
  trap 'echo "slice and run stay: launch/tpu_pod.sh start watches them again, stop ends them" >&2
    exit 75' INT TERM HUP
  while true; do
    prepare
    made=READY
    code=0 ended=""
    { begin && watch; } || code=$?
    case "$code" in
      # Done; or the run's input is wrong, or it diverged: again would be the same.
      0 | 2 | 3) break ;;
      75) failures=0 ;;
      # A slice that was taken back is no failure of the run.
      *) if [ "$(look)" = READY ]; then failures=$((failures + 1)); else failures=0; fi ;;
    esac
    [ "$failures" -lt "$PATIENCE" ] || break
    sleep "$PAUSE"
  done
  # On a slice that was there before another run may be at work, whatever failed here.
  if [ -z "$ended$mine" ]; then
    echo "$NAME stays: launch/tpu_pod.sh stop or delete removes it" >&2
  elif [ -z "${KEEP:-}" ]; then
    remove
  fi
  exit "$code"
}

stop() {
  if [ "$(look)" = READY ] && ! everywhere "cd proteus_jax && $detached stop"; then
    echo "not every host could be asked: $NAME stays; launch/tpu_pod.sh delete removes it unsaved" >&2
    exit 1
  fi
  [ -n "${KEEP:-}" ] || remove
}

case "$what" in
  start) start "$@" ;;
  attach) on_the_first "$detached attach" ;;
  logs) on_the_first "$detached logs ${1:-50}" ;;
  status) on_the_first "$detached status" ;;
  stop) stop ;;
  delete) remove ;;
esac
