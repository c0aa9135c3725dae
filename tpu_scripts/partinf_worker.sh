#!/usr/bin/env bash
# Runs on every worker of a pod: prepares a synced commit, runs a command so that it outlives the connection, and reports on it.
# Every action may be repeated. Everything lies below ~/partinf-pod.
set -euo pipefail

base="$HOME/partinf-pod"

# setup COMMIT WORDS…: unpack the sent archive and run WORDS in it, once per commit.
setup() {
  local source="$base/source/$1"
  shift
  if [[ -e "$source/.partinf-ready" ]]; then
    echo "already set up"
    return
  fi
  rm -rf "$source"
  mkdir -p "$source"
  tar -xzf "$HOME/partinf-source.tar.gz" -C "$source"
  if [[ -e "$HOME/partinf-plan.toml" ]]; then
    cp "$HOME/partinf-plan.toml" "$source/"
  fi
  cd "$source"
  "$@"
  touch "$source/.partinf-ready"
}

# start RUN COMMIT ATTEMPT WORDS…: run WORDS in the synced commit, detached. The folder of the run is made once; the process that makes it starts the command.
start() {
  local run="$base/runs/$1" source="$base/source/$2"
  export PARTINF_RUN_ID="$1" PARTINF_ATTEMPT="$3" PARTINF_RESULTS="$base/runs/$1/results"
  shift 3
  mkdir -p "$base/runs"
  if ! mkdir "$run" 2>/dev/null; then
    echo "already started"
    return
  fi
  mkdir "$run/results"
  cd "$source"
  PATH="$source/.venv/bin:$PATH" setsid nohup bash "$HOME/partinf_worker.sh" body "$run" "$@" \
    </dev/null >"$run/stdout" 2>"$run/stderr" &
  echo "$!" >"$run/pid"
}

# body RUN_FOLDER WORDS…: what is started; leaves the exit code.
body() {
  local run="$1" code=0
  shift
  "$@" || code=$?
  echo "$code" >"$run/exit_code.part"
  mv "$run/exit_code.part" "$run/exit_code"
}

# status RUN: one line, `partinf-status running`, `exit N` or `lost` (gone without an exit code).
status() {
  local run="$base/runs/$1" pid
  pid="$(cat "$run/pid" 2>/dev/null || true)"
  if [[ -n "$pid" && ! -e "$run/exit_code" ]] && kill -0 "$pid" 2>/dev/null; then
    echo "partinf-status running"
  elif [[ -e "$run/exit_code" ]]; then
    echo "partinf-status exit $(cat "$run/exit_code")"
  else
    echo "partinf-status lost"
  fi
}

# follow RUN: both outputs from their beginning until the run ends.
follow() {
  local run="$base/runs/$1"
  tail -q -n +1 --sleep-interval=0.5 --pid="$(cat "$run/pid")" -f "$run/stdout" "$run/stderr"
}

# pack RUN: outputs, exit code and results as one file to fetch.
pack() {
  tar -czf "$base/$1.tar.gz.part" -C "$base/runs" "$1"
  mv "$base/$1.tar.gz.part" "$base/$1.tar.gz"
}

action="${1:?usage: partinf_worker.sh setup|start|status|follow|pack …}"
shift
case "$action" in
  setup | start | body | status | follow | pack) "$action" "$@" ;;
  *)
    echo "partinf_worker.sh: unknown action '$action'" >&2
    exit 2
    ;;
esac
