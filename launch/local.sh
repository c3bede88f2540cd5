#!/usr/bin/env bash
# The paper's claim on a laptop: trains a robust classifier of digits on real images
# and one on real and generated images, judges both, prints a table, draws a figure.
#
#   bash launch/local.sh [FOLDER] [--full] [--seeds=N]
#
# FOLDER is runs/quickstart if not given. --full adds a diffusion generator and the
# classifier trained with its samples. Each of N seeds (1) trains all classifiers; the
# table has means over them. Run again it goes on where it was interrupted, or shows the
# result at once.
set -euo pipefail
folder=runs/quickstart
seeds=1
generators=(gaussian)
for argument; do
  case $argument in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit ;;
    --full) generators=(gaussian ddpm) ;;
    --seeds=[1-9] | --seeds=[1-9][0-9]) seeds=${argument#--seeds=} ;;
    -*)
      echo "error: $argument: give a folder, --full, --seeds=1 to 99, or nothing" >&2
      exit 1
      ;;
    *) folder=$argument ;;
  esac
done
case $folder in /* | runs/quickstart) ;; *) folder=$PWD/$folder ;; esac
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh"

program() { "$PYTHON" -m "jaxrobust.$1" --workdir="$folder/$2" "${@:3}"; }

# A classifier of one seed, on real images or on real and generated ones.
classifier() {
  local name=real-$1 flags=(--config.seed="$1")
  if [ -n "${2:-}" ]; then
    name=real+$2-$1
    flags+=(--config.data.samples="$folder/$2/samples")
  fi
  program train "$name" --config=experiments/digits.py "${flags[@]}"
  program evaluate "$name"
}

program train labeller --config=experiments/digits.py:labeller
for generator in "${generators[@]}"; do
  program generate "$generator" --config="experiments/digits_$generator.py" \
    --config.labeller="$folder/labeller"
done
for ((seed = 0; seed < seeds; seed++)); do
  classifier $seed
  for generator in "${generators[@]}"; do classifier $seed "$generator"; done
done
"$PYTHON" -m jaxrobust.report --workdir="$folder"
