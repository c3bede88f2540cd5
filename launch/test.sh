#!/usr/bin/env bash
# Makes the environment and passes the tests; arguments go to pytest.
#
#   bash launch/test.sh [-k NAME] [-m 'not slow'] …
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "$0")/environment.sh"
exec "$PYTHON" -m pytest "$@"
