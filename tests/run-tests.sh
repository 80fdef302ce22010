#!/bin/sh
# The tests, in an environment of their own (.venv-test). Arguments go to pytest.
# Two processes, each with one thread, where pytest-xdist could be installed.
. "$(dirname "$0")/../examples/environment.sh"
prepare test test
two=$("$python" -c 'import xdist; print("-n 2 --dist loadfile")' 2>/dev/null)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$root" && exec "$python" -m pytest $two "$@"
