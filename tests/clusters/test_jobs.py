"""The launcher interface: a third launcher, which runs a shell on this machine, as a folder and as an entry point."""

import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_run import small_config

import pst_dist.clusters
from pst_dist.cli.main import run_verb
from pst_dist.clusters.jobs import Launcher, launcher_names, load_launcher
from pst_dist.config.loading import dump_config
from pst_dist.errors import ConfigError, EnvironmentFault

SOURCE = textwrap.dedent('''
    """`pst submit shell`: a stage of a run in a shell of this machine."""

    import os
    import shlex
    import subprocess
    import sys
    import time
    from pathlib import Path

    from pst_dist.clusters.jobs import Job, Launcher, Status, Submission
    from pst_dist.config.loading import dump_config, load_config
    from pst_dist.errors import EnvironmentFault, InputError, LockedError


    class Shell(Launcher):
        checks = frozenset({"student"})

        def parse(self, config, words):
            asked = dict(word.split("=", 1) for word in words if word.startswith("verb="))
            rest = [word for word in words if not word.startswith("verb=")]
            return Submission(load_config(config, rest), asked.get("verb", "shard"))

        def render(self, submission):
            folder = Path(submission.config.output_dir)
            command = [sys.executable, "-m", "pst_dist.cli", submission.request, str(folder / "shell.yaml")]
            return f"{shlex.join(command)} > {shlex.quote(str(folder / 'shell.log'))} 2>&1\\n"

        def check(self, submission):
            if (Path(submission.config.output_dir) / "shell.yaml").exists():
                raise LockedError("a job already works here")

        def submit(self, submission, say):
            folder = Path(submission.config.output_dir)
            folder.mkdir(parents=True)
            (folder / "shell.yaml").write_text(dump_config(submission.config))
            say(self.render(submission))
            script = self.render(submission) + f"echo $? > {shlex.quote(str(folder / 'shell.code'))}\\n"
            subprocess.Popen(["bash", "-c", script], start_new_session=True)
            return Job(str(folder), submitted=f"job {folder}: submitted")

        def find(self, name, words):
            if not Path(name).is_dir():
                raise InputError("no such job", path=name)
            return Job(name)

        def status(self, job):
            code = Path(job.name, "shell.code")
            text = code.read_text() if code.exists() else ""
            return Status(f"job {job.name}: {'ended' if text else 'running'}", int(text) if text else None)

        def follow(self, job, say):
            end = time.monotonic() + 100
            while (status := self.status(job)).exit_code is None:
                if time.monotonic() > end:
                    raise EnvironmentFault("the job takes too long")
                time.sleep(0.05)
            say(Path(job.name, "shell.log").read_text())
            return status.exit_code

        def look_again(self, job):
            return f"pst submit shell --follow {job.name}"


    LAUNCHER = Shell()
''')


@pytest.fixture(params=["folder", "entry point"])
def shell(request, tmp_path, monkeypatch) -> Launcher:
    """The third launcher, brought in one of the two ways."""
    if request.param == "folder":
        folder = tmp_path / "clusters" / "shell"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text('WORDS = "shell:   verb=shard"\n')
        (folder / "submit.py").write_text(SOURCE)
        monkeypatch.setattr(pst_dist.clusters, "__path__", [*pst_dist.clusters.__path__, str(tmp_path / "clusters")])
    else:
        info = tmp_path / "site" / "somebody-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[pst_dist.launchers]\nshell = somebodys_shell:Shell\n")
        (tmp_path / "site" / "somebodys_shell.py").write_text(SOURCE)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield load_launcher("shell")
    for name in ("pst_dist.clusters.shell", "pst_dist.clusters.shell.submit", "somebodys_shell"):
        sys.modules.pop(name, None)


@pytest.fixture
def config(tmp_path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n}?", "answer": "{n}", "rationale": "r {n}"}}\n' for n in range(12)))
    words = {"data__train": str(rows), "data__test": "null", "data__validation_size": 2, "task": "null"}
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(small_config(tmp_path / "run" / "data", tmp_path / "run", **words)))
    return path


def test_a_third_launcher_renders_submits_follows_and_reports_a_real_job(shell, config, tmp_path, capsys):
    assert "shell" in launcher_names()
    assert run_verb(["submit", "shell", str(config), "--dry-run"]) == 0
    assert capsys.readouterr().out == shell.render(shell.parse(str(config), []))
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"
    assert run_verb(["submit", "shell", str(config), "seed=3"]) == 0
    out = capsys.readouterr().out
    assert f"job {tmp_path}/run: submitted" in out and "pst_dist.cli shard" in out
    assert (tmp_path / "run" / "data" / "shards" / "manifest.json").is_file()
    assert run_verb(["submit", "shell", "--status", f"{tmp_path}/run"]) == 0
    assert capsys.readouterr().out == f"job {tmp_path}/run: ended\n"
    assert run_verb(["submit", "shell", str(config)]) == 5, "what the launcher's own check refuses"


def test_a_jobs_exit_code_is_that_of_its_command(shell, config, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("no json\n")
    assert run_verb(["submit", "shell", str(config)]) == 2
    assert "error[" in capsys.readouterr().out
    assert run_verb(["submit", "shell", "--status", f"{tmp_path}/run"]) == 2
    assert run_verb(["submit", "shell", "--follow", f"{tmp_path}/run"]) == 2


def test_what_the_machine_lacks_is_refused_before_submitting(shell, config, tmp_path, capsys):
    words = [f"student.model_name_or_path={tmp_path}/no-such-model"]
    assert run_verb(["submit", "shell", str(config), *words]) == 4
    assert "student: " in (said := capsys.readouterr().err) and "no-such-model: no such folder" in said
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_the_job_alone(shell, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(shell), "follow", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run_verb(["submit", "shell", str(config)]) == 130
    assert f"no longer following job {tmp_path}/run: pst submit shell --follow" in capsys.readouterr().err


def test_an_unknown_launcher_is_one_line_with_those_that_exist(capsys):
    assert run_verb(["submit", "lsf", "demo"]) == 2
    assert "there is no launcher 'lsf'; choose from ray, slurm" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        load_launcher("../ray")


def test_a_package_whose_launcher_breaks_is_named(tmp_path, monkeypatch):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pst_dist.launchers]\nodd = no_such_module:x\nwrong = json:loads\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EnvironmentFault, match="'odd' of no_such_module:x cannot be loaded"):
        load_launcher("odd")
    with pytest.raises(EnvironmentFault, match=r"'wrong' is not a pst_dist\.clusters\.jobs\.Launcher"):
        load_launcher("wrong")


def test_both_launchers_of_ours_implement_the_interface_and_their_words_are_in_the_help(capsys):
    assert launcher_names()[:2] == ["ray", "slurm"]
    for name in ("ray", "slurm"):
        assert isinstance(load_launcher(name), Launcher)
    with pytest.raises(SystemExit):
        run_verb(["submit", "--help"])
    out = capsys.readouterr().out
    assert re.search(r"^slurm:\n +verb=run .*\n +nodes=2", out, re.MULTILINE)
    assert re.search(r"^ray:\n +address=", out, re.MULTILINE)


def test_the_names_of_earlier_jobs_are_checked_before_a_cluster_is_asked(capsys):
    for where, name in [("slurm", "--help"), ("slurm", "12; rm"), ("ray", "../x"), ("ray", "a\nb")]:
        assert run_verb(["submit", where, f"--follow={name}"]) == 2
        assert f"is not a {where.title()} job" in capsys.readouterr().err


def test_help_does_not_load_what_only_a_submission_needs():
    program = (
        "import sys, pst_dist.cli.main as m\n"
        "try: m.run_verb(['submit', '--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('ray', 'torch', 'pst_dist.clusters.slurm.submit', 'pst_dist.clusters.ray.submit') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
