"""What the ranks' watchers tell one another: where a rank is, that it leaves, and rank zero's verdict.

Messages come from other processes, so every field is checked before it is used. `peer_link` carries the lines,
`peer_watch` acts on what they say.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from pst_dist.distributed.peer_link import LinkClosed
from pst_dist.distributed.peer_verdict import Place, Verdict
from pst_dist.distributed.progress import note_work, place

_NONSENSE = "it does not speak our protocol"
"""Why a connection with an invalid message is closed."""


def standing(training_thread: int) -> dict[str, Any]:
    """The message that says where this rank is; `training_thread` is the identity of the thread that trains."""
    frame = sys._current_frames().get(training_thread)
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith("<"):
        frame = frame.f_back  # skip code without a file: the import machinery, generated functions
    file = frame.f_code.co_filename if frame else ""
    waiting = "/torch/distributed/" in file or "/deepspeed/" in file
    line = f"{os.path.basename(file)}:{frame.f_lineno}" if frame else ""
    note_work(waiting="/torch/distributed/" in file or "/deepspeed/comm/" in file)
    return {"place": list(place()), "waiting": waiting, "line": line}


def place_in(message: dict[str, Any]) -> tuple[Place, bool, str]:
    """A rank's place, whether it waits in a collective, and its line of code; raises LinkClosed when invalid."""
    there, waiting, line = message["place"], message.get("waiting"), message.get("line")
    if not (isinstance(there, list) and len(there) == len(Place._fields)):
        raise LinkClosed(_NONSENSE)
    section, step, entered, signs = there
    right = isinstance(section, str) and type(step) in (int, type(None)) and type(entered) is type(signs) is int
    if not (right and isinstance(waiting, bool) and isinstance(line, str)):
        raise LinkClosed(_NONSENSE)
    return Place(section, step, entered, signs), waiting, line


def farewell_in(message: dict[str, Any]) -> str | None:
    """The error with which a rank leaves, empty when its work is done; raises LinkClosed when it is invalid."""
    farewell = message["farewell"]
    if not isinstance(farewell, str | None):
        raise LinkClosed(_NONSENSE)
    return farewell


def verdict_in(fields: Any) -> Verdict:
    """The verdict that rank zero sent; raises LinkClosed when it is invalid."""
    kinds = {"rank": int, "host": str, "place": str, "reason": str, "hangs": bool}
    if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != kinds:
        raise LinkClosed(_NONSENSE)
    return Verdict(**fields)
