"""Ray and Slurm as they would be used from here: do they answer, do versions and tokens fit, is there room.

Ray is asked by a child process, because joining a cluster of another version or with a wrong token may raise, print
or hang in ways that a process does not recover from.
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
from pst_dist.clusters.slurm.submit import partitions
from pst_dist.config.schema import Config, EmbedConfig, TrainConfig
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
    """The Ray clusters that the config or RAY_ADDRESS name; nothing when none is named."""
    stages: dict[str, EmbedConfig | TrainConfig] = {}
    if config is not None:
        stages = {"embed": config.embed, "train": config.train}
    asked = {f"{name}.ray.address": stage.ray.address for name, stage in stages.items() if stage.backend == "ray"}
    if not asked:
        return _named(None, "RAY_ADDRESS", environment.get("RAY_ADDRESS"), environment)
    # Both stages mostly name one cluster, which is then asked once.
    places = {address or environment.get("RAY_ADDRESS"): key for key, address in reversed(asked.items())}
    findings = []
    for address, key in places.items():
        if address is None:
            findings.append(ok("ray", "no address: a cluster of this machine is started for the work"))
            continue
        given = address in asked.values()
        findings += _named(config, key if given else "RAY_ADDRESS", address, environment)
    return findings


def _named(config: Config | None, name: str, address: str | None, environment: Mapping[str, str]) -> list[Finding]:
    """One cluster; with a config the work is to be done there, so that a silent one is a problem."""
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
                "is it Ray that listens there? see `ray status` on its head node",
            )
        ]
    if answer is None:
        return [
            problem(
                "ray",
                f"{called}: Ray ended the process that joined, with {code}",
                "compare `ray --version` and python here and there",
            )
        ]
    if "failed" in answer:
        return [_refused(called, answer["failed"], environment)]
    return _room(config, called, answer)


def _join(address: str, environment: Mapping[str, str]) -> tuple[dict[str, Any] | None, int | None]:
    """What joining came to, else (None, exit code), else (None, None) when it took too long."""
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
                # Ray asks again and again, and ends with "failed to connect".
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
            f"{called}: the token does not fit, RAY_AUTH_MODE is {mode} ({short})",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
        )
    if "client connection timeout" in low:
        # All that Ray's client says of a wrong token.
        return problem(
            "ray",
            f"{called}: the port answers, but lets nobody in",
            "check RAY_AUTH_MODE and the token, and that Ray is of one version here and there",
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
    actor = config.embed.ray
    wanted = {"CPU": actor.num_cpus_per_actor, "GPU": actor.num_gpus_per_actor}
    fit = min(int(has.get(name, 0) / amount) for name, amount in wanted.items() if amount > 0)
    needs = f"{wanted['CPU']:g} CPU, {wanted['GPU']:g} GPU"
    if fit == 0:
        findings.append(
            problem(
                "ray",
                f"an encoder actor needs {needs}; the cluster has {cpus:g} CPU, {gpus:g} GPU",
                "lower embed.ray.num_cpus_per_actor or num_gpus_per_actor",
            )
        )
    elif actor.num_actors is not None and fit < actor.num_actors:
        findings.append(warning("ray", f"embed.ray.num_actors={actor.num_actors}, but {fit} of {needs} fit"))
    return findings


def slurm(environment: Mapping[str, str], nodes: int, gpus: int | None) -> list[Finding]:
    """Slurm's controller and partitions, where this machine has a Slurm."""
    files = [Path(name) for name in _SLURM_FILES]
    configured = environment.get("SLURM_CONF") or any(path.is_file() for path in files)
    if shutil.which("sinfo") is None:
        if configured:
            return [problem("slurm", "there is a slurm.conf, but no sinfo on PATH", "add Slurm's bin folder to PATH")]
        return []
    if not configured:
        return [ok("slurm", "its commands are here, but no slurm.conf: not a machine that submits jobs")]
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
        return [problem("slurm", "there is no partition that this user sees", "ask the cluster's keepers")]
    if all(not one.up for one in found):
        findings.append(problem("slurm", "every partition is down", "ask the cluster's keepers"))
    if all(one.gpus == 0 for one in found):
        findings.append(warning("slurm", "no partition has GPUs", "leave gpus= out when submitting: ranks=2 cpus=2"))
    if nodes > max(one.nodes for one in found):
        findings.append(
            problem("slurm", f"nodes={nodes}, but no partition has more than {max(one.nodes for one in found)}")
        )
    return findings
