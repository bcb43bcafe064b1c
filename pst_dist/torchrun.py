"""`python -m pst_dist.torchrun …`: torchrun that ends with the exit code of the rank that failed first.

torchrun itself always ends with 1, but a batch script must distinguish "saved, run me again" (75) from a mistake (2)
and a lost peer (7). Arguments and everything else are torchrun's own; `pst_dist.train` is what the ranks run.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from pst_dist.errors import EnvironmentFault, PstError


def exit_code_of(rank_code: int) -> int:
    """An exit code as a shell reports it: 128 + number for a process that a signal ended (`-number` in Python)."""
    return 128 - rank_code if rank_code < 0 else rank_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; it does not forward SIGTERM when SIGTERM was ignored at its start.

    Returns 4, after printing one line, when the nodes did not find each other in time.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = get_args_parser()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN and "--signals-to-handle" in parser.format_help():
        words = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *words]
    options = parser.parse_args(words)
    if options.max_restarts:
        # Otherwise restarted ranks find the dead ranks' addresses in the store that they share with torchrun, and wait
        # for them (pytorch#135712).
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(options)
    except ChildFailedError as error:
        return exit_code_of(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, DistError) as error:
        reason = str(error).strip() or type(error).__name__
        print(f"pst: {_not_met(options.nnodes, options.rdzv_endpoint, reason)}", file=sys.stderr)  # noqa: T201
        return EnvironmentFault.exit_code
    return 0


def _not_met(nodes: str, endpoint: str, reason: str) -> PstError:
    return EnvironmentFault(
        f"{nodes} node(s) did not meet at {endpoint} ({reason.splitlines()[0][:160]})",
        "check that every node runs the same job and can reach that address and port",
    )


if __name__ == "__main__":
    sys.exit(main())
