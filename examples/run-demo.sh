#!/bin/sh
# The demo, in an environment of its own (.venv-demo). Arguments go to examples/demo.py.
. "$(dirname "$0")/environment.sh"
prepare demo demo
exec "$python" "$root/examples/demo.py" "$@"
