"""`python -m pst_dist.torchrun …`: torchrun that ends with the exit code of the rank that failed first.

torchrun itself ends with 1 whatever its ranks said, and a batch script must tell "saved, run me again" (75) from a
mistake (2) and a lost peer (7). Arguments and everything else are torchrun's own; which ranks are started where is the
launcher's business, and what they do is `pst_dist.train`'s.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from pst_dist.errors import EnvironmentFault, PstError


def exit_code_of(rank_code: int) -> int:
    """A process's exit code as a shell gives it: 128 + number when a signal ended it (`-number` in Python)."""
    return 128 - rank_code if rank_code < 0 else rank_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun in this process; signals that were ignored when it started stay the ranks' own affair.

    Returns 4, after one line, when the nodes did not find one another in time.
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
        # Else ranks that are started again find the dead ones' addresses in the store that they share with torchrun,
        # and wait for them (pytorch#135712).
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
