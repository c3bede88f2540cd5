#!/usr/bin/env bash
# The paper's claim on a laptop: trains a robust classifier of digits on real images
# and one on real and generated images, judges both, prints a table, draws a figure.
#
#   bash launch/local.sh [FOLDER]        FOLDER is runs/quickstart if not given
#
# Run again it goes on where it was interrupted, or shows the result at once.
set -euo pipefail
folder=${1:-runs/quickstart}
case $folder in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;;
  -*) echo "error: $folder is not an option: give a folder, or nothing" >&2; exit 1 ;;
esac
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh"

program() { "$PYTHON" -m "jaxrobust.$1" --workdir="$folder/$2" "${@:3}"; }

program train labeller --config=experiments/digits.py:labeller
program generate gaussian --config=experiments/digits_gaussian.py \
  --config.labeller="$folder/labeller"
program train real --config=experiments/digits.py
program train real+gaussian --config=experiments/digits.py \
  --config.data.samples="$folder/gaussian/samples"
for run in real real+gaussian; do
  program evaluate "$run"
done
"$PYTHON" -m jaxrobust.report --workdir="$folder"
