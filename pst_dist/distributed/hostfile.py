"""Hostfiles of the deepspeed launcher: parsed by its own rule; resolves each host and checks slots and port.

When the file is missing, the launcher silently trains on one machine; with `--no_ssh` it checks no name and waits
until a timeout for the ranks of a host that does not exist.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pst_dist.errors import EnvironmentFault, InputError

DEFAULT_PORT = 29500
"""Default port of the first host, for torchrun and the deepspeed launcher."""
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_MOST_DIGITS = 9
_NAME = re.compile(r"[\w.:\[\]][\w.:\[\]-]*")
"""Names are used in ssh and shell commands, so only letters, digits, dots, dashes and characters of IPv6 addresses."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """Ranks to start there, one per GPU."""
    line: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in rank order; raises InputError naming the first invalid line."""
    hosts, problems = scan_hostfile(path)
    if problems:
        raise problems[0]
    return hosts


def scan_hostfile(path: Path) -> tuple[list[Host], list[InputError]]:
    """The hosts of a hostfile in order, and an error for every invalid line.

    The rule is that of DeepSpeed's launcher (`_parse_hostfile` in deepspeed/launcher/runner.py): lines end at \\n, \\r
    or \\r\\n; blank lines and those that begin with # are skipped; any other line begins with a name without spaces and
    `slots=` with digits, and the rest is ignored; names must be unique. We refuse four things that it accepts: a
    missing or irregular file (it trains on one machine), zero slots (no rank starts there), a name with characters that
    no host name has (it goes into shell commands), and a number of more than 9 digits.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            said = (
                "this hostfile cannot be read: it is not a regular file"
                if path.exists()
                else "there is no such hostfile"
            )
            raise InputError(said, "write one line per host: NAME slots=GPUS", path=path)
        text = path.read_text(encoding="utf-8")  # turns every line ending into \\n, as DeepSpeed does
    except (OSError, UnicodeDecodeError, InputError) as error:
        said = error.what if isinstance(error, InputError) else "this hostfile cannot be read"
        return [], [InputError(said, "write one line per host: NAME slots=GPUS", path=path)]
    hosts: list[Host] = []
    problems: list[InputError] = []
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or len(match[2]) > _MOST_DIGITS or int(match[2]) < 1 or not _NAME.fullmatch(match[1]):
            problem = InputError(f"{line[:60]!r} is not a host", "write `NAME slots=GPUS`", path=path, line=number)
        elif match[1] in {host.name for host in hosts}:
            problem = InputError(f"duplicate host {match[1]}", "give it one line", path=path, line=number)
        else:
            hosts.append(Host(match[1], int(match[2]), number))
            continue
        problems.append(problem)
    if not hosts and not problems:
        problems.append(InputError("this hostfile lists no hosts", "write `NAME slots=GPUS` for each", path=path))
    return hosts, problems


def addresses_of(name: str) -> set[str]:
    """The addresses of a host name; empty when it does not resolve."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def check_hosts(hosts: list[Host], path: Path, *, look_up: Callable[[str], set[str]] = addresses_of) -> None:
    """Raises EnvironmentFault for the first host whose name does not resolve on this machine."""
    for host in hosts:
        if not look_up(host.name):
            raise EnvironmentFault(
                f"the host name {host.name!r} does not resolve",
                "correct the name, or add it to DNS or /etc/hosts",
                path=path,
                line=host.line,
            )


def own_place(hosts: list[Host], path: Path) -> int:
    """This machine's index among the hosts, from 0; raises InputError when it is not one of them."""
    short = socket.gethostname().partition(".")[0]
    for index, host in enumerate(hosts):
        if host.name.partition(".")[0] == short or any(is_own(address) for address in addresses_of(host.name)):
            return index
    raise InputError(
        f"this host, {short}, is not one of the {len(hosts)} listed", "add it, or start on a listed host", path=path
    )


def is_own(address: str) -> bool:
    """Whether an address belongs to this machine (only such addresses can be bound)."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def check_here(host: Host, path: Path, *, gpus: int, port: int | None) -> None:
    """Raises InputError when the host has fewer GPUs than slots, EnvironmentFault when its port is in use.

    Without a GPU the slots are CPU ranks, and any number is fine; `port` is None except on the first host.
    """
    if 0 < gpus < host.slots:
        raise InputError(
            f"{host.name} has {gpus} GPU(s), not {host.slots}", f"write slots={gpus}", path=path, line=host.line
        )
    if port is None:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        why = "in use by another program" if error.errno == errno.EADDRINUSE else error.strerror
        raise EnvironmentFault(f"port {port} of {host.name} is {why}", "choose another --master_port") from error


def count_gpus() -> int:
    """Number of NVIDIA GPUs of this machine, counted without importing torch, which takes seconds."""
    return len([device for device in Path("/dev").glob("nvidia*") if device.name.removeprefix("nvidia").isdigit()])
