#!/usr/bin/env bash
# The paper's claim on a laptop: trains a robust classifier of digits on real images
# and one on real and generated images, judges both, prints a table, draws a figure.
#
#   bash launch/local.sh [FOLDER] [--seeds=N]
#
# FOLDER is runs/quickstart if not given. Each of N seeds (1) trains both classifiers;
# the table has means over them. Run again it goes on where it was interrupted, or
# shows the result at once.
set -euo pipefail
folder=runs/quickstart
seeds=1
for argument; do
  case $argument in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    --seeds=[1-9] | --seeds=[1-9][0-9]) seeds=${argument#--seeds=} ;;
    -*) echo "error: $argument: give a folder, --seeds=1 to 99, or nothing" >&2; exit 1 ;;
    *) folder=$argument ;;
  esac
done
case $folder in /* | runs/quickstart) ;; *) folder=$PWD/$folder ;; esac
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh"

program() { "$PYTHON" -m "jaxrobust.$1" --workdir="$folder/$2" "${@:3}"; }

program train labeller --config=experiments/digits.py:labeller
program generate gaussian --config=experiments/digits_gaussian.py \
  --config.labeller="$folder/labeller"
for ((seed = 0; seed < seeds; seed++)); do
  program train "real-$seed" --config=experiments/digits.py --config.seed=$seed
  program train "real+gaussian-$seed" --config=experiments/digits.py \
    --config.seed=$seed --config.data.samples="$folder/gaussian/samples"
  for data in real real+gaussian; do
    program evaluate "$data-$seed"
  done
done
"$PYTHON" -m jaxrobust.report --workdir="$folder"
