"""Hostfiles of the deepspeed launcher: read by its own rule, each host looked up, slots and port tried.

When the file is missing the launcher silently trains on one machine, and with `--no_ssh` it checks no name: it waits
for the ranks of a host that does not exist until a timeout.
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
"""What torchrun and the deepspeed launcher take for the first host when nothing is said."""
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_MOST_DIGITS = 9
_NAME = re.compile(r"[\w.:\[\]][\w.:\[\]-]*")
"""A name goes into commands for ssh and the shell: letters, digits, dots, dashes, and what IPv6 addresses need."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """Ranks to start there: as many as it has GPUs."""
    line: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in the order of their ranks; raises InputError naming the first line that is wrong."""
    hosts, problems = scan_hostfile(path)
    if problems:
        raise problems[0]
    return hosts


def scan_hostfile(path: Path) -> tuple[list[Host], list[InputError]]:
    """The hosts of a hostfile in their order, and every line that is wrong.

    The rule is that of DeepSpeed's launcher (`_parse_hostfile` in deepspeed/launcher/runner.py): lines end at \\n, \\r
    or \\r\\n; blank lines and those that begin with # are passed over; any other begins with a name without spaces and
    `slots=` with digits, and whatever follows these is ignored; no name comes twice. Four things that it accepts are
    problems here: a missing or irregular file (it trains on one machine), no slots (no rank starts there), a name
    that no host has (it goes into shell commands), and a number of more than 9 digits.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            said = (
                "this hostfile cannot be read: it is not a regular file"
                if path.exists()
                else "there is no such hostfile"
            )
            raise InputError(said, "a line a host: NAME slots=GPUS", path=path)
        text = path.read_text(encoding="utf-8")  # turns every line ending into \\n, as DeepSpeed's reading does
    except (OSError, UnicodeDecodeError, InputError) as error:
        said = error.what if isinstance(error, InputError) else "this hostfile cannot be read"
        return [], [InputError(said, "a line a host: NAME slots=GPUS", path=path)]
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
            problem = InputError(f"{match[1]} is listed twice", "give it one line", path=path, line=number)
        else:
            hosts.append(Host(match[1], int(match[2]), number))
            continue
        problems.append(problem)
    if not hosts and not problems:
        problems.append(InputError("this hostfile names no host", "write `NAME slots=GPUS` for each", path=path))
    return hosts, problems


def addresses_of(name: str) -> set[str]:
    """The addresses of a name; empty when nobody knows it."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def check_hosts(hosts: list[Host], path: Path, *, look_up: Callable[[str], set[str]] = addresses_of) -> None:
    """Raises EnvironmentFault for the first host that this machine does not know by that name."""
    for host in hosts:
        if not look_up(host.name):
            raise EnvironmentFault(
                f"no address is known for the host {host.name!r}",
                "correct its name, or make it known to DNS or /etc/hosts",
                path=path,
                line=host.line,
            )


def own_place(hosts: list[Host], path: Path) -> int:
    """Which of the hosts this machine is, from 0; raises InputError when it is none of them."""
    short = socket.gethostname().partition(".")[0]
    for index, host in enumerate(hosts):
        if host.name.partition(".")[0] == short or any(is_own(address) for address in addresses_of(host.name)):
            return index
    raise InputError(f"this host, {short}, is none of the {len(hosts)} in it", "add it, or start elsewhere", path=path)


def is_own(address: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound to."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def check_here(host: Host, path: Path, *, gpus: int, port: int | None) -> None:
    """Raises InputError when the host has fewer GPUs than slots, EnvironmentFault when its port is taken.

    Without any GPU its slots are CPU ranks, as many as one likes; `port` is None but on the first host.
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
    """NVIDIA GPUs of this machine, without the seconds that torch takes to say so."""
    return len([device for device in Path("/dev").glob("nvidia*") if device.name.removeprefix("nvidia").isdigit()])
