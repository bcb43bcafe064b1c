"""A hostfile of the deepspeed launcher, looked at before anything starts: `python -m pst_dist.hostfile FILE [PORT]`.

The launcher trains on one machine without a word when the file is not there, and with `--no_ssh` it believes every
name: ranks on a host that does not exist are waited for until a timeout. So each line is read by the same rule as
DeepSpeed's, each name is looked up, and on the host where it is asked its slots and the port are tried. Prints this
host's place in the file and the address of the first one, which the launcher wants as `--node_rank` and
`--master_addr`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pst_dist.distributed.hostfile import DEFAULT_PORT, check_here, check_hosts, count_gpus, own_place, read_hostfile
from pst_dist.errors import PstError


def main() -> int:
    """Print `PLACE ADDRESS`; the exit code is that of what is wrong."""
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
