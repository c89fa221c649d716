#!/usr/bin/env bash
# Sets up LocalDiT in .venv and generates images with the model in the box, or runs the tests.
#
#   ./quickstart.sh         set up, then generate images
#   ./quickstart.sh test    set up, then run the tests
#
# You can run it again at any time: it keeps what is already installed.
# PYTHON names the Python interpreter (default: python3), TORCH the PyTorch requirement.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'quickstart.sh: %s\n' "$*" >&2; exit 1; }

# On Linux the default build of PyTorch installs gigabytes of CUDA libraries. Without an NVIDIA card,
# use the CPU build, if its index can be reached.
torch_options() {
  [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null || return 0
  .venv/bin/python - "$CPU_INDEX/torch/" <<'PY' >/dev/null 2>&1 || return 0
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5)
PY
  echo "--index-url $CPU_INDEX"
}

set_up() { # set_up REQUIREMENT: create the virtual environment, install PyTorch and this package
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "$PYTHON is not Python 3.10 or newer; name one with PYTHON=/path/to/python ./quickstart.sh"
  if [ ! -x .venv/bin/python ]; then
    say "Creating a virtual environment in .venv"
    "$PYTHON" -m venv .venv
  fi
  if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    say "Installing PyTorch ($TORCH)"
    # shellcheck disable=SC2046
    .venv/bin/python -m pip install --quiet $(torch_options) "$TORCH"
  fi
  say "Installing LocalDiT ($1)"
  .venv/bin/python -m pip install --quiet --editable "$1"
}

case "${1:-}" in
  "")
    set_up .
    say "Generating images with the model in the box"
    .venv/bin/python infer_t2i.py --model box --grid
    say "Done: the images are in $PWD/output"
    ;;
  test)
    set_up ".[dev]"
    say "Running the tests"
    .venv/bin/python -m pytest
    say "Done: the tests pass"
    ;;
  *)
    fail "unknown argument '$1'; usage: ./quickstart.sh [test]"
    ;;
esac
