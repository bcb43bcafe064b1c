#!/usr/bin/env bash
# Installs everything, then runs the checks and the tests.  launchers/test.sh [pytest arguments]
# PST_TEST_PROCESSES=N runs N test files at a time, which is faster; by default one after another.
set -euo pipefail
cd "$(dirname "$0")/.."
launchers/setup.sh dev
bin=${PST_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
exec "$bin/pytest" -n "${PST_TEST_PROCESSES:-0}" --dist loadfile "$@"
