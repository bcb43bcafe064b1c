"""The built wheel alone, in an environment of its own: it holds every file, and its `pst demo` needs no checkout.

Only the wheel is installed. Everything else comes from the environment of the tests, by a line in a .pth file, which
leaves out what that environment adds to its own path, such as an editable install of this checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from pst_dist.storage.manifest import read_json

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("hatchling")


def ran(*command: object, folder: Path, environment: dict[str, str] | None = None, seconds: float = 120) -> str:
    """Standard output of a command that must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built here without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    ran(sys.executable, *build, "--wheel-dir", folder, ROOT, folder=folder)
    (path,) = folder.glob("*.whl")
    return path


def files_below(folder: Path) -> set[str]:
    """Paths of the files below a folder of the checkout, relative to the folder's parent."""
    ignored = ("__pycache__",)
    return {
        str(path.relative_to(folder.parent))
        for path in folder.rglob("*")
        if path.is_file() and not set(ignored) & set(path.parts)
    }


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    expected = files_below(ROOT / "pst_dist")
    expected |= {f"pst_dist/{name}" for folder in ("ds_configs", "cluster") for name in files_below(ROOT / folder)}
    assert {"pst_dist/py.typed", "pst_dist/config/presets/demo.yaml", "pst_dist/ds_configs/zero2.json"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


@pytest.mark.slow
@pytest.mark.encoder
def test_the_demo_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    site = Path(ran(python, "-c", where, folder=tmp_path, environment=environment).strip())
    assert site.is_relative_to(tmp_path)
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "rest.pth").write_text("\n".join(others) + "\n")
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed")
    ran(sys.executable, *install, wheel, folder=tmp_path, environment=environment)

    found = ran(python, "-c", "import pst_dist; print(pst_dist.__file__)", folder=tmp_path, environment=environment)
    assert Path(found.strip()).is_relative_to(site), "the checkout is importable"
    settings = ("train.max_steps=4", "train.eval_steps=4", "train.num_threads=1", "train.deepspeed=null")
    rows = ("data.train=gen:last_letters?rows=24&seed=0&words=2", "data.test=gen:last_letters?rows=4&seed=0&words=2")
    small = ("data.validation_size=4", "evaluate.latency_rows=1", "evaluate.explain_rows=1")
    pst = site.parents[2] / "bin" / "pst"
    said = ran(pst, "demo", *settings, *rows, *small, folder=tmp_path, environment=environment, seconds=500)
    assert "ask it: pst answer" in said
    (run,) = tmp_path.glob("**/pst/train.json")
    assert read_json(run)["steps"] == 4 and (run.parent / "export" / "config.json").is_file()
    # Files that a wheel carries beside the code: a DeepSpeed JSON, and the script of a Slurm job.
    shown = ran(
        python, "-c", "from pst_dist.training.engines.deepspeed_config import deepspeed_settings as s; "
        "from pst_dist.config.schema import TrainConfig as T; print(s(T(deepspeed='zero2'), 1)['zero_optimization'])",
        folder=tmp_path, environment=environment,
    )  # fmt: skip
    assert "'stage': 2" in shown
