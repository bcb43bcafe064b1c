"""Checks a hostfile of the deepspeed launcher before anything starts: `python -m pst_dist.hostfile FILE [PORT]`.

When the file is missing, the launcher silently trains on one machine; with `--no_ssh` it checks no name and waits
until a timeout for the ranks of a host that does not exist. So this command parses each line by DeepSpeed's rule,
resolves each name, and checks slots and port of the host on which it runs. It prints this host's index in the file and
the name of the first host, for the launcher's `--node_rank` and `--master_addr`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pst_dist.distributed.hostfile import DEFAULT_PORT, check_here, check_hosts, count_gpus, own_place, read_hostfile
from pst_dist.errors import PstError


def main() -> int:
    """Print `INDEX NAME`; returns 0, or the exit code of the error."""
    path, port = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT_PORT
    try:
        hosts = read_hostfile(path)
        check_hosts(hosts, path)
        place = own_place(hosts, path)
        check_here(hosts[place], path, gpus=count_gpus(), port=port if place == 0 else None)
    except PstError as error:
        print(f"pst: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    print(place, hosts[0].name)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
