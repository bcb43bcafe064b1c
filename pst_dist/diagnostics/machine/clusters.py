"""Checks of Ray and Slurm from this machine: whether they answer, versions and tokens match, and the run fits.

A child process joins Ray, because joining a cluster of another version or with a wrong token may raise, print or hang
in ways that a process cannot recover from.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pst_dist.clusters.slurm import commands
from pst_dist.clusters.slurm.partitions import partitions
from pst_dist.config.schema import Config, EmbedConfig, EvaluateConfig, TrainConfig
from pst_dist.diagnostics.machine.findings import Finding, ok, problem, warning
from pst_dist.errors import PstError

RAY_SECONDS = 45.0
_JOIN_SECONDS = 35.0
_PROBE_SECONDS = 5.0
_SLURM_FILES = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
_JOIN = """\
import json, logging, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
    print(json.dumps({"resources": ray.cluster_resources(), "nodes": sum(node["Alive"] for node in ray.nodes())}))
except BaseException as error:
    print(json.dumps({"failed": type(error).__name__ + ": " + " ".join(str(error).split())}))
"""


def ray(config: Config | None, environment: Mapping[str, str]) -> list[Finding]:
    """The Ray clusters named by the config or RAY_ADDRESS; nothing if none is named."""
    stages: dict[str, EmbedConfig | TrainConfig | EvaluateConfig] = {}
    if config is not None:
        stages = {"embed": config.embed, "train": config.train, "evaluate": config.evaluate}
    asked = {f"{name}.ray.address": stage.ray.address for name, stage in stages.items() if stage.backend == "ray"}
    if not asked:
        return _named(None, "RAY_ADDRESS", environment.get("RAY_ADDRESS"), environment)
    # Both stages usually name the same cluster, which is then checked once.
    places = {address or environment.get("RAY_ADDRESS"): key for key, address in reversed(asked.items())}
    findings = []
    for address, key in places.items():
        if address is None:
            findings.append(ok("ray", "no address: a local cluster will be started"))
            continue
        given = address in asked.values()
        findings += _named(config, key if given else "RAY_ADDRESS", address, environment)
    return findings


def _named(config: Config | None, name: str, address: str | None, environment: Mapping[str, str]) -> list[Finding]:
    """One cluster; with a config the run will use it, so a cluster that does not answer is a problem."""
    if address is None:
        return []
    wanted, from_environment, called = config is not None, name == "RAY_ADDRESS", f"{name}={address}"
    findings = _asked(config, address, called, environment)
    if from_environment and any(finding.level == "problem" for finding in findings):
        stale = "unset RAY_ADDRESS if that cluster is gone"
        findings = [
            (problem if wanted else warning)(
                found.subject, found.what, f"{found.remedy}; {stale}" if found.remedy else stale
            )
            for found in findings
        ]
    return findings


def _asked(config: Config | None, address: str, called: str, environment: Mapping[str, str]) -> list[Finding]:
    host, _, port = address.partition("://")[2].rpartition(":") if "://" in address else address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            return [
                problem(
                    "ray",
                    f"{called}: nothing answers there ({error.strerror or error})",
                    "start it (`ray start --head`), or correct the address",
                )
            ]
    if address.startswith("http"):
        return [ok("ray", f"{called}: the job API's port answers")]
    answer, code = _join(address, environment)
    if answer is None and code is None:
        return [
            problem(
                "ray",
                f"{called}: takes connections, but no answer within {_JOIN_SECONDS:.0f} s",
                "check that Ray listens there, with `ray status` on its head node",
            )
        ]
    if answer is None:
        return [
            problem(
                "ray",
                f"{called}: the process that joined ended with exit code {code}",
                "compare `ray --version` and the Python version on both sides",
            )
        ]
    if "failed" in answer:
        return [_refused(called, answer["failed"], environment)]
    return _room(config, called, answer)


def _join(address: str, environment: Mapping[str, str]) -> tuple[dict[str, Any] | None, int | None]:
    """(answer, exit code) of joining; the answer is None if it failed, both are None if it took too long."""
    child = subprocess.Popen(
        [sys.executable, "-c", _JOIN, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert child.stdout is not None
    over = threading.Event()

    def end() -> None:
        over.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    clock = threading.Timer(_JOIN_SECONDS, end)
    clock.start()
    answer = None
    try:
        for line in child.stdout:
            if "InvalidAuthToken" in line:
                # Ray keeps retrying and finally reports "failed to connect".
                answer = {"failed": "InvalidAuthToken: " + line.rpartition("InvalidAuthToken:")[2].strip()}
                break
            if line.startswith('{"'):
                answer = json.loads(line)
    finally:
        clock.cancel()
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
    return answer, None if over.is_set() else code


def _refused(called: str, said: str, environment: Mapping[str, str]) -> Finding:
    short = said[:300]
    low = said.lower()
    if "version mismatch" in low or "different version" in low:
        return problem("ray", f"{called}: {short}", "use the cluster's Ray and Python versions here")
    if "invalidauthtoken" in low or "authentication" in low:
        mode = environment.get("RAY_AUTH_MODE", "not set")
        return problem(
            "ray",
            f"{called}: the token is not accepted, RAY_AUTH_MODE is {mode} ({short})",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
        )
    if "client connection timeout" in low:
        # Ray's client reports a wrong token only in this way.
        return problem(
            "ray",
            f"{called}: the port answers, but refuses the connection",
            "check RAY_AUTH_MODE and the token, and that both sides have the same Ray version",
        )
    return problem("ray", f"{called}: {short}", "check it with `ray status`")


def _room(config: Config | None, called: str, answer: dict[str, Any]) -> list[Finding]:
    has = answer["resources"]
    cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
    findings = [ok("ray", f"{called}: {answer['nodes']} node(s), {cpus:g} CPUs, {gpus:g} GPUs")]
    if config is not None and config.train.backend == "ray":
        from pst_dist.clusters.ray.train import check_room

        try:
            check_room(config.train.ray, has)
        except PstError as error:
            findings.append(problem("ray", error.what, error.remedy))
    if config is None or config.embed.backend != "ray":
        return findings
    from pst_dist.clusters.ray.gpus import room_for, settled_actors

    actor = settled_actors(config.embed.ray, has, device=config.embed.device)
    try:
        fit = room_for(actor, has, "an encoder actor", "embed.ray")
    except PstError as error:
        return [*findings, problem("ray", error.what, error.remedy)]
    if actor.num_actors is not None and fit < actor.num_actors:
        needs = f"{actor.num_cpus_per_actor:g} CPU, {actor.num_gpus_per_actor:g} GPU"
        findings.append(warning("ray", f"embed.ray.num_actors={actor.num_actors}, but {fit} of {needs} fit"))
    return findings


def slurm(environment: Mapping[str, str], nodes: int, gpus: int | None) -> list[Finding]:
    """Slurm's controller and partitions, if this machine has Slurm."""
    files = [Path(name) for name in _SLURM_FILES]
    configured = environment.get("SLURM_CONF") or any(path.is_file() for path in files)
    if shutil.which("sinfo") is None:
        if configured:
            return [problem("slurm", "there is a slurm.conf, but no sinfo on PATH", "add Slurm's bin folder to PATH")]
        return []
    if not configured:
        return [ok("slurm", "its commands are installed, but there is no slurm.conf: this machine cannot submit jobs")]
    commands.check_controller()
    found = partitions()
    findings = [
        ok(
            "slurm",
            "the controller answers; partitions "
            + ", ".join(
                f"{one.name}{'*' if one.default else ''} ({one.nodes} nodes, {one.gpus} GPUs each)" for one in found
            ),
        )
    ]
    if not found:
        return [problem("slurm", "this user cannot see any partition", "ask the cluster's administrators")]
    if all(not one.up for one in found):
        findings.append(problem("slurm", "every partition is down", "ask the cluster's administrators"))
    if all(one.gpus == 0 for one in found):
        findings.append(warning("slurm", "no partition has GPUs", "submit without gpus=: ranks=2 cpus=2"))
    if nodes > max(one.nodes for one in found):
        findings.append(
            problem("slurm", f"nodes={nodes}, but no partition has more than {max(one.nodes for one in found)}")
        )
    return findings
