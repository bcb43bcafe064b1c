"""Checks what ranks need to find each other: a free port, a reachable host name, a valid hostfile."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

from pst_dist.diagnostics.machine.findings import Finding, ok, problem, warning
from pst_dist.distributed.hostfile import DEFAULT_PORT, addresses_of, is_own, scan_hostfile


def port(environment: Mapping[str, str]) -> list[Finding]:
    """Check that rank zero could listen at MASTER_PORT, when this machine is (or may be) its host."""
    given = environment.get("MASTER_PORT")
    if given is not None and not (given.isdecimal() and 0 <= int(given) < 65536):
        return [problem("port", f"MASTER_PORT={given!r} is not a port", "choose a number from 1024 to 32767")]
    number = int(given) if given is not None else DEFAULT_PORT
    address = environment.get("MASTER_ADDR")
    if address is not None:
        try:
            places = {found[4][0] for found in socket.getaddrinfo(address, None)}
        except OSError as error:
            return [
                problem("port", f"MASTER_ADDR={address} does not resolve ({error.strerror})", "unset or correct it")
            ]
        if not any(is_own(str(place)) for place in places):
            return [ok("port", f"rank zero's host is {address}, not this machine")]
    if _is_free(number):
        return [ok("port", f"{number} is free")]
    if given is None:
        return [
            warning(
                "port",
                f"{number}, the launchers' default, is in use",
                "use torchrun --standalone, which finds a free port, or give --master_port",
            )
        ]
    return [
        problem(
            "port",
            f"MASTER_PORT {number} is in use: rank zero could not listen there",
            "stop the program that uses it (`ss -ltnp`), or choose another port",
        )
    ]


def _is_free(number: int) -> bool:
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # Bind as the rendezvous store does: a port in TIME_WAIT counts as free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", number))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
    return True


def host_name(nodes: int) -> list[Finding]:
    """Check that this machine's name resolves to an address that other machines can reach."""
    name = socket.gethostname()
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(name, None)}
    except OSError as error:
        what, remedy = f"{name} does not resolve ({error.strerror})", f"add it to DNS or /etc/hosts: ADDRESS {name}"
        return [problem("host name", what, remedy) if nodes > 1 else warning("host name", what, remedy)]
    reachable = [address for address in sorted(found) if not ipaddress.ip_address(address).is_loopback]
    if reachable:
        return [ok("host name", f"{name} resolves to {', '.join(reachable)}")]
    what = f"{name} resolves to {', '.join(sorted(found))}, which other machines cannot reach"
    remedy = "put its address in /etc/hosts, or set MASTER_ADDR and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    return [problem("host name", what, remedy) if nodes > 1 else ok("host name", f"{what}: fine for one node")]


def hostfile(path: Path, room_here: int) -> list[Finding]:
    """Check a hostfile of the deepspeed launcher (one line `host slots=N` per host).

    Hosts must resolve and be unique, and this host must have enough slots. Other hosts' slots cannot be checked here;
    `room_here` is the number of GPUs, or else of cores, of this host.
    """
    hosts, problems = scan_hostfile(path)
    findings = [problem("hostfile", f"{error.where}: {error.what}", error.remedy) for error in problems]
    for host in hosts:
        where = f"{path}:{host.line}"
        addresses = addresses_of(host.name)
        if not addresses:
            what = f"{where}: the host name {host.name!r} does not resolve"
            findings.append(problem("hostfile", what, "correct the name, or add it to DNS or /etc/hosts"))
        elif any(map(is_own, addresses)) and host.slots > room_here:
            what = f"{where}: {host.slots} slots, but this host has room for {room_here}"
            findings.append(problem("hostfile", what, f"write slots={room_here}"))
    return findings or [ok("hostfile", f"{len(hosts)} host(s), {sum(host.slots for host in hosts)} slots")]
