"""Two hosts on one machine: network namespaces n1 and n2 with addresses of their own, joined by a bridge.

A test runs a program inside (`subprocess.run(boxed(…))`); everything made there, down to the last process, ends with
it. The program starts commands as if on a host (`on_host`), and pulls the cable of one. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess

_HOSTS = r"""
set -eu
ip link set lo up
mount -t tmpfs tmpfs /run && mkdir /run/netns
ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up
hosts=$(mktemp) && trap 'rm -f "$hosts"' EXIT
printf '127.0.0.1 localhost\n10.77.0.1 %s\n' "$(hostname -s)" >"$hosts"
for i in 1 2; do
  printf '10.77.0.1%s n%s\n' "$i" "$i" >>"$hosts"
  ip netns add "n$i" && ip link add "v$i" type veth peer name eth0 netns "n$i" && ip link set "v$i" master br0 up
  ip -n "n$i" link set lo up && ip -n "n$i" addr add "10.77.0.1$i/24" dev eth0 && ip -n "n$i" link set eth0 up
  ip -n "n$i" route add default via 10.77.0.1
done
mount --bind "$hosts" /etc/hosts
"$@"
"""
"""Makes n1 = 10.77.0.11 and n2 = 10.77.0.12 in the namespaces that it runs in."""
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


def boxed(*command: str) -> list[str]:
    """A command line that runs `command` beside the two hosts."""
    box = ["unshare", "-n", "-m", "-p", "--fork", "--mount-proc", "--kill-child", "bash", "-c", _HOSTS, "bash"]
    return [*box, *command]


def hosts_can_be_made() -> bool:
    """Whether this user may make network namespaces here."""
    if os.geteuid() != 0 or any(shutil.which(program) is None for program in ("unshare", "nsenter", "ip")):
        return False
    return subprocess.run(boxed("true"), capture_output=True, timeout=30).returncode == 0


def on_host(name: str, *command: str) -> list[str]:
    """A command line that runs `command` on a host, among processes of its own; killing it is a loss of power."""
    # bash is the host's first process: it reaps what daemons leave behind.
    enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "-u", "-p", "-m", "--fork", "--mount-proc"]
    return [*enter, "--kill-child", "bash", "-c", 'hostname "$0"; "$@" & wait $!', name, *command]


def enter_host(name: str) -> None:
    """Move this process to a host: its network, and its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as network:
        if libc.setns(network.fileno(), _CLONE_NEWNET) != 0 or libc.unshare(_CLONE_NEWUTS) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    socket.sethostname(name)


def pull_cable(name: str) -> None:
    """Cut a host off: what is sent to it and by it is lost without a word."""
    subprocess.run(["ip", "link", "set", f"v{name[1:]}", "down"], check=True)


def plug_cable(name: str) -> None:
    """Join a host again."""
    subprocess.run(["ip", "link", "set", f"v{name[1:]}", "up"], check=True)
