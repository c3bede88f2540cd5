# shellcheck shell=bash
# Sourced by the other scripts: makes the environment once and sets $PYTHON.
# It is .venv in the repository, or $JAXROBUST_VENV; with $on_tpu it can use a TPU.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JAXROBUST_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
PYTHON=$venv/bin/python

find_python() {
  local name
  # Tensorflow is not built for 3.14 yet.
  for name in python3 python3.11 python3.12 python3.13 python; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo 'error: no Python 3.11, 3.12 or 3.13 on the PATH: install one, then run this' \
    'again' >&2
  exit 1
}

# The stamp holds the checksum of what was installed, so that an interrupted or an
# outdated installation is done again.
wanted="$(cksum < "$root/requirements.txt")${on_tpu:+ tpu}"
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
  base=$(find_python) || exit 1
  echo "making the environment in $venv (a few minutes, once)"
  if ! "$base" -m venv "$venv"; then
    echo "error: $base cannot make an environment in $venv: install its venv module" \
      '(Debian: apt-get install python3-venv), or set JAXROBUST_VENV' >&2
    exit 1
  fi
  if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check \
    -r "$root/requirements.txt" ${on_tpu:+'jax[tpu]'}; then
    echo 'error: the installation failed, see above; run this again to repeat it' >&2
    exit 1
  fi
  echo "$wanted" > "$venv/.installed"
fi
# The command `jaxrobust` in the environment runs this clone.
package="$root $(cat "$root/setup.py" "$root/pyproject.toml" | cksum)"
if [ "$(cat "$venv/.package" 2>/dev/null)" != "$package" ]; then
  if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
    --editable "$root"; then
    echo 'error: the package could not be installed, see above; run this again' >&2
    exit 1
  fi
  echo "$package" > "$venv/.package"
fi
cd "$root" || exit 1
# What is compiled or fetched is kept with the environment.
export JAXROBUST_CACHE=${JAXROBUST_CACHE:-$venv/cache}
