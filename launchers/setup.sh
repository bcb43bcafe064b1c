#!/usr/bin/env bash
# Makes .venv with pst_dist in it:  launchers/setup.sh [extras]   (default: all)
# A machine with an NVIDIA GPU gets PyPI's CUDA build of torch; any other gets the CPU build, a tenth of the size.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-all}
venv=${PST_VENV:-.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: Python 3.10 or newer is needed" >&2; exit 4; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

limits=()
if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "setup: keeping the torch that is installed"
elif nvidia-smi -L >/dev/null 2>&1 || [ "$(uname -sm)" != "Linux x86_64" ]; then
  "$venv/bin/python" -m pip install --quiet "torch>=2.6"
else
  # Only a version that ends in +cpu can never resolve to the CUDA wheels. Some package indexes carry it, else
  # PyTorch's own index of CPU builds does.
  limits=(-c launchers/torch-cpu.txt)
  "$venv/bin/python" -m pip install --quiet "${limits[@]}" torch 2>/dev/null ||
    "$venv/bin/python" -m pip install --quiet "${limits[@]}" torch --extra-index-url https://download.pytorch.org/whl/cpu
fi
"$venv/bin/python" -m pip install --quiet ${limits[@]+"${limits[@]}"} -e ".[$extras]"
echo "setup: ready in $venv"
