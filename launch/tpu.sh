#!/usr/bin/env bash
# Runs programs on Cloud TPUs, on one host or a pod, and prints manifests of the same for
# GKE and SkyPilot: bash launch/tpu.sh --help. launch/tpu.py does it, for which Python 3.8
# is enough, without the environment.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2> /dev/null || {
  echo 'error: python3 on the PATH is not Python 3.8 or newer: install one' >&2
  exit 1
}
exec python3 -m launch.tpu "$@"
