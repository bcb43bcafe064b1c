"""A real Slurm of virtual nodes on this machine: munged, slurmctld and one slurmd a node, all children of the test.

Run as a program (`python slurm_cluster.py FOLDER command…`) it makes two hosts of network and process namespaces, each
with its own address, brings Slurm up over them, runs each command line there and ends with the last one's exit code:
Ray wants nodes that have addresses of their own, and stops every Ray process that it sees.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hosts import boxed, on_host
from ports import free_ports
from waiting import wait_until

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/socket/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=5
ReturnToService=2
SlurmdTimeout=30
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=small Nodes=n1 MaxTime=1 State=UP
"""


@dataclass
class SlurmCluster:
    """What the tests need of it; commands see it through SLURM_CONF."""

    folder: Path
    nodes: int
    hosts: bool = False
    """Whether each node is a host of its own (see `hosts`) rather than a port of this one."""
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For commands that are to talk to this Slurm and no other."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return clean | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PST_SLURM_POLL_SECONDS": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def ask(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    def start(self) -> None:
        """Bring up the daemons; raises TimeoutError with their last words when the nodes do not come up."""
        folder = self.folder
        for name in ("state", "spool", "log"):
            (folder / name).mkdir()
        for name, mode in (("munge", 0o700), ("socket", 0o755)):
            (folder / name).mkdir(mode=mode)
            shutil.chown(folder / name, "munge", "munge")
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
        ports = free_ports(self.nodes + 1)
        host = socket.gethostname().partition(".")[0]
        names = [f"n{i + 1}" for i in range(self.nodes)]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name if self.hosts else host} Port={port} CPUs=4 RealMemory=4000 "
            f"NodeAddr={f'10.77.0.1{name[1:]}' if self.hosts else '127.0.0.1'}"
            for name, port in zip(names, ports, strict=False)
        )
        address = "10.77.0.1" if self.hosts else "127.0.0.1"
        text = _CONFIGURATION.format(host=host, address=address, port=ports[-1], folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        as_munge = ["--reuid=munge", "--regid=munge", "--clear-groups"]
        self._daemon("munged", [*as_munge, "munged", "-F", "-S", f"{folder}/socket/munge.sock", *munge])
        self._daemon("slurmctld", ["slurmctld", "-D"])
        for name in names:
            command = ["slurmd", "-D", "-N", name]
            self._daemon(f"slurmd-{name}", on_host(name, *command) if self.hosts else command)
        end = time.monotonic() + 30
        while self.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() != str(self.nodes):
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                raise TimeoutError(f"Slurm did not come up: {self.last_words()}")
            time.sleep(0.1)

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as stream:
            # Should the tests themselves be killed, the kernel ends the daemons.
            self.daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig=TERM", *command],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def start_again_now(self, number: str) -> None:
        """Let a requeued job start at once: Slurm holds it back for two minutes.

        Without that pause a node may take the second start for the first one, which it has been told to end (times of
        credentials are whole seconds), and fail the job before its script runs. So wait for what the pause is for.
        """
        wait_until(lambda: "Reason=BeginTime" in self.ask("scontrol", "show", "job", number), f"job {number} waits")
        idle = ("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
        wait_until(lambda: self.ask(*idle).strip() == str(self.nodes), "all nodes are idle")
        time.sleep(2.5)
        self.ask("scontrol", "update", f"job={number}", "StartTime=now")

    def last_words(self) -> str:
        """The ends of the daemons' logs, for the message of a test that failed."""
        return "".join(
            f"\n--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted((self.folder / "log").iterdir())
        )

    def stop(self) -> None:
        """Cancel what runs, so that no step outlives its slurmd, then end the daemons by their own pids."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.ask("scancel", "--user=root")
            end = time.monotonic() + 20
            while self.ask("squeue", "-h").strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextlib.contextmanager
def slurm_folder() -> Iterator[Path]:
    """A folder for a Slurm; skips the test, by name and reason, where there can be none."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs Slurm (apt-get install slurm-wlm munge): no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("needs root: slurmd starts jobs as their users")
    # Not pytest's folder: the user munge must be able to walk to its socket.
    folder = Path(tempfile.mkdtemp(prefix="pst-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def slurm_cluster(nodes: int) -> Iterator[SlurmCluster]:
    """A Slurm for the time of this block."""
    with slurm_folder() as folder:
        cluster = SlurmCluster(folder, nodes)
        try:
            try:
                cluster.start()
            except (TimeoutError, LookupError, OSError) as error:  # no user munge, no room for daemons
                pytest.skip(f"a Slurm of virtual nodes cannot be brought up here: {error}")
            yield cluster
        finally:
            cluster.stop()


def run_on_hosts(folder: Path, *commands: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run command lines one after the other on a Slurm of two hosts; says `exit code N` after each."""
    words = [word for command in commands for word in [*command, ";"]]
    return subprocess.run(
        boxed(sys.executable, __file__, str(folder), *words), capture_output=True, text=True, timeout=timeout
    )


def main() -> int:
    """The commands of the command line, each ended by a lone `;`, on a Slurm of two hosts."""
    cluster = SlurmCluster(Path(sys.argv[1]), nodes=2, hosts=True)
    command: list[str] = []
    code = 0
    try:
        cluster.start()
        for word in sys.argv[2:]:
            if word != ";":
                command.append(word)
                continue
            code = subprocess.run(command, env=cluster.environment).returncode
            print(f"exit code {code}", flush=True)
            command = []
    finally:
        cluster.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
