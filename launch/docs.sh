#!/usr/bin/env bash
# Makes the environment and builds the documentation from docs/ into docs/build; a
# warning is an error. Arguments go to Sphinx (-E reads every page anew).
#
#   bash launch/docs.sh [-E] …
set -euo pipefail
unset CDPATH
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh"
# Pages of the package import it; no page computes anything.
export JAX_PLATFORMS=cpu
"$PYTHON" -m sphinx --builder html --quiet --fail-on-warning --keep-going "$@" \
  docs docs/build
echo 'the first page: docs/build/index.html'
