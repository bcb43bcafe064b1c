#!/usr/bin/env bash
# Installs everything, then runs the checks and the tests.  launchers/test.sh [pytest arguments]
# Two test files run at a time; PST_TEST_PROCESSES=0 runs one after another, which shows the output as it comes.
set -euo pipefail
cd "$(dirname "$0")/.."
launchers/setup.sh dev
bin=${PST_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
# The tests start hundreds of processes. Where PYTHONDONTWRITEBYTECODE is set, each would compile the package anew.
"$bin/python" -m compileall -q pst_dist
exec "$bin/pytest" -n "${PST_TEST_PROCESSES:-2}" --dist loadfile "$@"
