# Sourced by run-demo.sh and tests/run-tests.sh:  prepare NAME EXTRA  makes .venv-NAME with this checkout and its extra
# installed, and sets $python. A second call finds it made, until pyproject.toml or constraints.txt change.
# Where the machine's own torch sees a CUDA device, that torch is used and not another one downloaded.

root=$(cd "$(dirname "$0")/.." && pwd)

prepare() {
    venv="$root/.venv-$1"
    python="$venv/bin/python"
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ "$(cat "$venv/installed" 2>/dev/null)" = "$wanted" ] && "$python" -c 'import torch, moe_compile' 2>/dev/null; then
        return
    fi
    base=$(find_python) || exit 1
    echo "Setting up $venv with $base (once; PyTorch is a large download)"
    rm -rf "$venv"
    "$base" -m venv "$venv" || {
        echo "Python's venv module does not work here; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    if "$base" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        install_beside_own_torch "$2" || exit 1
    else
        "$python" -m pip install --quiet -c "$root/constraints.txt" -e "$root[$2]" || exit 1
    fi
    echo "$wanted" >"$venv/installed"
}

find_python() {
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "Python 3.10 or newer is needed and was not found as python3" >&2
    return 1
}

# $base may itself be a virtual environment, so its packages are named here instead of by --system-site-packages.
install_beside_own_torch() {
    "$base" - >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own-torch.pth" <<'PYTHON'
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
PYTHON
    # An old setuptools that came with this environment would hide the machine's own.
    "$python" -m pip uninstall --quiet --yes setuptools 2>/dev/null
    "$python" -m pip install --quiet --retries 1 --no-build-isolation -e "$root[$1]" || {
        echo "Not all of the extra '$1' could be installed; going on with what this machine has"
        "$python" -m pip install --quiet --no-build-isolation --no-deps -e "$root"
    }
}
