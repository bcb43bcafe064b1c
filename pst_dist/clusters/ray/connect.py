"""Connects to a Ray cluster: the one this process is in, one named by an address, or one started for a block.

It finds or starts the cluster securely (with its own token, leaving nothing behind) and reports failures in one line
within seconds. The modules that call it decide what runs on the cluster.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pst_dist.clusters.ray.token import prepare_token
from pst_dist.config.schema import RayConfig
from pst_dist.errors import EnvironmentFault, PstError, first_line

_PROBE_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100 * 2**20  # only messages travel; Ray wants at least 75 MiB


@contextlib.contextmanager
def ray_cluster(config: RayConfig) -> Iterator[Any]:
    """The ray module, connected to this process's cluster, to `address`, or to a new one that ends with this block."""
    imported = sys.modules.get("ray")
    if imported is not None and imported.is_initialized():  # keep the cluster that this process is connected to
        yield imported
        return
    # Inside a job of `ray job submit`, Ray names its cluster in the environment.
    address = config.address or os.environ.get("RAY_ADDRESS")
    own = address is None
    if address is not None and address.startswith(("http://", "https://")):
        raise EnvironmentFault(
            f"{address} is a Ray dashboard, which only takes jobs",
            f"run `pst submit ray … address={address}`, or name the cluster itself: HEAD:6379, auto or ray://HEAD:10001",
        )
    if own:
        secure_local_cluster()
    else:
        prepare_token()
    try:
        import ray
    except ImportError as error:
        raise EnvironmentFault("cannot import ray", "pip install 'pst-dist[ray]', or run without Ray") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    temporary = _folder() if own else None  # Ray's files, private to this user
    try:
        if temporary is not None:
            with _on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=str(temporary / "ray"),
                    _node_ip_address=_LOOPBACK,
                    **quiet,
                )
            _close_to_others(temporary / "ray")
        else:
            probe(str(address))
            with _on_loopback() if _is_only_on_loopback(str(address)) else contextlib.nullcontext():
                ray.init(address=address, **quiet)
    except Exception as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, PstError):
            raise
        reason = first_line(error)
        what = "cannot start a local Ray cluster" if own else f"cannot join the Ray cluster at {address}"
        raise EnvironmentFault(
            f"{what} ({reason[:160]})",
            "look at the machine's load and memory, or run without Ray"
            if own
            else "check that it runs (`ray status`) and that RAY_AUTH_TOKEN_PATH names its token, or run without Ray",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have `ray.init` start its services on 127.0.0.1, or look for them there.

    Ray's services listen on every interface unless the node's address is loopback, and on Linux `ray.init` replaces a
    loopback address by the machine's own, so that other nodes can join. It keeps loopback where it assumes that there
    are no other nodes, as on macOS; this switch selects that, and Ray reads it only there (ray 2.60).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _is_only_on_loopback(address: str) -> bool:
    """Whether a cluster named by a loopback address, as `ray_cluster` starts them, cannot be reached by another one.

    `ray.init` would replace the loopback address by the machine's own, where such a cluster does not listen.
    """
    host, _, port = address.rpartition(":")
    if host not in (_LOOPBACK, "localhost") or not port.isdigit():
        return False
    from ray.util import get_node_ip_address

    try:
        socket.create_connection((get_node_ip_address(), int(port)), timeout=_PROBE_SECONDS).close()
    except OSError:
        return True
    return False


def _close_to_others(folder: Path) -> None:
    """Set the folders that Ray created with mode 0777 to 0700; only this user's processes need their content."""
    for path in (folder, *folder.glob("session_*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)


def secure_local_cluster() -> None:
    """Create a token for this process, unless the user has set one; must be called before ray is imported.

    Otherwise Ray would write one into the home directory, readable by all, which changes what later clusters require
    (ray 2.60). Ray reads the token once per process, so it stays valid for the life of the process, and setting it has
    no effect after ray was imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    _sweep(Path(tempfile.gettempdir()).glob("pst-ray-token-*"))
    descriptor, claim = tempfile.mkstemp(prefix="pst-ray-claim-")  # mode 0600
    stream = os.fdopen(descriptor, "w")
    stream.write(secrets.token_hex(32))
    stream.flush()
    path = Path(claim.replace("pst-ray-claim-", "pst-ray-token-"))
    _hold(stream, Path(claim), path)
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(path)
    atexit.register(path.unlink, missing_ok=True)


def _folder() -> Path:
    """A new folder of mode 0700 for a cluster of ours; also removes those of processes that were killed.

    Ray works in a folder inside it, which Ray makes accessible to everybody. It holds Ray's sockets, and a socket's
    path is limited to 107 bytes: TMPDIR is often too long for that.
    """
    place = Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    _sweep(place.glob("pst-ray-*/.owner"))
    folder = Path(tempfile.mkdtemp(prefix="pst-ray-", dir=place))
    _hold((folder / ".claim").open("w"), folder / ".claim", folder / ".owner")
    return folder


_held: list[TextIO] = []


def _hold(stream: TextIO, claim: Path, path: Path) -> None:
    """Lock a file for the life of this process; it gets its name only after it is locked."""
    fcntl.flock(stream, fcntl.LOCK_EX)
    claim.rename(path)
    _held.append(stream)


def _sweep(files: Iterable[Path]) -> None:
    """Delete files that no process has locked, because their processes are dead; an `.owner` file with its folder."""
    for path in files:
        with contextlib.suppress(OSError), path.open("r+") as stream:  # locked, or another user's
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name == ".owner":
                shutil.rmtree(path.parent, ignore_errors=True)
            else:
                path.unlink()


def probe(address: str) -> None:
    """Raise EnvironmentFault within seconds when nothing listens at `host:port`; Ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like: Ray finds the cluster itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no Ray cluster answers at {address} ({error.strerror or error})",
            "start it (`ray start --head`) or set embed.ray.address",
        ) from error
