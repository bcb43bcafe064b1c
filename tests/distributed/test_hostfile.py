"""Before ranks meet: hostfiles that the deepspeed launcher trips over, busy ports, ranks that never come."""

import os
import random
import re
import socket
import subprocess
import sys

import pytest

from pst_dist.distributed import ranks
from pst_dist.distributed.hostfile import Host, check_here, check_hosts, own_place, read_hostfile
from pst_dist.distributed.ranks import Ranks, process_group
from pst_dist.errors import EnvironmentFault, InputError


@pytest.fixture
def write(tmp_path):
    """Writes a hostfile."""

    def write(text: str):
        path = tmp_path / "hostfile"
        path.write_text(text)
        return path

    return write


def test_hosts_are_read_in_the_order_of_their_ranks(write):
    path = write("# two machines\n\nn1 slots=8\nn2.cluster   slots=4 # half\n")
    assert read_hostfile(path) == [Host("n1", 8, 3), Host("n2.cluster", 4, 4)]


@pytest.mark.parametrize(
    "text, said",
    [
        ("n1 slots=8\nn2 slots=x\n", ":2: 'n2 slots=x' is not a host; write `NAME slots=GPUS`"),
        ("n1 slots=0\n", ":1: 'n1 slots=0' is not a host"),
        ("n1\n", ":1: 'n1' is not a host"),
        ("n1 slots=8\nn1 slots=8\n", ":2: duplicate host n1"),
        ("# nothing\n", ": this hostfile lists no hosts"),
    ],
)
def test_a_line_that_is_wrong_is_named(write, text, said):
    with pytest.raises(InputError) as refusal:
        read_hostfile(write(text))
    assert said in str(refusal.value)


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a;touch", "$(touch)", "a`b`", "a\x1bb", "a|b", "user'"])
def test_a_host_name_is_no_option_and_no_command(write, name):
    with pytest.raises(InputError, match="is not a host"):
        read_hostfile(write(f"{name} slots=2\n"))
    hosts = read_hostfile(write("node-1.example.org slots=2\n10.0.0.1 slots=1\nfe80::1 slots=1\n"))
    assert [host.slots for host in hosts] == [2, 1, 1]


def test_a_hostfile_that_is_not_there_is_refused_where_the_launcher_would_train_on_one_machine(tmp_path):
    with pytest.raises(InputError, match="there is no such hostfile"):
        read_hostfile(tmp_path / "nowhere")


def test_a_host_without_an_address_is_named_with_its_line(write):
    path = write("n1 slots=8\nghost slots=8\n")
    known = {"n1": {"10.77.0.11"}}
    with pytest.raises(EnvironmentFault, match=re.escape(":2: the host name 'ghost' does not resolve")):
        check_hosts(read_hostfile(path), path, look_up=lambda name: known.get(name, set()))


def test_this_host_finds_its_place_by_name_or_by_address(write):
    short = socket.gethostname().partition(".")[0]
    path = write(f"192.0.2.1 slots=1\n{short} slots=1\n")
    assert own_place(read_hostfile(path), path) == 1
    path = write("192.0.2.1 slots=1\n127.0.0.1 slots=1\n")
    assert own_place(read_hostfile(path), path) == 1
    path = write("192.0.2.1 slots=1\n")
    with pytest.raises(InputError, match="is not one of the 1 listed"):
        own_place(read_hostfile(path), path)


def test_more_slots_than_gpus_are_refused_and_cpu_ranks_are_not(write):
    path = write("n1 slots=8\n")
    (host,) = read_hostfile(path)
    with pytest.raises(InputError, match=re.escape("n1 has 4 GPU(s), not 8; write slots=4")):
        check_here(host, path, gpus=4, port=None)
    check_here(host, path, gpus=8, port=None)
    check_here(host, path, gpus=0, port=None)


def test_the_command_prints_place_and_address_or_one_line_and_its_code(write):
    path = write("127.0.0.1 slots=2\n")
    with socket.create_server(("", 0)) as busy:
        port = str(busy.getsockname()[1])
        command = [sys.executable, "-m", "pst_dist.hostfile", str(path), port]
        taken = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert taken.returncode == 4
    assert taken.stderr == (
        f"pst: error[ENVIRONMENT] port {port} of 127.0.0.1 is in use by another program; choose another --master_port\n"
    )
    free = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (free.returncode, free.stdout) == (0, "0 127.0.0.1\n"), free.stderr


@pytest.fixture
def meeting_place(monkeypatch):
    """Where ranks look for one another: a port of this machine."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)

    def at(port: int) -> None:
        monkeypatch.setenv("MASTER_PORT", str(port))

    return at


def test_a_port_that_is_in_use_is_one_line(meeting_place):
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        meeting_place(port)
        with (
            pytest.raises(EnvironmentFault, match=f"127.0.0.1 port {port} is in use by another program"),
            process_group(Ranks(0, 0, 2), with_deepspeed=True),
        ):
            pytest.fail("the ranks met")


def test_ranks_that_never_come_are_not_waited_for_for_ever(meeting_place, monkeypatch):
    monkeypatch.setattr(ranks, "SLOWER_THAN_THE_WATCH_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    meeting_place(port)
    with (
        pytest.raises(EnvironmentFault, match=f"the 2 ranks did not meet at 127.0.0.1 port {port} .*1/2"),
        process_group(Ranks(0, 0, 2), with_deepspeed=True, timeout_seconds=1),
    ):
        pytest.fail("the ranks met")


def random_hostfile(chance: random.Random) -> bytes:
    """A file of a few lines, most of them nearly right."""
    names = ["n1", "n2.cluster", "10.0.0.1", "fe80::1", "n1#x", "#n3", "ä", "\ufeffn1", "n\x001", "n 1", "", "slots=2"]
    gaps = [" ", "   ", "\t", "\u00a0", "\u3000", "\x0b", "\x1f", "", "\\"]
    slots = ["slots=8", "slots=0", "slots=-1", "slots=٣", "slots=²", "slots= 4", "SLOTS=4", "slots=4x", "slots=4.5"]
    slots += [
        "slots=007",
        "slots=4 # half",
        "slots=4#half",
        "max_slots=2",
        "slots=" + "9" * 5000,
        "slots=4 slots=5",
        "",
    ]
    ends = ["\n", "\r\n", "\r", "\n\n", "\u2028", "\x0c", "\x85", "\n# a comment\n", "\n \t\n", " \n"]
    usual = chance.random() < 0.5
    text = ""
    for number in range(chance.randrange(5)):
        plain = usual or chance.random() < 0.6
        name = f"host{number}" if plain and chance.random() < 0.9 else chance.choice(names)
        gap, count = (" ", "slots=4") if plain else (chance.choice(gaps), chance.choice(slots))
        text += chance.choice(["", "", " ", "\t"]) + name + gap + count + chance.choice(ends if not plain else ends[:4])
    content = text.encode()
    return content + b"\xff\n" if chance.random() < 0.02 else content


def refused_on_purpose(pool: dict[str, int]) -> bool:
    """What DeepSpeed accepts and we refuse, by the docstring of `scan_hostfile`."""
    unsafe = any(not re.fullmatch(r"[\w.:\[\]][\w.:\[\]-]*", name) for name in pool)
    return unsafe or any(slots == 0 or slots >= 10**9 for slots in pool.values())


def test_hostfiles_are_read_as_deepspeed_reads_them(tmp_path, monkeypatch):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    monkeypatch.setattr(runner.logger, "error", lambda *_: None)
    chance, path, read = random.Random(15), tmp_path / "hostfile", {"both": 0, "neither": 0, "deepspeed": 0}
    for _ in range(3000):
        path.write_bytes(random_hostfile(chance))
        try:
            theirs = dict(runner.fetch_hostfile(str(path)))
        except ValueError:  # UnicodeDecodeError and too many digits too
            theirs = None
        try:
            ours = {host.name: host.slots for host in read_hostfile(path)}
        except InputError:
            ours = None
        if ours is None and theirs is not None:
            assert refused_on_purpose(theirs), path.read_bytes()
            read["deepspeed"] += 1
        else:
            assert ours == theirs and list(ours or ()) == list(theirs or ()), path.read_bytes()
            read["neither" if ours is None else "both"] += 1
    assert min(read.values()) >= 100, f"the inputs are too much alike: {read}"


def test_a_hostfile_that_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            read_hostfile(path)
