"""Runs inside two hosts (see `hosts`): power loss under torchrun, a pulled network cable, then the deepspeed launcher.

`lost_host.py FOLDER CONFIG` prints, as JSON, each process's exit code and how many seconds after the loss it ended;
what the processes said is in FOLDER/NAME.log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hosts import on_host, plug_cable, pull_cable
from waiting import wait_until

MASTER = "10.77.0.11"
BY_HOSTFILE = """
place=$($0 -m pst_dist.hostfile "$2" 29503) || exit
exec "$1" --hostfile "$2" --no_ssh --no_local_rank --node_rank "${place% *}" --master_addr "${place#* }" \\
  --master_port 29503 --module pst_dist.train "$3"
"""
"""The same command on each host: it finds out which of them it is."""
RANKS = Path(__file__).with_name("rank_group.py")


class Processes:
    """Commands that run on the hosts, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen] = {}
        self.results: dict[str, dict[str, float]] = {}

    def start(self, name: str, host: str, *command: str, **place: int) -> None:
        """Start a command on a host, with these environment variables more."""
        words = [f"{key}={value}" for key, value in place.items()]
        with (self.folder / f"{name}.log").open("wb") as stream:
            self.running[name] = subprocess.Popen(
                on_host(host, "env", *words, *command), stdout=stream, stderr=subprocess.STDOUT
            )

    def said(self, name: str) -> str:
        """What a command wrote so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def all_end(self, names: list[str], seconds: float) -> None:
        """Wait until these have ended, and note how, counting the time from now."""
        started = time.monotonic()

        def look() -> bool:
            for name in names:
                code = self.running[name].poll()
                if code is not None and name not in self.results:
                    self.results[name] = {"code": code, "seconds": time.monotonic() - started}
            return all(name in self.results for name in names)

        wait_until(look, f"the end of {', '.join(names)}", seconds)

    def stop(self) -> None:
        """End all."""
        for process in self.running.values():
            process.kill()
            process.wait()


def main() -> None:
    """Run it all."""
    folder, config = Path(sys.argv[1]), sys.argv[2]
    processes = Processes(folder)
    laps = {"laps-0": "n1", "laps-1": "n1", "laps-2": "n2"}
    try:
        for rank, (name, host) in enumerate(laps.items()):
            place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": MASTER, "MASTER_PORT": 29501}
            processes.start(name, host, sys.executable, str(RANKS), "laps", "600", **place)
        for node in (0, 1):
            nodes = ["--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", f"--master-addr={MASTER}"]
            launcher = [sys.executable, "-m", "pst_dist.torchrun", *nodes, "--master-port=29502"]
            stuck = [str(folder), "1", "backward", "6"]
            processes.start(f"torchrun-{node}", f"n{node + 1}", *launcher, str(RANKS), *stuck, config)
        wait_until(lambda: (folder / "stuck").exists(), "rank 1 is stuck", 300)
        processes.running["torchrun-1"].kill()
        processes.all_end(["torchrun-0"], 60)

        time.sleep(2)  # signs of life of the laps, which have long begun
        pull_cable("n2")
        processes.all_end(list(laps), 60)
        plug_cable("n2")

        (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
        launchers = []
        for node in (0, 1):
            launchers.append(f"deepspeed-{node}")
            words = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), str(folder / "hostfile"), config]
            processes.start(launchers[-1], f"n{node + 1}", "bash", "-c", BY_HOSTFILE, *words)
        processes.all_end(launchers, 200)
    finally:
        processes.stop()
        print(json.dumps(processes.results))


if __name__ == "__main__":
    os.environ.update(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    main()
