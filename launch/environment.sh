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

# Shows how far pip is, once in 15 seconds, for none of its many lines is worth reading.
progress() {
  local line code passed what='looking for the packages' next=$((SECONDS + 15))
  local began=$SECONDS
  while :; do
    code=0
    IFS= read -r -t 5 line || code=$?
    if [ $code = 1 ]; then break; fi  # 128 and more is silence.
    case $line in
      'Collecting '*) line=${line#Collecting } what=${line%% *} ;;
      'Installing collected '*) what='writing the packages to the disk' ;;
    esac
    if [ $SECONDS -ge $next ]; then
      next=$((SECONDS + 15)) passed=$((SECONDS - began))
      printf 'installing, %d:%02d so far: %s\n' $((passed / 60)) $((passed % 60)) "$what"
    fi
  done
}

# One that was never finished, or whose Python is gone, is made anew: `python -m venv`
# would leave the old links to another Python. What is in its cache stays.
make_environment() {
  local base
  if [ -f "$venv/.installed" ] && "$PYTHON" -c 'import ssl, pip' 2> /dev/null; then
    echo "bringing the environment in $venv up to date (a few minutes)"
  else
    base=$(find_python) || exit 1
    echo "making the environment in $venv (a few minutes, once)"
    if [ -f "$venv/pyvenv.cfg" ]; then
      rm -rf "${venv:?}"/{bin,include,lib,lib64,share,pyvenv.cfg,.installed,.package}
    fi
    if ! "$base" -m venv "$venv"; then
      echo "error: $base cannot make an environment in $venv: install its venv module" \
        '(Debian: apt-get install python3-venv), or set JAXROBUST_VENV' >&2
      exit 1
    fi
  fi
  if ! PYTHONUNBUFFERED=1 "$PYTHON" -m pip install --disable-pip-version-check \
    --progress-bar off -r "$root/requirements.txt" ${on_tpu:+'jax[tpu]'} | progress; then
    echo "error: the installation by $("$PYTHON" --version) failed, see above: run this" \
      "again if the disk or the network was the reason; else remove $venv, put" \
      'another Python 3.11, 3.12 or 3.13 first on the PATH, and run this again' >&2
    exit 1
  fi
  echo "$wanted" > "$venv/.installed"
}

# The stamp holds the checksum of what was installed, so that an interrupted or an
# outdated installation is done again.
wanted="$(cksum < "$root/requirements.txt")${on_tpu:+ tpu}"
# The command `jaxrobust` in the environment runs this clone.
package="$root $(cat "$root/setup.py" "$root/pyproject.toml" | cksum)"
stamp_is() { [ -x "$PYTHON" ] && [ "$(cat "$venv/$1" 2> /dev/null)" = "$2" ]; }
if ! stamp_is .installed "$wanted" || ! stamp_is .package "$package"; then
  # Two scripts at once would install into each other's environment.
  if ! { mkdir -p "$venv" && exec 9> "$venv/.lock"; }; then
    echo "error: $venv cannot be written: set JAXROBUST_VENV to another folder" >&2
    exit 1
  fi
  if command -v flock > /dev/null && ! flock --nonblock 9; then
    echo "another script installs into $venv: waiting for it"
    flock 9 || true
  fi
  if ! stamp_is .installed "$wanted"; then make_environment; fi
  if ! stamp_is .package "$package"; then
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
      --editable "$root"; then
      echo 'error: the package could not be installed, see above; run this again' >&2
      exit 1
    fi
    echo "$package" > "$venv/.package"
  fi
  exec 9>&-
fi
cd "$root" || exit 1
# What is compiled or fetched is kept with the environment.
export JAXROBUST_CACHE=${JAXROBUST_CACHE:-$venv/cache}
