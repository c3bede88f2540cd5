#!/usr/bin/env bash
# Rehearses a pod on one machine: a job of N processes on its CPU, over loopback.
#
#   bash launch/pod.sh N [--devices=M] PROGRAM [--flag=value …]
#
# Such as: pod.sh 2 --devices=4 train --workdir=runs/two --config=experiments/digits.py
#
# Every process has M devices (1). Lines of its output start with its number. TERM and
# Ctrl-C go to all of them. Once one has failed, or was asked to stop, the others have
# $JAXROBUST_GRACE seconds (120) to end, then get TERM, and as long again, then KILL.
# Exit code: 1 if any process has 1, else that of a crash, else 42 if any has it, else 0.
set -euo pipefail
unset CDPATH
here=$(dirname "$0")
# shellcheck source=launch/contract.sh
. "$here/contract.sh"
devices=1
case ${1:-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
  [1-9] | [1-9][0-9]) processes=$1; shift ;;
  *)
    echo "error: ${1:+$(one_line "$1"): }give the number of processes, 1 to 99" >&2
    exit 1
    ;;
esac
case ${1:-} in
  --devices=[1-9] | --devices=[1-9][0-9]) devices=${1#--devices=}; shift ;;
  --devices*)
    echo "error: $(one_line "$1"): write --devices=M, M from 1 to 99" >&2
    exit 1
    ;;
esac
as_program "$@"
set -- ${words[@]+"${words[@]}"}
require_program "${1:-}"
require_grace
if ! joins "$1"; then
  echo "error: $1 runs on one host, for itself: bash launch/worker.sh $1 …" >&2
  exit 1
fi
# shellcheck source=launch/environment.sh
. "$here/environment.sh"
records=$(mktemp -d)
trap 'rm -rf "$records"' EXIT
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices

port=$((20000 + RANDOM % 10000))
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done

number() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

process() {
  local code=0
  # The number of `sh` is that of the program after `exec`; its $0 is the record.
  # shellcheck disable=SC2016
  sh -c 'echo $$ > "$0" && exec "$@"' "$records/pid-$1" "$PYTHON" -m "jaxrobust.$2" \
    "${@:3}" --coordinator="127.0.0.1:$port" --num_processes="$processes" \
    --process_id="$1" 2>&1 | number "$1" || code=${PIPESTATUS[0]}
  echo "$code" > "$records/exit-$1"
}

# To all processes, those too that are about to begin.
signal() {
  local i pid
  for ((i = 0; i < processes; i++)); do
    while [ ! -s "$records/pid-$i" ] && kill -0 "${jobs[i]}" 2> /dev/null; do
      sleep 0.1
    done
    pid=$(cat "$records/pid-$i" 2> /dev/null) || continue
    # A sweep passes on other signals to the run that it waits for.
    # shellcheck disable=SC2046
    kill "-$1" "$pid" $([ "$1" != KILL ] || pgrep -P "$pid") 2> /dev/null || true
  done
}

# Whether a process has ended with another code than 0.
failed() {
  local record code
  for record in "$records"/exit-*; do
    if [ -s "$record" ] && read -r code < "$record" && [ "$code" != 0 ]; then return; fi
  done
  return 1
}

deadline='' asked=''
trap 'asked=TERM' TERM
trap 'asked=INT' INT
# A Ctrl-C reaches what this script waits for, too. Bash ends if that dies of it, and
# forgets it if not: so nothing runs in the foreground, and no error ends the script.
set +e
# Each process in a group of its own, so that a Ctrl-C reaches it once, from here.
set -m
jobs=()
for ((i = 0; i < processes; i++)); do
  process "$i" "$@" &
  jobs+=($!)
done
set +m
for job in "${jobs[@]}"; do
  while kill -0 "$job" 2> /dev/null; do
    if [ -n "$asked" ]; then
      signal "$asked"
      deadline=$((SECONDS + grace)) next=KILL asked=''
    fi
    if [ -z "$deadline" ] && failed; then
      deadline=$((SECONDS + grace)) next=TERM
    fi
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
      echo "processes that are left get $next" >&2
      signal "$next"
      deadline=$((SECONDS + grace)) next=KILL
    fi
    sleep 0.1 &
    wait "$!"
  done
done
# A process without a record was killed together with its shell.
for ((i = 0; i < processes; i++)); do
  [ -f "$records/exit-$i" ] || echo 137 > "$records/exit-$i"
done
# shellcheck disable=SC2046
exit "$(worst $(cat "$records"/exit-*))"
