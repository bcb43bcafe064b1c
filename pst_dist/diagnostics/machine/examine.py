"""`pst doctor`: finds what on this machine would make a run fail, hang or run slowly, with remedies.

All checks run in parallel, each with a time limit. `facts` collects what a node has; `software`, `places`, `models`,
`network` and `clusters` are functions from facts to findings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pst_dist.config.schema import Config
from pst_dist.diagnostics.cost import Machines, split_words
from pst_dist.diagnostics.machine.facts import Machine, collect, differences, read_report
from pst_dist.diagnostics.machine.findings import Check, Finding, look_at
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.storage.json_files import json_text
from pst_dist.storage.outputs import check_output, is_node_report, write_output

SLOW_FILES = "a file server may not be answering: see `mount`, or choose another directory"


@dataclass(frozen=True)
class Request:
    """The arguments of `pst doctor` that are not keys of the config."""

    machines: Machines
    ranks: int | None
    """Ranks on this node, if gpus= was given."""
    hostfile: Path | None


def split_request(words: list[str]) -> tuple[list[str], Request]:
    """Split command-line arguments into config overrides and ours (nodes=, gpus=, hostfile=); raises ConfigError."""
    hostfiles = [word.partition("=")[2] for word in words if word.startswith("hostfile=")]
    if "" in hostfiles:
        raise ConfigError("hostfile= names no file", "hostfile=PATH")
    rest, machines = split_words([word for word in words if not word.startswith("hostfile=")])
    asked = any(word.startswith("gpus=") for word in words)
    return rest, Request(machines, machines.gpus if asked else None, Path(hostfiles[-1]) if hostfiles else None)


def examine(
    config: Config | None, request: Request, *, only: Collection[str] | None = None
) -> tuple[Machine, list[Finding]]:
    """Look at this machine, and with a config at what it will need. Takes seconds, and a minute at the very most.

    With `only`, the checks of those subjects and no others.
    """
    from pst_dist.diagnostics.machine import clusters, models, network, places, software

    logging.getLogger("pst_dist").setLevel(logging.WARNING)  # the findings are what is to be said
    environment = dict(os.environ)
    machine = collect()
    nodes = request.machines.nodes
    checks = [
        Check("packages", lambda: software.packages(config)),
        Check("hardware", lambda: software.hardware(machine, config, ranks=request.ranks, environment=environment)),
        Check("torch", lambda: software.torch_works(machine), software.TORCH_SECONDS + 5),
        Check("extensions", software.compiler_locks, silence=SLOW_FILES),
        Check(
            "host name", lambda: network.host_name(nodes), silence="name servers do not answer: see /etc/resolv.conf"
        ),
        Check("port", lambda: network.port(environment), silence="name servers do not answer: see /etc/resolv.conf"),
        Check("ray", lambda: clusters.ray(config, environment), clusters.RAY_SECONDS),
        Check("slurm", lambda: clusters.slurm(environment, nodes, request.ranks), 60.0),
    ]
    hostfile = request.hostfile or (_USUAL_HOSTFILE if _USUAL_HOSTFILE.is_file() else None)
    if hostfile is not None:
        room = len(machine.gpus) or machine.cores
        checks.append(Check("hostfile", lambda: network.hostfile(hostfile, room), 20.0))
    if config is not None:
        for name, folder in places.folders(config).items():
            checks.append(Check(name, lambda n=name, f=folder: places.place(n, f, nodes), silence=SLOW_FILES))  # type: ignore[misc]
        checks += [
            Check("data_dir", lambda: places.store(config), 40.0),
            Check("contents", lambda: places.contents(config), silence=SLOW_FILES),
            Check("deepspeed", lambda: software.deepspeed_json(config), 60.0),
            Check("encoder", lambda: models.encoder(config)),
            Check("student", lambda: models.student(config)),
            Check(
                "plan",
                lambda: places.room(config, request.machines, machine.memory_free, bool(machine.gpus)),
                20.0,
                "counting the rows or loading the student takes too long: use `pst plan`, which has no time limit",
            ),
        ]
    return machine, look_at([check for check in checks if only is None or check.subject in only])


_USUAL_HOSTFILE = Path("/job/hostfile")
"""The default path of the deepspeed launcher."""


def verdict(findings: list[Finding]) -> tuple[str, int]:
    """The last line and the exit code: 0 without problems, else 4."""
    counts = {level: sum(found.level == level for found in findings) for level in ("problem", "warning")}
    if counts["problem"]:
        return f"{counts['problem']} problem(s), {counts['warning']} warning(s)", EnvironmentFault.exit_code
    return f"no problems, {counts['warning']} warning(s)", 0


def check_report(path: Path) -> None:
    """Raises InputError when `write_report` would replace a file that is no report of pst."""
    check_output(path, is_node_report)


def write_report(machine: Machine, path: Path) -> None:
    """Write what this node has, to compare it with other nodes; raises InputError for another file of that name."""
    write_output(path, json_text(machine.to_json()), is_node_report)


def compare_reports(paths: list[Path]) -> list[Finding]:
    """The differences between the nodes of several reports; raises InputError."""
    return differences([read_report(path) for path in paths])
