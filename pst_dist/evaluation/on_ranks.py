"""Evaluation on the ranks of a launcher: `torchrun --nproc_per_node 8 -m pst_dist evaluate RUN`.

Rank zero scores, and sends all ranks the batches that have to be decoded; each of n ranks decodes every n-th. Batches
are sorted by length, so the shares take about the same time. An error on any rank ends all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.distributed.peer_watch import watched
from pst_dist.distributed.progress import alive, at, working
from pst_dist.distributed.ranks import Ranks, check_same_software, device_of, from_main, gathered, together
from pst_dist.evaluation.batches import Batch, Done, Outcome, decode_batch
from pst_dist.evaluation.decoder import Executor, InProcess, set_precision
from pst_dist.logs import Progress
from pst_dist.student.saved import LoadedStudent, load_student

log = logging.getLogger(__name__)


class OnRanks(InProcess):
    """The executor of rank zero; latency is measured there."""

    def __init__(self, ranks: Ranks) -> None:
        self.device, self._ranks, self._apart = str(device_of(ranks)), ranks, False

    def run(
        self, config: Config, student: LoadedStudent, todo: Sequence[Batch], done: Done | None, bar: Progress
    ) -> Iterator[tuple[int, Outcome]]:
        """(place, outcome) of each batch; raises on every rank what any rank raises."""
        log.info("%d batches on %d ranks", len(todo), self._ranks.world_size)

        def tell(batch: Batch, note: str) -> None:
            bar.advance(0 if note else len(batch.questions), note)

        self._apart = True  # until the share is done everywhere, no rank listens
        from_main((list(todo), done))
        outcomes = _share(self._ranks, lambda: student, config, todo, done, tell)
        self._apart = False
        for rank, one in enumerate(outcomes):
            for k, outcome in one.items():
                if rank != self._ranks.rank:
                    bar.advance(len(todo[k].questions))
                yield k, outcome

    def end(self, failure: BaseException | None) -> None:
        """Send the other ranks home, with the failure of this one if there is any."""
        if not self._apart:
            from_main(failure)


def evaluate_on_ranks(
    ranks: Ranks, config: Config, score: Callable[[Executor | None], dict[str, Any]]
) -> dict[str, Any] | None:
    """What `score` returns with the ranks of this process group as its executor; None on all ranks but zero.

    A single rank scores without them. Raises on every rank what any rank raises, and PeerLostError, which names the
    rank, when one is lost or hangs for `train.timeout_seconds`.
    """
    if ranks.world_size == 1:
        return score(None)
    with watched(ranks, config.train.timeout_seconds, run_dir(config).stacks):
        check_same_software()
        if ranks.is_main:
            return _lead(ranks, score)
        _follow(ranks, config)
        return None


def _lead(ranks: Ranks, score: Callable[[Executor | None], dict[str, Any]]) -> dict[str, Any]:
    """Score, and send the other ranks home however that ends."""
    executor = OnRanks(ranks)
    at("scoring")
    try:
        with working():
            results = score(executor)
    except Exception as error:
        executor.end(error)
        raise
    executor.end(None)
    return results


def _follow(ranks: Ranks, config: Config) -> None:
    """Decode a share of every list of batches that rank zero sends, until it sends none."""
    loaded: list[LoadedStudent] = []

    def student() -> LoadedStudent:
        if not loaded:
            with working():
                loaded.append(load_student(run_dir(config).best, str(device_of(ranks))))
            set_precision(config, loaded[0])
        return loaded[0]

    while True:
        at("waiting for batches")
        order = from_main(None)
        if isinstance(order, Exception):
            raise order
        if order is None:
            return
        todo, done = order
        _share(ranks, student, config, todo, done, lambda batch, note: None)


def _share(
    ranks: Ranks,
    student: Callable[[], LoadedStudent],
    config: Config,
    todo: Sequence[Batch],
    done: Done | None,
    tell: Callable[[Batch, str], None],
) -> list[dict[int, Outcome]]:
    """Decode this rank's batches; returns the outcomes of every rank by place in `todo`, in rank order."""
    own: dict[int, Outcome] = {}
    at("decoding")
    with together(ranks):
        for k in range(ranks.rank, len(todo), ranks.world_size):
            batch = todo[k]

            def told(count: int, batch: Batch = batch) -> None:
                alive()
                tell(batch, f"{count} tokens of this batch")

            own[k] = decode_batch(student(), config.evaluate, batch, told)
            if done is not None:
                done.put(batch, own[k])
            tell(batch, "")
    at("collecting")
    return gathered(own)
