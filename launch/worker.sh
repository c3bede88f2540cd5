#!/usr/bin/env bash
# Runs a program on a laptop, on a TPU VM or as one worker of a pod: the same command on
# every one of them.
#
#   bash launch/worker.sh PROGRAM [--flag=value …]   runs it and exits with its code
#   bash launch/worker.sh --start PROGRAM …          in the background
#   bash launch/worker.sh --setup                    only makes the environment
#   bash launch/worker.sh --status                   what runs, the end of its log
#   bash launch/worker.sh --stop                     TERM, $JAXROBUST_GRACE s (120), KILL
#
# PROGRAM may be written `jaxrobust PROGRAM`, as sweeps print it. A worker runs one
# program: the one before is stopped first. $JAXROBUST_STATE (~/.jaxrobust) holds its
# `pid`, its `log` and its `exit` code. On a TPU the environment gets jax's TPU
# extra, and the programs of several hosts find each other (--coordinator=auto).
# $JAXROBUST_TPU=1 or 0 says whether this is a TPU, where /dev does not.
set -euo pipefail
unset CDPATH
state=${JAXROBUST_STATE:-$HOME/.jaxrobust}
case $state in /*) ;; *) state=$PWD/$state ;; esac
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/contract.sh
. "$here/contract.sh"

on_tpu=''
case ${JAXROBUST_TPU:-} in
  0) ;;
  '') if compgen -G '/dev/accel[0-9]*' || compgen -G '/dev/vfio/[0-9]*'; then on_tpu=1; fi ;;
  *) on_tpu=1 ;;
esac > /dev/null

# Whether the recorded process still runs, and is ours: numbers are used again.
alive() {
  pid=$(cat "$state/pid" 2> /dev/null) || return 1
  [[ $pid =~ ^[1-9][0-9]{0,9}$ ]] || return 1
  case $(ps -ww -o args= -p "$pid" 2> /dev/null || true) in
    *'-m jaxrobust.'* | *worker.sh*) ;;
    *) return 1 ;;
  esac
}

stop() {
  require_grace
  local deadline=$((SECONDS + grace))
  if ! alive || [ "$pid" = $$ ]; then return; fi
  echo "stopping process $pid" >&2
  kill -TERM "$pid" 2> /dev/null || true  # It may just have ended.
  while alive && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.1; done
  # A sweep cannot pass KILL on to the run that it waits for.
  # shellcheck disable=SC2046
  if alive; then kill -KILL "$pid" $(pgrep -P "$pid") 2> /dev/null || true; fi
}

status() {
  local what=stopped
  if alive; then
    what=running
  elif [ -f "$state/exit" ]; then
    what="exit $(cat "$state/exit")"
  fi
  echo "== $(uname -n): $what"
  # Indented, so that nothing in there is taken for a line of this function.
  tail -n 10 "$state/log" 2> /dev/null | sed 's/^/  /' || true
}

setup() {
  # Images of TPU VMs have Python 3.10.
  if [ -n "$on_tpu" ]; then
    PATH=$HOME/.local/bin:$PATH
    if ! command -v python3.11 python3.12 python3.13 > /dev/null; then
      echo 'getting Python 3.11 (once)'
      python3 -m pip install --quiet --user uv && python3 -m uv python install 3.11
    fi
  fi
  # shellcheck source=launch/environment.sh
  . "$here/environment.sh"
}

# On a TPU the processes of all its hosts join; jax finds them.
coordinator() {
  local word
  if [ -z "$on_tpu" ] || ! joins "$1"; then return; fi
  for word; do
    case $word in --coordinator | --coordinator=*) return ;; esac
  done
  echo --coordinator=auto
}

# Passes a signal on to the program, which may be about to start.
forward() {
  while [ "$(cat "$state/pid")" = $$ ] && kill -0 "$job" 2> /dev/null; do sleep 0.1; done
  kill "-$1" "$(cat "$state/pid")" 2> /dev/null || true
}

# A machine that shuts down sends TERM to all at once: what the program still has to say
# must be read, and its code recorded.
log() (
  trap '' TERM HUP
  exec tee -a "$state/log"
)

# The program with its output to the log; leaves its code in `exit`.
program() {
  local code=0
  trap : TERM  # Until the program has ended; ignored, it would be so in there, too.
  # The number of `sh` is that of the program after `exec`; its $0 is the record.
  # shellcheck disable=SC2016
  sh -c 'echo $$ > "$0" && exec "$@"' "$state/pid" "$PYTHON" -m "jaxrobust.$1" \
    "${@:2}" 2>&1 | log || code=${PIPESTATUS[0]}
  # Neither the log nor the record changes the code, such as on a full disk.
  { echo "$code" > "$state/exit.tmp" && mv "$state/exit.tmp" "$state/exit"; } || true
  return "$code"
}

run() {
  local flag
  mkdir -p "$state"
  stop
  rm -f "$state/exit"
  echo $$ > "$state/pid"
  flag=$(coordinator "$@")
  if [ -n "$on_tpu" ]; then rm -f /tmp/libtpu_lockfile || true; fi
  setup
  printf '== %s%s\n' "$(date -u '+%Y-%m-%d %H:%M:%S')" "$(printf ' %q' "$@")" \
    >> "$state/log"
  # In a group of its own, so that a Ctrl-C reaches it once, from here.
  set -m
  program "$@" ${flag:+"$flag"} &
  job=$!
  set +m
  trap 'forward TERM' TERM
  trap 'forward INT' INT
  while kill -0 "$job" 2> /dev/null; do wait "$job" || true; done
  wait "$job"
}

start=''
case ${1:-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
  --setup) setup; exit ;;
  --status) status; exit ;;
  --stop) stop; exit ;;
  --start) start=1; shift ;;
esac
as_program "$@"
set -- ${words[@]+"${words[@]}"}
require_program "${1:-}"
if [ -n "$start" ]; then
  mkdir -p "$state"
  stop
  rm -f "$state/exit"
  set -m
  nohup bash "$here/worker.sh" "$@" > /dev/null 2>> "$state/log" < /dev/null &
  echo $! > "$state/pid"
else
  run "$@"
fi
