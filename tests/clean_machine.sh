#!/usr/bin/env bash
# What a stranger does: the README's two commands in a fresh clone, with an empty home and no cache,
# then quickstart again with no index to ask. Nothing but a package index is reached.
#
#   tests/clean_machine.sh [--part | --image]
#
# --part makes a few steps of quickstart, from what requirements.lock pins, and leaves the tests out.
# --image runs the steps of launch/Dockerfile in an environment of its own, for a CPU, then as many.
set -euo pipefail
source="$(cd "$(dirname "$0")/.." && pwd)"
part="${1:-}"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
mkdir "$place/home"
git clone --quiet "$source" "$place/proteus_jax"
cd "$place/proteus_jax"

# Nothing of this user's: only where programs and the package index are.
alone() {
    local kept=() name
    for name in PATH LANG TMPDIR http_proxy https_proxy HTTP_PROXY HTTPS_PROXY no_proxy NO_PROXY; do
        [ -n "${!name:-}" ] && kept+=("$name=${!name}")
    done
    while IFS= read -r name; do
        [ "$name" = PIP_CACHE_DIR ] || kept+=("$name=${!name}")
    done < <(compgen -e | grep -E '^(PIP_|SSL_CERT|PYENV)' || true)
    env -i HOME="$place/home" "${kept[@]}" "$@"
}

if [ "$part" = --image ]; then
    "${PYTHON:-python3}" -m venv .venv
    # An image begins at its root; here its volume is beside the code.
    sed -n 's/^RUN //p' launch/Dockerfile | sed 's#mkdir /runs#mkdir runs#' | while IFS= read -r step; do
        echo "+ $step"
        alone env EXTRAS=gcs PATH="$PWD/.venv/bin:$PATH" bash -c "$step" </dev/null
    done
    alone .venv/bin/python main.py --config=configs/quickstart.py --config.steps=3 --config.init.images=64 --workdir=runs/image
    exit
fi
if [ "$part" = --part ]; then
    alone make .venv/locked.stamp PYTHON="${PYTHON:-python3}"
    run=(.venv/bin/python main.py --config=configs/quickstart.py --config.steps=3 --config.init.images=64)
else
    alone make quickstart PYTHON="${PYTHON:-python3}"
    test -f runs/quickstart/student/model.safetensors
    run=(.venv/bin/python main.py --config=configs/quickstart.py --config.steps=3 --config.init.images=64)
fi
[ "$part" = --part ] && alone "${run[@]}" --workdir=runs/first
echo "once more, without an index"
alone env PIP_NO_INDEX=1 PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null http_proxy=http://127.0.0.1:9 \
    https_proxy=http://127.0.0.1:9 "${run[@]}" --workdir=runs/offline
test -f runs/offline/student/model.safetensors
if [ "$part" = --part ]; then
    cmp runs/first/student/model.safetensors runs/offline/student/model.safetensors
else
    alone make test PYTHON="${PYTHON:-python3}"
fi
test -z "$(git status --porcelain)"
echo "a clean machine: all is well"
