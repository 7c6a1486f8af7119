#!/usr/bin/env bash
# Makes the environment of this machine in .venv: Python 3.11 or newer, this package, and JAX for the
# devices that are here. EXTRA are further extras of pyproject.toml, as gcs.
#
#   launch/setup.sh [auto|cpu|cuda12|cuda13|tpu] [EXTRA ...]
#
# Where the system's Python is older, as on TPU images, uv fetches one. Does nothing where all of it
# is installed already. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
kind="${1:-auto}"
shift || true
BIN=.venv/bin

run() {
  echo "+ $*"
  [ -n "${DRY_RUN:-}" ] || "$@"
}

# CUDA and cuDNN come as wheels; the driver has to be new enough for them: 580 for CUDA 13, 525 for 12.
detect() {
  local driver
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" || true
  driver="${driver%%.*}"
  if [[ "$driver" =~ ^[0-9]+$ ]]; then
    if [ "$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi
    [ "$driver" -ge 525 ] || echo "driver $driver: JAX wants 525 or newer" >&2
  elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then
    echo tpu
  else
    echo cpu
  fi
}

automatic=
if [ "$kind" = auto ]; then
  automatic=1
  kind="$(detect)"
fi
case "$kind" in
  cpu) plugin=jaxlib ;;
  cuda12 | cuda13) plugin="jax_${kind}_plugin" ;;
  tpu) plugin=libtpu ;;
  *)
    echo "launch/setup.sh: expected auto, cpu, cuda12, cuda13 or tpu, found $kind" >&2
    exit 2
    ;;
esac

# New enough, and able to make an environment: Debian's may lack the part for that.
suits() {
  "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_uv() {
  command -v uv && return
  if [ ! -x "$HOME/.local/bin/uv" ]; then
    # Where pip may not write to the system's packages, uv's own script puts it there.
    python3 -m pip install --quiet --user uv >/dev/null 2>&1 ||
      curl -LsSf https://astral.sh/uv/install.sh | sh >/dev/null
  fi
  echo "$HOME/.local/bin/uv"
}

make_environment() {
  local python
  for python in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
    if suits "$python"; then
      run "$python" -m venv .venv
      return
    fi
  done
  # Takes an installed one where there is one, and fetches one otherwise.
  run "$(find_uv)" venv --quiet --seed --allow-existing --python 3.11 .venv
}

# What is installed counts, and whether it was all that is asked for now.
asked="$kind $*"
installed() {
  [ -x "$BIN/python" ] && [ "$BIN/complete.stamp" -nt requirements.txt ] &&
    { [ "$(cat "$BIN/complete.stamp")" = "$asked" ] || another_cuda; } &&
    "$BIN/python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$plugin') is None)"
}

# Who chose one by hand, as on a machine without the driver, has it kept by those that have it.
another_cuda() {
  local before
  before="$(cat "$BIN/complete.stamp")"
  [ -n "$automatic" ] && [[ "$kind" == cuda* && "$before" == cuda* ]] || return 1
  [ "${before#cuda1[23]}" = "${asked#cuda1[23]}" ] || return 1
  plugin="jax_${before%% *}_plugin"
}

installed && exit 0
# One whose making was interrupted may lack pip.
"$BIN/python" -m pip --version >/dev/null 2>&1 ||
  "$BIN/python" -m ensurepip >/dev/null 2>&1 || make_environment
extras=("$@")
[ "$kind" = cpu ] || extras=("$kind" "$@")
chosen="$(IFS=,; echo "${extras[*]}")"
# In one command: JAX, its plugin and its libraries pin each other. Editable: `proteus` is then the
# code of this folder, as main.py is.
run "$BIN/python" -m pip install --quiet --disable-pip-version-check \
  --editable ".${chosen:+[$chosen]}"
[ -n "${DRY_RUN:-}" ] || echo "$asked" >"$BIN/complete.stamp"
