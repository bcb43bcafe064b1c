#!/usr/bin/env bash
# Sets up and runs the demo: four ways of distilling the same rows, compared.  launchers/demo.sh [key.sub=value …]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/setup.sh" all
exec "${PST_VENV:-$here/../.venv}/bin/pst" demo "$@"
