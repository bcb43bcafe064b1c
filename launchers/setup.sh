#!/usr/bin/env bash
# Creates .venv and installs pst_dist in it:  launchers/setup.sh [--latest] [extras]   (default: all)
# It installs the versions in launchers/constraints.txt, which CI ran, and replaces other installed versions.
# --latest (or PST_FRESH=1) installs the newest versions that pyproject.toml allows instead, but keeps an installed torch.
# A machine with an NVIDIA GPU gets PyPI's CUDA build of torch; any other gets the CPU build, a tenth of the size.
# PST_TORCH=cpu or PST_TORCH=cuda chooses the build by hand, for example for an image.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=${PST_FRESH:-}
[ "${1:-}" != --latest ] || { fresh=1; shift; }
extras=${1:-all}
venv=${PST_VENV:-.venv}
python=${PYTHON:-python3}
pins=launchers/constraints.txt

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: Python 3.10 or newer is required" >&2; exit 4; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet)
if [ -z "$fresh" ] && ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: $pins is for Python 3.11 and newer; installing the newest versions for this Python"
  fresh=1
fi

# The build of torch, as a second constraints file: pip installs versions that both files allow.
torch=$(sed -n 's/^torch==//p' "$pins")
installed=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
cpu_build=
case ${PST_TORCH:-} in
cpu | cuda) wanted=$PST_TORCH ;;
"") wanted=$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu) ;;
*) echo "setup: PST_TORCH=$PST_TORCH: must be cpu or cuda" >&2; exit 2 ;;
esac
if [ "$wanted" = cuda ]; then
  build="torch!=$torch+cpu"
elif [ "$(uname -sm)" != "Linux x86_64" ]; then
  build=
else
  # Only a version ending in +cpu never resolves to the CUDA wheels.
  cpu_build=1
  build="torch==$torch+cpu"
fi
[ -z "$fresh" ] || [ -z "$installed" ] || build="torch==$installed"
limits=("$venv/torch-build.txt")
echo "$build" >"${limits[0]}"
if [ -n "$fresh" ]; then
  pip+=(--upgrade --upgrade-strategy eager)
else
  limits+=("$pins")
fi
pip+=("${limits[@]/#/--constraint=}")

# The editable install stores a copy of pyproject.toml's requirements; the stamp identifies that copy.
stamp="$PWD $(cksum <pyproject.toml)"
if [ -z "$fresh" ] && [ "$(cat "$venv/setup-stamp" 2>/dev/null)" = "$stamp" ] &&
  "$venv/bin/python" launchers/installed.py check "$extras" "${limits[@]}" >/dev/null; then
  echo "setup: $venv is up to date"
  exit
fi
echo "setup: installing into $venv (PST_VENV names another place): up to 3 GB without CUDA, some minutes"
if [ -n "$cpu_build" ]; then
  # Some package indexes have the CPU build; otherwise use PyTorch's own index.
  "${pip[@]}" torch 2>/dev/null || "${pip[@]}" torch --extra-index-url https://download.pytorch.org/whl/cpu
fi
"${pip[@]}" -e ".[$extras]"
"$venv/bin/python" launchers/installed.py check "$extras" "${limits[@]}" >&2 ||
  { echo "setup: the packages above have wrong versions" >&2; exit 4; }
echo "$stamp" >"$venv/setup-stamp"
echo "setup: ready in $venv"
