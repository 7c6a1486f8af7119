#!/usr/bin/env bash
# Runs a command that outlives this terminal and its ssh connection.
#
#   launch/detached.sh start COMMAND...   begins it; where it runs already that is said, and no more
#   launch/detached.sh attach             shows what it says; Ctrl-C leaves it running
#   launch/detached.sh logs [LINES]       its last lines
#   launch/detached.sh stop               asks it to save and to end, and waits for that
#   launch/detached.sh status             "running", "ended CODE", "stopped CODE" where that was asked for, "lost" or
#                                         "none"; and its last line
#
# NAME tells several on one machine apart; what they say lies in ~/.local/state/proteus_jax/MACHINE/NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME="${NAME:-run}"
# Machines that share a home do not share processes.
folder="${XDG_STATE_HOME:-$HOME/.local/state}/proteus_jax/$(uname -n)/$NAME"
what="${1:-}"
shift || true

# The lock is held by the command and all that it starts, for as long as one of them lives.
running() {
  [ -e "$folder/lock" ] && ! flock --shared --nonblock "$folder/lock" true
}

status() {
  if running; then
    echo running
  elif [ -e "$folder/code" ]; then
    if [ -e "$folder/asked" ]; then echo "stopped $(cat "$folder/code")"; else
      echo "ended $(cat "$folder/code")"
    fi
  elif [ -e "$folder/lock" ]; then
    # Killed, or the machine was started again.
    echo lost
  else
    echo none
  fi
  # What takes the place of a line begins it anew.
  [ ! -e "$folder/output.txt" ] || tail -n 1 "$folder/output.txt" | tr '\r' '\n' | tail -n 1
}

start() {
  [ "$#" -gt 0 ] || { echo "launch/detached.sh start: expected a command" >&2; exit 2; }
  mkdir -p "$folder"
  exec 9>>"$folder/lock"
  # Longer than another terminal needs to look.
  if ! flock --timeout 2 9; then
    echo "$NAME runs already; NAME=$NAME launch/detached.sh attach shows it"
    return
  fi
  rm -f "$folder/code" "$folder/asked"
  # A request to the whole group is one to the command; this shell stays to write down its end.
  # shellcheck disable=SC2016
  setsid nohup bash -c 'trap : TERM INT; code=0; "${@:2}" || code=$?
    echo "$code" >"$1/code.new" && mv "$1/code.new" "$1/code"' \
    detached "$folder" "$@" >>"$folder/output.txt" 2>&1 </dev/null &
  echo $! >"$folder/pid"
  echo "$NAME runs; NAME=$NAME launch/detached.sh attach shows it"
}

case "$what" in
  start) start "$@" ;;
  status) status ;;
  logs) tail -n "${1:-50}" "$folder/output.txt" ;;
  attach) exec tail -n 50 --pid="$(cat "$folder/pid")" -f "$folder/output.txt" ;;
  stop)
    # One that has ended by itself was asked all the same: nothing begins it again.
    [ ! -e "$folder/lock" ] || touch "$folder/asked"
    if running; then
      kill -TERM -- "-$(cat "$folder/pid")" 2>/dev/null || true
      while running; do sleep 1; done
    fi
    status
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' launch/detached.sh >&2
    exit 2
    ;;
esac
