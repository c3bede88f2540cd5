#!/usr/bin/env bash
# Runs programs on Cloud TPUs, on one host or a pod, through gcloud's queued resources.
#
#   bash launch/tpu.sh create   NAME --type=TYPE [--spot]
#   bash launch/tpu.sh setup    NAME [--data=gs://…]
#   bash launch/tpu.sh run      NAME PROGRAM [--flag=value …]
#   bash launch/tpu.sh status|logs|stop|delete NAME
#   bash launch/tpu.sh babysit  NAME --type=TYPE [--spot] [--data=gs://…] PROGRAM …
#   bash launch/tpu.sh jobset   NAME --type=TYPE --topology=AxB[xC] --image=IMAGE
#                               [--spot] [--data=gs://…] PROGRAM …
#   bash launch/tpu.sh skypilot NAME --type=TYPE [--spot] [--data=gs://…] PROGRAM …
#
# TYPE is v2-8 … v4-32, v5litepod-16, v5p-8, v6e-16 …. Every verb takes --zone= and
# --project= (gcloud's own defaults otherwise) and --dry-run, which only prints the
# commands. Flags of this script stand before PROGRAM, its own flags after it; it may be
# written `python -m jaxrobust.PROGRAM`, as sweeps print it.
#
# setup sends the committed code to every worker, makes the environment there and copies
# --data into its folder data/. It may be repeated. run starts worker.sh on all workers
# and returns; logs follows those of worker 0 (--worker=all: of all). Give a workdir in a
# bucket, gs://…: the workers share it, and disks end with their machine.
#
# babysit creates, sets up, runs and watches, until the program is done (exit code 0) or
# ends with an error (1). What is preempted, failed or crashed it makes anew and resumes;
# after --attempts=N (100) in a row it gives up. Code 42, or 40 looks in a row at which
# all workers run (20 minutes), give all attempts back; a gcloud that does not answer
# costs none once it has. Workers that do not answer for half an hour, while gcloud calls them ready,
# count as failed. runs/launch/NAME.log keeps the last lines of the logs. It may be
# stopped and started again: the same command takes over. Delete the TPU afterwards: what
# is done, or ended with an error, stays there and costs.
#
# jobset prints a GKE JobSet (| kubectl apply -f -), skypilot a SkyPilot task
# (sky jobs launch FILE); both restart by the same exit codes.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/contract.sh
. launch/contract.sh
# shellcheck source=launch/manifests.sh
. launch/manifests.sh

fail() {
  echo "error: $*" >&2
  exit 1
}

verb=${1:-}
case $verb in
  create | setup | run | status | logs | stop | delete | babysit | jobset | skypilot) ;;
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/tpu.sh; exit ;;
  *) fail "${verb:-no argument}: give create, setup, run, status, logs, stop, delete," \
    'babysit, jobset or skypilot (--help explains them)' ;;
esac
name=${2:-}
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "${name:-nothing}: give a name of small letters, digits and hyphens after $verb"
shift 2
type='' spot='' dry='' data='' worker='' topology='' image='' attempts=100 zone=''
where=(--quiet)
while [ $# -gt 0 ]; do
  case $1 in
    --type=*) type=${1#*=} ;;
    --zone=*) zone=${1#*=} where+=("$1") ;;
    --project=*) where+=("$1") ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --data=gs://*) data=${1#*=} data=${data%/} ;;
    --data=*) fail "$1: give a folder in a bucket, gs://…" ;;
    --type | --zone | --project | --data | --worker | --topology | --image | --attempts)
      fail "$1: write $1=VALUE, with an equals sign"
      ;;
    --worker=*) worker=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --attempts=*)
      attempts=${1#*=}
      [[ $attempts =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1: give a number from 1 to 999999"
      ;;
    -*) fail "$1 is not a flag of $verb: --help shows them" ;;
    *) break ;;
  esac
  shift
done
if [ "${1:-} ${2:-}" = 'python -m' ]; then
  shift 2
  set -- "${1#jaxrobust.}" "${@:2}"
fi
case $verb in
  create | babysit | jobset | skypilot)
    case $type in
      v2-[0-9]* | v3-[0-9]* | v4-[0-9]*) runtime=tpu-ubuntu2204-base ;;
      v5litepod-[0-9]*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-[0-9]*) runtime=v2-alpha-tpuv5 ;;
      v6e-[0-9]*) runtime=v2-alpha-tpuv6e ;;
      *) fail "--type=$type: give an accelerator type such as v3-8, v4-32, v5litepod-16," \
        'v5p-8 or v6e-16' ;;
    esac
    ;;
esac
case $verb in
  run | babysit | jobset | skypilot)
    [ $# -gt 0 ] || fail "$verb needs a program with its flags, such as train --workdir=…"
    require_program "$1"
    for argument; do
      case $argument in
        --dry-run) fail "--dry-run: give it before $1, whose own flags stand after it" ;;
        --workdir=gs://*) ;;
        --workdir=*)
          echo "$argument is in no bucket: all workers must share it, and it is lost" \
            'with their disks' >&2
          ;;
      esac
    done
    ;;
  *) [ $# = 0 ] || fail "$1: $verb takes no program" ;;
esac

case $verb in
  jobset | skypilot) ;;
  *)
    [ -n "$dry" ] || command -v gcloud > /dev/null ||
      fail 'gcloud is not on the PATH: install the Google Cloud CLI, or use --dry-run'
    ;;
esac

show() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  echo >&2
}

call() {
  show "$@"
  [ -n "$dry" ] || "$@"
}

on_workers() {
  call gcloud compute tpus tpu-vm ssh "$name" --worker="${worker:-all}" \
    --command="$1" "${where[@]}"
}

create() {
  call gcloud compute tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot} "${where[@]}"
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" --force "${where[@]}"
}

# Packed once, so that babysit resumes with the code that it began with.
archive=''
setup() {
  if [ -z "$archive" ]; then
    archive=$(mktemp -d)/jaxrobust.tar.gz || fail 'no folder for the archive, see above'
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    git diff --quiet HEAD || echo 'uncommitted changes are not sent' >&2
    call git archive --format=tar.gz --output="$archive" HEAD ||
      fail 'git archive failed: the code is sent from a clone with a commit'
  fi
  # Processes compare their packages, so that what is no longer in one must go.
  call gcloud compute tpus tpu-vm scp "$archive" "$name:" --worker=all "${where[@]}" &&
    on_workers "mkdir -p jaxrobust && rm -rf jaxrobust/jaxrobust && \
tar -xzf jaxrobust.tar.gz -C jaxrobust && \
bash jaxrobust/launch/worker.sh --setup${data:+ && gcloud storage rsync --recursive \
$data jaxrobust/data}"
}

start() { on_workers "bash jaxrobust/launch/worker.sh --start$(printf ' %q' "$@")"; }

# One field of what gcloud describes: ABSENT if it is not there, UNKNOWN if gcloud fails.
described() {
  local errors
  show gcloud compute tpus "$@"
  # Apart from its warnings, which it may print with success.
  if { errors=$(gcloud compute tpus "$@" 2>&1 >&3); } 3>&1; then
    return
  elif [[ $errors == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$errors" >&2
    if refused "$errors"; then echo REFUSED; else echo UNKNOWN; fi
  fi
}

# State of the resource or, once that is active, of its machines; UNKNOWN if it is none.
state() {
  local found
  found=$(described queued-resources describe "$name" --format='value(state.state)' \
    "${where[@]}")
  if [ "$found" = ACTIVE ]; then
    found=$(described tpu-vm describe "$name" --format='value(state)' "${where[@]}")
    if [ "$found" = ABSENT ]; then found=TERMINATED; fi
  fi
  case $found in
    ABSENT | UNKNOWN | REFUSED | FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED | READY | \
      ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | STARTING | \
      RESTARTING | REIMAGING | REPAIRING | SUSPENDING | STOPPING | DELETING) ;;
    *)
      echo "gcloud says '$found', which is no state" >&2
      found=UNKNOWN
      ;;
  esac
  echo "$found"
}

status() { on_workers 'bash jaxrobust/launch/worker.sh --status'; }

# How many workers there are, 1 if gcloud does not say.
count_hosts() {
  local found
  found=$(described tpu-vm describe "$name" --format='value(networkEndpoints.len())' \
    "${where[@]}")
  if [[ $found =~ ^[1-9][0-9]*$ ]]; then echo "$found"; else echo 1; fi
}

# What to wait for would not help against: flags, names, rights.
refused() {
  [[ $1 =~ PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|required\ property ]]
}

# $JAXROBUST_WAIT is the time between two looks, in seconds, and the first back-off.
look=${JAXROBUST_WAIT:-30}
delay=$look
left=$attempts
pause() {
  echo "$1: again in $delay s" >&2
  sleep "$delay"
  delay=$((delay < 16 * look ? 2 * delay : delay))
}

again() {
  left=$((left - 1))
  [ "$left" -gt 0 ] || fail "$1, and no attempt is left$(
    [ ! -f "$record" ] || echo "; $record has the last lines"
  )"
  pause "$1, $left attempts left"
}

babysit() {
  local now codes said hosts answered='' started='' silent=0 ragged=0 steady=0
  record=runs/launch/$name.log
  mkdir -p runs/launch
  while :; do
    now=$(state)
    echo "$name: $now" >&2
    if [ "$now" = REFUSED ] && [ -z "$answered" ]; then
      fail 'gcloud refuses, see above: correct the flags, or log in'
    fi
    if [ "$now" = UNKNOWN ] || [ "$now" = REFUSED ]; then
      silent=0
      # Where gcloud has answered before, the connection is gone, and will be back.
      if [ -n "$answered" ]; then pause 'gcloud failed'; else again 'gcloud failed'; fi
      continue
    fi
    answered=1
    case $now in
      READY) ;;
      ABSENT)
        started=''
        if ! said=$(create 2>&1); then
          echo "$said" >&2
          if refused "$said"; then fail 'gcloud refuses, see above'; fi
          again 'create failed'
        else
          echo "$said" >&2
        fi
        continue
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
        started=''
        delete || true
        again "$now"
        continue
        ;;
      *) sleep "$look"; continue ;;
    esac
    if [ -z "$started" ]; then
      # The same command resumes, so what may still run from before is started again.
      if setup && start "$@"; then
        started=1 silent=0 ragged=0 steady=0 hosts=$(count_hosts)
      else
        again 'the start failed'
        continue
      fi
    fi
    sleep "$look"
    # ssh's 255, like any failure of gcloud itself, says nothing of the program; nor do
    # some of the workers without the others.
    if ! status > "$record.tmp" ||
      [ "$(grep -c '^== ' "$record.tmp")" -lt "$hosts" ]; then
      silent=$((silent + 1))
      if [ "$silent" -ge 60 ]; then
        started=''
        delete || true
        again 'the workers do not answer'
      fi
      continue
    fi
    silent=0
    mv "$record.tmp" "$record"
    codes=$(sed -n 's/^== .*: exit //p; s/^== .*: stopped$/137/p' "$record")
    # shellcheck disable=SC2086
    codes=$(worst $codes)
    if [ "$codes" != 1 ] && grep -q '^== .*: running$' "$record"; then
      # Where some have ended, the others should soon, by agreement or by time-out.
      if grep -qE '^== .*: (exit|stopped)' "$record"; then
        ragged=$((ragged + 1)) steady=0
      else
        ragged=0 steady=$((steady + 1))
      fi
      if [ "$steady" -ge 40 ]; then left=$attempts delay=$look; fi
      if [ "$ragged" -lt 10 ]; then continue; fi
      if [ "$codes" = 0 ]; then codes=137; fi
    fi
    case $codes in
      0)
        echo "$name: done; it costs until bash launch/tpu.sh delete $name" >&2
        return
        ;;
      1)
        cat "$record" >&2
        on_workers 'bash jaxrobust/launch/worker.sh --stop' || true
        fail "the program ended with an error: $record has the last lines"
        ;;
      42)
        started='' left=$attempts delay=$look
        pause 'exit code 42'
        continue
        ;;
    esac
    started=''
    again "exit code $codes"
  done
}

case $verb in
  run) start "$@" ;;
  stop) on_workers 'bash jaxrobust/launch/worker.sh --stop' ;;
  logs) worker=${worker:-0} && on_workers 'tail -n 100 -F .jaxrobust/log' ;;
  status)
    call gcloud compute tpus queued-resources describe "$name" \
      --format='value(state.state)' "${where[@]}"
    status
    ;;
  babysit)
    if [ -n "$dry" ]; then
      create
      setup
      start "$@"
      status
    else
      babysit "$@"
    fi
    ;;
  *) "$verb" "$@" ;;
esac
