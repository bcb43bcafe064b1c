"""Access to a Ray cluster's dashboard: its address and token, and following a job to its exit code.

Ray's own client sends the requests; its long or missing error messages become one line within seconds.
`clusters.ray.submit` defines the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from pst_dist.clusters.jobs import Status
from pst_dist.clusters.plain import plain
from pst_dist.clusters.ray.connect import probe
from pst_dist.clusters.ray.room import Waiting, lacking
from pst_dist.clusters.ray.token import find_token, prepare_token
from pst_dist.errors import EnvironmentFault, InputError, first_line
from pst_dist.text.urls import SameOriginToken

_ANSWER_SECONDS = 10.0
_AWAY_SECONDS = 300.0
"""How long a dashboard may be unreachable while a job is followed."""
_POLL_SECONDS = 1.0
_DEFAULT = "http://127.0.0.1:8265"
_CLIENT = "ray://"
NEEDS = {"CPU": "pst_cpus", "GPU": "pst_gpus"}
"""Resource -> key of a job's metadata with what its driver reserves; Ray's API does not report it."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def dashboard_address(asked: str | None) -> str:
    """`http://host:8265` of the cluster: the given address, else the one in the environment, else this machine.

    `auto` and `ray://host:10001` are returned as they are; `reached` finds the dashboard of such a cluster.
    """
    from_environment = os.environ.get("RAY_API_SERVER_ADDRESS")
    address = os.environ.get("RAY_ADDRESS", "")
    if from_environment is None and address.startswith(("http://", "https://", _CLIENT)):
        from_environment = address
    address = plain(asked or from_environment or _DEFAULT, "the dashboard's address").rstrip("/")
    return address if "://" in address or address == "auto" else f"http://{address}"


@functools.cache
def reached(address: str) -> str:
    """The dashboard's http address; asks the cluster for it when `address` is `auto` or `ray://host:port`.

    Raises EnvironmentFault when there is no such cluster, or when its dashboard cannot be reached from this machine.
    """
    if address != "auto" and not address.startswith(_CLIENT):
        return address
    prepare_token()
    if address != "auto":
        probe(address)
    try:
        from ray.dashboard import utils
    except ImportError as error:
        raise EnvironmentFault("cannot import ray's job client", "pip install 'pst-dist[ray]'") from error
    for name in ("ray", "ray.client_builder"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address == "auto":
            found = str(utils.ray_address_to_api_server_url("auto"))
        else:
            found = str(utils.ray_client_address_to_api_server_url(address))
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, grpc's own…
        where = "on this machine" if address == "auto" else f"at {address}"
        raise EnvironmentFault(
            f"no Ray cluster answers {where} ({first_line(error, 200)})", "give address=http://HEAD:8265"
        ) from None
    host = address.removeprefix(_CLIENT).rpartition(":")[0]
    ours = address == "auto" or host in _LOOPBACK
    if not ours and (urllib.parse.urlsplit(found).hostname or "") in _LOOPBACK:
        # Asking there would meet whatever cluster runs on this machine.
        raise EnvironmentFault(
            f"the dashboard of the cluster at {address} only listens on its own machine ({found})",
            "start Ray with --dashboard-host=0.0.0.0, or forward the port and give address=http://127.0.0.1:PORT",
        )
    return found


def check_dashboard(address: str, token: str | None) -> str:
    """Ray's version on the cluster; raises EnvironmentFault when no dashboard answers or it refuses the token."""
    answer = _get(f"{address}/api/version", token)
    if answer is None or b'"ray_version"' not in answer:
        raise EnvironmentFault(
            f"the server at {address} is not a Ray dashboard",
            "give address=http://HEAD:8265, the dashboard's port; a cluster without a dashboard accepts no jobs",
        )
    return read_version(answer, address)


def read_version(answer: bytes, address: str) -> str:
    """Ray's version in what a dashboard answered; raises EnvironmentFault for anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(answer)
        if isinstance(found, dict) and isinstance(found.get("ray_version"), str) and len(found["ray_version"]) < 80:
            return str(found["ray_version"])
    raise EnvironmentFault(f"{address} does not name its Ray version", "is it Ray's dashboard?")


def _get(url: str, token: str | None, most: int = 65536) -> bytes | None:
    """The first `most` bytes of the response, None for other errors or no HTTP; raises EnvironmentFault as above."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # Ignore the environment's proxy: it is for external hosts, not for a cluster's head node.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), SameOriginToken())
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=_ANSWER_SECONDS) as answer:
            return answer.read(most)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise EnvironmentFault(
                f"the cluster at {url.rpartition('/api')[0]} requires a token, and none was found here",
                "copy the head node's ~/.ray/auth_token to a file of mode 0600 and set RAY_AUTH_TOKEN_PATH to it",
            ) from None
        if error.code == 403:
            raise EnvironmentFault(
                f"the cluster at {url.rpartition('/api')[0]} refuses this token",
                "it belongs to another or an earlier cluster: copy ~/.ray/auth_token from the head node again",
            ) from None
        return None
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise EnvironmentFault(
            f"no Ray dashboard answers at {url.rpartition('/api')[0]} ({reason})",
            "start one (`ray start --head`), or give address=http://HEAD:8265 (`ray dashboard` or an ssh tunnel "
            "forwards it to this machine)",
        ) from None
    except TimeoutError:
        raise EnvironmentFault(
            f"the dashboard at {url.rpartition('/api')[0]} accepts connections but does not answer",
            "run `ray status` on the head node",
        ) from None
    except (OSError, ValueError, http.client.HTTPException):  # not HTTP, or an invalid URL
        return None


def connect(address: str) -> Any:
    """Ray's job client for a dashboard, after checking it; raises EnvironmentFault."""
    address = reached(address)
    check_dashboard(address, prepare_token())
    # RAY_ADDRESS would override the given address.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise EnvironmentFault("cannot import ray's job client", "pip install 'pst-dist[ray]'") from error
    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        raise EnvironmentFault(
            f"Ray's job client failed: {first_line(error, 200)}", "see the dashboard's logs"
        ) from error


def follow(address: str, job: str, *, say: Callable[[str], None]) -> int:
    """Report each line of a job's log until it has ended; returns the exit code of its command.

    The code is 130 for a stopped job and 4 for one that Ray could not start. Raises InputError when the cluster has no
    such job and EnvironmentFault when it stays unreachable; the job itself is never changed.
    """
    address = reached(address)
    client = connect(address)
    _info(client, job)  # an unknown job is refused before anything else
    log = _Log(say)
    waiting = Waiting(lambda reason: say(f"job {job}: waiting ({reason})"))
    heard = time.monotonic()
    while True:
        try:
            info = _info(client, job)
            if str(info.status) != "PENDING":  # the log of a waiting job is empty, and would be read until it has ended
                asyncio.run(log.read(client, job))
                info = _info(client, job)
            heard = time.monotonic()
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:  # aiohttp, requests and Ray each raise their own for a lost connection
            if time.monotonic() - heard > _AWAY_SECONDS:
                raise EnvironmentFault(
                    f"no answer from the cluster at {address} for {_AWAY_SECONDS / 60:.0f} minutes "
                    f"({first_line(error, 200)})",
                    look_again(job, address),
                ) from None
            time.sleep(_POLL_SECONDS)
            continue
        if str(info.status) in ("SUCCEEDED", "FAILED", "STOPPED"):
            log.end()
            code = exit_code_of(str(info.status), info.driver_exit_code)
            if info.driver_exit_code is None and info.message and code not in (0, 130):
                say(f"job {job}: {_last_line(info.message)}")
            say(f"job {job}: {str(info.status).lower()}, exit code {code}")
            return code
        if str(info.status) == "PENDING":
            waiting.look(functools.partial(_why_pending, address, info))
        time.sleep(_POLL_SECONDS)


def _why_pending(address: str, info: Any) -> str:
    """For what a job waits that has not started."""
    with contextlib.suppress(EnvironmentFault, ValueError):
        needs = {name: float((info.metadata or {}).get(key, 0)) for name, key in NEEDS.items()}
        if room := _room(address):
            reason = lacking("its driver", needs, *room)
            if reason is not None:
                return reason
    extra = [name for name in ("pip", "uv", "conda", "image_uri") if (info.runtime_env or {}).get(name)]
    return f"a node prepares its files and {', '.join(extra)}" if extra else "a node prepares its files"


def _room(address: str) -> tuple[dict[str, float], dict[str, float]] | None:
    """(total, free) CPUs and GPUs of the cluster as its dashboard reports them; None when it does not."""
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        answer = json.loads(_get(f"{address}/api/cluster_status", find_token(), most=2**24) or b"")
        usage = answer["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
        pairs = {name: (float(usage[name][0]), float(usage[name][1])) for name in ("CPU", "GPU") if name in usage}
        return {k: total for k, (_, total) in pairs.items()}, {k: total - used for k, (used, total) in pairs.items()}
    return None


def status(address: str, job: str) -> Status:
    """The state of a job; raises InputError for an unknown job, EnvironmentFault when the cluster is unreachable."""
    info = _info(connect(address), job)
    state = str(info.status)
    ended = state in ("SUCCEEDED", "FAILED", "STOPPED")
    code = exit_code_of(state, info.driver_exit_code) if ended else None
    return Status(f"job {job}: {state.lower()}" + ("" if code is None else f", exit code {code}"), code)


def exit_code_of(status: str, driver: int | None) -> int:
    """The exit code of an ended job: its command's own, or 128 + number after a signal."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return 130
    if driver is None:  # Ray never started the command, or lost the node it ran on
        return EnvironmentFault.exit_code
    return 128 - driver if driver < 0 else driver or 1


def look_again(job: str, address: str) -> str:
    """How to follow a job again, or stop it."""
    return (
        f"the job keeps running; follow it: pst submit ray --follow {job} address={address}, "
        f"stop it: RAY_AUTH_MODE=token ray job stop --address {address} {job}"
    )


class _Log:
    """A job's log; each connection streams it from the beginning, and every line is reported once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said, self._rest = say, 0, ""

    async def read(self, client: Any, job: str) -> None:
        """Report new lines until the log or the connection ends."""
        seen, self._rest = 0, ""
        stream = client.tail_job_logs(job)
        async with contextlib.aclosing(stream) as chunks:
            async for chunk in chunks:
                *lines, self._rest = (self._rest + chunk).split("\n")
                for line in lines:
                    seen += 1
                    if seen > self._said:
                        self._said = seen
                        self._say(line)

    def end(self) -> None:
        """Report an incomplete last line."""
        if self._rest:
            self._say(self._rest)


def _info(client: Any, job: str) -> Any:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error):
            raise InputError(f"the cluster has no job {job!r}", "`ray job list` lists its jobs") from None
        raise


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]
