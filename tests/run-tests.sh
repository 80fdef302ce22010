#!/bin/sh
# The tests, in an environment of their own (.venv-test). Arguments go to pytest.
. "$(dirname "$0")/../examples/environment.sh"
prepare test test
cd "$root" && exec "$python" -m pytest "$@"
