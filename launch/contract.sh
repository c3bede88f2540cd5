# shellcheck shell=bash
# Sourced by the other scripts: what a program of several processes is.

# A word for a message; what a terminal would obey is escaped.
one_line() {
  case $1 in
    *[![:print:]]*) printf %q "$1" ;;
    *) printf %s "$1" ;;
  esac
}

# Sets `grace`, seconds. Bash would run a $( ) in what it reckons with.
require_grace() {
  grace=${JAXROBUST_GRACE:-120}
  if ! [[ $grace =~ ^[0-9]{1,6}$ ]]; then
    echo "error: JAXROBUST_GRACE=$(one_line "$grace"): give seconds, 0 to 999999" >&2
    exit 1
  fi
  grace=$((10#$grace))
}

require_program() {
  case $1 in
    train | evaluate | generate | analyze | report | convert | sweep | plan) ;;
    data | models.download) ;;
    *)
      echo "error: ${1:+$(one_line "$1") is no program: }give train, evaluate, generate," \
        'analyze, report, convert, sweep, plan, data or models.download' >&2
      exit 1
      ;;
  esac
}

# In $words: a program and its flags, without the `jaxrobust` or `python -m jaxrobust.`
# that sweeps and help print before them.
# shellcheck disable=SC2034
as_program() {
  local first=${3:-}
  case "${1:-} ${2:-}" in
    'jaxrobust download') words=(models.download "${@:3}") ;;
    'jaxrobust '*) words=("${@:2}") ;;
    'python -m') words=("${first#jaxrobust.}" "${@:4}") ;;
    *) words=("$@") ;;
  esac
}

# Whether it is one; the others prepare the host that they run on.
joins() {
  case $1 in data | models.download) return 1 ;; esac
}

# What their exit codes mean together:
# 0 done, 42 preempted after a checkpoint, 1 error that a restart would repeat, 128 and
# above crash; whatever else a shell may return is an error too.
worst() {
  local code crash='' preempted=''
  for code; do
    case $code in
      0) ;;
      42) preempted=42 ;;
      *)
        if [ "$code" -lt 128 ]; then
          echo 1
          return
        fi
        crash=${crash:-$code}
        ;;
    esac
  done
  echo "${crash:-${preempted:-0}}"
}
