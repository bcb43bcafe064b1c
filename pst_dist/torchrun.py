"""`python -m pst_dist.torchrun …`: torchrun that ends with the exit code of the rank that failed first.

torchrun itself always ends with 1, but a batch script must distinguish "saved, run me again" (75) from a mistake (2)
and a lost peer (7). Arguments and everything else are torchrun's own; `pst_dist.train` is what the ranks run.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

from pst_dist.errors import EnvironmentFault, PstError


def exit_code_of(rank_code: int) -> int:
    """An exit code as a shell reports it: 128 + number for a process that a signal ended (`-number` in Python)."""
    return 128 - rank_code if rank_code < 0 else rank_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; it does not forward SIGTERM when SIGTERM was ignored at its start.

    Returns 4, after printing one line, when the nodes did not find each other in time. One line also names the rank
    that failed first, if it ended without one of its own.
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
        rank, failure = error.get_first_failure()
        if failure.exitcode not in _TOLD:
            where = options.log_dir if options.redirects != "0" and options.log_dir else "its lines above"
            print(f"pst: {_ended(rank, failure.pid, failure.exitcode, where)}", file=sys.stderr)  # noqa: T201
        return exit_code_of(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, DistError) as error:
        reason = str(error).strip() or type(error).__name__
        print(f"pst: {_not_met(options.nnodes, options.rdzv_endpoint, reason)}", file=sys.stderr)  # noqa: T201
        return EnvironmentFault.exit_code
    return 0


_TOLD = {error.exit_code for error in PstError.__subclasses__()} | {130}
"""Exit codes of ranks that have said in one line what was wrong, or were interrupted."""


def _ended(rank: int, process: int, code: int, where: str) -> str:
    """What to say of the rank that failed first, which says nothing itself when a signal ends it."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", which is mostly the kernel when memory runs out: see dmesg" if name == "SIGKILL" else ""
        how = f"was ended by {name}{memory}"
    else:
        how = f"ended with exit code {code}"
    who = f"rank {rank} (process {process} on {socket.gethostname()})"
    return f"{who} {how}; see {where}. torchrun ended the other ranks; the same command resumes"


def _not_met(nodes: str, endpoint: str, reason: str) -> PstError:
    return EnvironmentFault(
        f"{nodes} node(s) did not meet at {endpoint} ({reason.splitlines()[0][:160]})",
        "check that every node runs the same job and can reach that address and port",
    )


if __name__ == "__main__":
    sys.exit(main())
