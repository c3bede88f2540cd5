#!/usr/bin/env bash
# Makes the environment and passes the tests, a file to a process, in the order of their
# names: the longest files come too late in that of their counts. Arguments go to pytest.
#
#   bash launch/test.sh [-k NAME] [-m 'not slow'] [-n 0] …
set -euo pipefail
unset CDPATH
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$JAXROBUST_CACHE/compiled}
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder "$@"
