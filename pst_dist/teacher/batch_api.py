"""Requests and replies as files: the format of OpenAI's Batch API, which `vllm run-batch` reads and writes too.

Nothing is sent from here. `write_requests` lists what a job still has to ask, the user runs the file, and
`take_replies` puts the output into the journal, from where the job continues as after live requests. Format:
https://platform.openai.com/docs/api-reference/batch (request-input, request-output).
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pst_dist.errors import InputError, IntegrityError
from pst_dist.logs import progress
from pst_dist.storage.json_files import canonical_json, parse_json
from pst_dist.storage.outputs import output_path
from pst_dist.storage.regular_files import open_regular
from pst_dist.teacher.job import Job, due_requests
from pst_dist.teacher.journal import Journal
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.messages import Reply, Request, Usage
from pst_dist.teacher.reading import Again, read_answer
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.wire import NOT_ACCEPTED, body_of, failure_of, shown

log = logging.getLogger(__name__)

_PREFIX = "pst-"


def is_requests(head: bytes) -> bool:
    """Whether a file begins with a request that `write_requests` wrote."""
    return head.startswith(b'{"body":{') and b'"custom_id":"pst-' in head.partition(b"\n")[0]


def write_requests(job: Job, path: Path, journal: Journal, ledger: Ledger) -> tuple[int, str | None]:
    """Write every request that is due; returns their number and the cap that left out further ones.

    A prompt of two steps needs two rounds: its second request contains the first reply. With nothing to write, an
    earlier file is removed.
    """
    settings, cap = job.settings, None
    allowed: list[Request] = []
    for request in due_requests(job, journal.replies):
        cap = ledger.refused_by(request)
        if cap is not None:
            break
        ledger.begin(request)
        allowed.append(request)
    if not allowed:
        path.unlink(missing_ok=True)
        return 0, cap
    url = "/v1/chat/completions" if settings.api == "chat" else "/v1/completions"
    with output_path(path, is_requests) as partial, partial.open("w", encoding="utf-8") as stream:
        for request in allowed:
            body = body_of(settings, request) | settings.extra
            line = {"custom_id": custom_id(request.key), "method": "POST", "url": url, "body": body}
            stream.write(canonical_json(line) + "\n")
    return len(allowed), cap


def custom_id(key: str) -> str:
    """A request's name in the files: short, and without the characters that a question's id may have."""
    return _PREFIX + hashlib.sha256(key.encode()).hexdigest()[:32]


def take_replies(path: Path, job: Job, journal: Journal, ledger: Ledger) -> None:
    """Add the replies in a batch's output to the journal; those that are there already are skipped.

    A request that failed is asked again in the next round. Raises InputError, with its line, for what is no output of a
    batch, and for a file without any request of this job; EnvironmentFault for a full disk.
    """
    due = {custom_id(request.key): request for request in due_requests(job, journal.replies)}
    known = {custom_id(key) for key in journal.replies}
    counts: Counter[str] = Counter()
    refused: list[tuple[Request, str]] = []
    with open_regular(path) as stream, progress(f"read {path.name}", unit="replies") as bar:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            name, response, error = _parts(line, path, number)
            request = due.get(name)
            bar.advance()
            if request is None:
                counts["known" if name in known else "other"] += 1
                continue
            found = _reply(request, response, error, job.settings, ledger)
            if isinstance(found, Reply):
                _add(journal, ledger, request, found)
                due.pop(name)
                known.add(name)
                counts["taken"] += 1
                continue
            status, said = found
            if status in NOT_ACCEPTED:
                refused.append((request, f"{status}: {said}"))
                counts["taken"] += 1
            else:
                ledger.failed(str(status))
                counts["failed"] += 1
                log.debug("%s: %s: %s", path, status, said)
    if counts.keys() == {"other"}:
        remedy = "run the file that `--batch` writes, with the options of this command"
        raise InputError("none of its replies is to a request of this job", remedy, path=path)
    if refused and not ledger.requests:
        remedy = "see --omit and --extra for fields that the server does not know or needs"
        raise InputError(f"no request was accepted ({refused[0][1]})", remedy, path=path)
    for request, what in refused:
        _add(journal, ledger, request, Reply(text=what, finish="refused", usage=Usage(prompt=0, completion=0)))
    words = f"{counts['taken']:,} replies taken"
    words += f", {counts['known']:,} known already" if counts["known"] else ""
    words += f", {counts['other']:,} of other requests skipped" if counts["other"] else ""
    log.info("%s: %s", path, words)
    if counts["failed"]:
        log.warning("%s: %s requests failed and are asked again", path, f"{counts['failed']:,}")


def _add(journal: Journal, ledger: Ledger, request: Request, reply: Reply) -> None:
    journal.add(request.key, reply)
    ledger.add(reply)
    if journal.full is not None:
        raise journal.full


def _parts(line: bytes, path: Path, number: int) -> tuple[str, dict[str, Any], Any]:
    """(custom_id, response, error) of a line."""
    remedy = "--replies takes the output of a batch whose requests `--batch` wrote"
    try:
        row = parse_json(line, path)
    except IntegrityError as error:
        raise InputError(error.what, remedy, path=path, line=number) from error
    name = row.get("custom_id") if isinstance(row, dict) else None
    if not isinstance(name, str) or not {"response", "error"} & row.keys():
        raise InputError("is not a reply of a batch", remedy, path=path, line=number)
    response = row.get("response")
    return name, response if isinstance(response, dict) else {}, row.get("error")


def _reply(
    request: Request, response: dict[str, Any], error: Any, settings: TeachSettings, ledger: Ledger
) -> Reply | tuple[int | str, str]:
    """The reply, or status and reason of a failure."""
    body, status = response.get("body"), response.get("status_code")
    if "choices" in response:  # some servers write the answer itself
        body, status = response, 200
    body = body if isinstance(body, dict) else {}
    if error or status != 200:
        said = failure_of(error) or failure_of(body.get("error")) or "no reason given"
        code = error.get("code") if isinstance(error, dict) else None
        return status if isinstance(status, int) and status != 200 else str(code or "error"), shown(said)
    chat = settings.api == "chat"
    try:
        reply = read_answer(request, _view(body), chat=chat, estimated=ledger.estimated_usage, shown=shown)
    except Again as again:
        if again.reason != "empty":
            return again.reason, again.what
        reply = Reply(text="", finish="stop", usage=ledger.estimated_usage(request, ""))
    return replace(reply, usage=replace(reply.usage, prompt_bytes=request.prompt_bytes))


def _view(body: dict[str, Any]) -> Any:
    """The parts of an answer that are read, as attributes."""
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message, usage = first.get("message"), body.get("usage")
    view = {name: first.get(name) for name in ("text", "finish_reason")}
    view["message"] = SimpleNamespace(**message) if isinstance(message, dict) else None
    counted = SimpleNamespace(**usage) if isinstance(usage, dict) else None
    return SimpleNamespace(choices=[SimpleNamespace(**view)], usage=counted, error=body.get("error"))
