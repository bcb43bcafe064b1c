"""What launchers/setup.sh relies on: a pin for every package, and a comparison that finds other versions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launchers" / "installed.py"
PINS = ROOT / "launchers" / "constraints.txt"
OLDEST = ROOT / "launchers" / "constraints-oldest.txt"


@pytest.fixture(scope="module")
def installed():
    """launchers/installed.py as a module."""
    spec = importlib.util.spec_from_file_location("installed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(*words: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_every_package_that_the_tests_install_is_pinned():
    done = compared("check", "dev", PINS)
    assert done.stderr == "", "launchers/constraints.txt must pin what a fresh machine installs"


def test_a_package_in_another_version_than_the_pinned_one_is_found(tmp_path):
    """Triton 3.9 from the time before the pins, first on the path: the compile tests would skip themselves."""
    record = tmp_path / "triton-3.9.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.9.0\n")
    done = compared("check", "dev", PINS, path=tmp_path)
    pin = re.search(r"^triton(==.*)$", PINS.read_text(), re.MULTILINE)[1]
    assert done.returncode == 1 and f"triton 3.9.0 is installed, wanted: {pin}\n" in done.stdout.replace(",>=3.6", "")


def test_the_torch_pin_allows_either_build_and_the_build_file_chooses_one(installed, tmp_path):
    build = tmp_path / "torch-build.txt"
    release = str(installed.read_constraints([str(PINS)])["torch"]).removeprefix("==")
    for line, wanted in ((f"torch=={release}+cpu", "+cpu"), (f"torch!={release}+cpu", "+cu130"), ("", "")):
        build.write_text(line + "\n")
        allowed = installed.read_constraints([str(build), str(PINS)])["torch"]
        assert allowed.contains(release + wanted)
        if line:
            assert not allowed.contains(release + {"+cpu": "+cu130", "+cu130": "+cpu"}[wanted])


def test_what_a_fresh_resolution_would_move_is_listed(tmp_path):
    pins, report = tmp_path / "pins.txt", tmp_path / "report.json"
    pins.write_text("numpy==2.4.6\ntorch==2.13.0\nsix==1.17.0\n")
    fresh = {"numpy": "2.5.0", "torch": "2.13.0+cpu", "polars": "1.0", "pst-dist": "0.1.0"}
    entries = [{"metadata": {"name": name, "version": version}} for name, version in fresh.items()]
    report.write_text(json.dumps({"install": entries}))
    said = compared("moved", report, pins).stdout.splitlines()
    assert said[0].startswith("fresh resolution: 2 of 3 packages differ")
    assert said[1:] == ["  numpy 2.4.6 -> 2.5.0", "  polars (new) -> 1.0", "  no longer needed: six"]


def test_the_oldest_versions_that_are_tested_are_the_floors(installed):
    """A floor that is raised without its line in constraints-oldest.txt would not be what CI tests."""
    tested = installed.read_constraints([str(PINS)]) | installed.read_constraints([str(OLDEST)])
    extras, checked = {"", "train", "embed", "encoder", "data", "ray", "report", "s3"}, set()
    for requirement in installed.requirements_of("pst-dist"):
        name = installed.normal(requirement.name)
        marker = requirement.marker
        if name in ("torch", "pst-dist") or (marker and not any(marker.evaluate({"extra": one}) for one in extras)):
            continue
        (floor,) = [one.version for one in requirement.specifier if one.operator == ">="]
        assert tested[name].contains(floor), f"{name}>={floor}: constraints-oldest.txt has {tested[name]}"
        checked.add(name)
    assert {"transformers", "ray", "deepspeed", "datasets", "numpy"} <= checked


@pytest.mark.parametrize(
    ("name", "broken"), [("transformers", "4.57.6"), ("ray", "2.59.1"), ("deepspeed", "0.18.9"), ("datasets", "3.6.0")]
)
def test_versions_that_cannot_work_are_below_the_floors(installed, name, broken):
    (requirement,) = [one for one in installed.requirements_of("pst-dist") if installed.normal(one.name) == name]
    assert not requirement.specifier.contains(broken)


def test_an_environment_that_is_as_it_should_be_is_left_alone(tmp_path):
    """No pip and no network: a second setup takes the time of one comparison."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    where = [str(tmp_path / "venv" / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (site / "rest.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    sums = subprocess.run(["cksum"], stdin=(ROOT / "pyproject.toml").open(), capture_output=True, text=True, check=True)
    (tmp_path / "venv" / "setup-stamp").write_text(f"{ROOT} {sums.stdout}")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PST_FRESH")}
    environment |= {"PST_VENV": str(tmp_path / "venv"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = ["bash", str(ROOT / "launchers" / "setup.sh"), "all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if "wanted:" in compared("check", "all", PINS).stdout:
        pytest.skip("the tests run on other versions than the pinned ones")
    assert done.stdout == f"setup: {tmp_path / 'venv'} is up to date\n", done.stdout + done.stderr


@pytest.mark.parametrize(("choice", "line"), [("cpu", "torch=={}+cpu"), ("cuda", "torch!={}+cpu")])
def test_the_build_of_torch_can_be_chosen_by_hand(choice, line, tmp_path):
    """In an image there is no GPU to look for. Without an index, setup ends after it has written its choice."""
    release = re.search(r"^torch==(.*)$", PINS.read_text(), re.MULTILINE)[1]
    assert setup_with(tmp_path, choice).returncode != 2
    assert (tmp_path / "venv" / "torch-build.txt").read_text() == line.format(release) + "\n"


def test_another_build_of_torch_is_refused(tmp_path):
    done = setup_with(tmp_path, "rocm")
    assert done.returncode == 2 and "PST_TORCH=rocm: must be cpu or cuda" in done.stderr


def setup_with(folder: Path, choice: str) -> subprocess.CompletedProcess[str]:
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PST_FRESH")}
    environment |= {"PST_VENV": str(folder / "venv"), "PST_TORCH": choice, "PIP_NO_INDEX": "1"}
    command = ["bash", str(ROOT / "launchers" / "setup.sh"), "all"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_image_is_installed_by_the_setup_script_and_has_the_name_that_the_job_uses():
    image = (ROOT / "cluster" / "Dockerfile").read_text()
    installs = [line for line in image.splitlines() if line.startswith("RUN") and ("pip" in line or "setup" in line)]
    assert installs == [
        "RUN PST_VENV=/opt/venv PST_TORCH=$TORCH PIP_NO_CACHE_DIR=1 launchers/setup.sh all && "
        "/opt/venv/bin/python -m pip check"
    ]
    (name,) = set(re.findall(r"-t (\S+)", image))
    assert set(re.findall(r"image: (\S+)", (ROOT / "cluster" / "rayjob.yaml").read_text())) == {name}


def test_what_the_image_must_not_carry_is_left_out_of_it():
    assert {".git", ".venv*", "runs"} <= set((ROOT / ".dockerignore").read_text().split())


def test_the_release_workflow_builds_tests_and_publishes_without_a_token():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    commands = " ".join(step.get("run", "") for step in jobs["build"]["steps"])
    assert "bash .ci/run" in commands and "python -m build" in commands and "twine check --strict" in commands
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["needs"] == "build"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_the_skypilot_task_has_what_its_schema_asks_for():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "cluster" / "skypilot.yaml").read_text()
    task = yaml.safe_load(text)
    assert "launchers/setup.sh all" in task["setup"] and "launchers/deepspeed.sh" in task["run"]
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    schemas = pytest.importorskip("sky.utils.schemas", reason="needs skypilot")
    import jsonschema

    jsonschema.validate(task, schemas.get_task_schema())
