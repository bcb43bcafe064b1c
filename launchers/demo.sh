#!/usr/bin/env bash
# Installs pst_dist and runs the demo, which compares four ways to distil the same rows: launchers/demo.sh [key.sub=value …]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/setup.sh" all
exec "${PST_VENV:-$here/../.venv}/bin/pst" demo "$@"
