#!/usr/bin/env bash
# Runs fast tests on the oldest versions that pyproject.toml allows.  launchers/test_oldest.sh [pytest arguments]
# Run launchers/setup.sh dev first: .venv-oldest contains only the packages of launchers/constraints-oldest.txt, which
# come first on its path, and takes all others from .venv, including torch: PyPI has no older CPU builds of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${PST_VENV:-.venv}
venv=$base-oldest
pins=launchers/constraints-oldest.txt

stamp=$(cksum <"$pins")
if [ "$(cat "$venv/setup-stamp" 2>/dev/null)" != "$stamp" ]; then
  # Anew: pip would leave the records of the packages that it writes over.
  "$base/bin/python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --no-deps --ignore-installed -r "$pins"
  echo "$stamp" >"$venv/setup-stamp"
fi
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$(cd "$base" && bin/python -c "$purelib")')" >"$("$venv/bin/python" -c "$purelib")/rest.pth"
"$venv/bin/python" launchers/installed.py oldest train,embed,encoder,data,ray,report,s3
# The tests of the code that depends most on other libraries.
tests=(
  tests/config tests/data tests/embedding tests/storage tests/student
  tests/evaluation/test_evaluate.py tests/publish/test_export.py tests/publish/test_export_families.py tests/publish/test_pages.py
  tests/training/test_batches.py tests/training/test_checkpoint.py tests/training/test_loss.py
  tests/training/test_module.py tests/training/test_trainer.py
)
[ $# -eq 0 ] || tests=("$@")
# The golden losses hold for constraints.txt: with other releases of transformers, a fresh student's losses differ from step 1.
"$venv/bin/python" -m pytest -q -n "${PST_TEST_PROCESSES:-2}" --dist loadfile -m "not slow and not data" -k "not golden and not attention_of_a_fresh_student" "${tests[@]}"
