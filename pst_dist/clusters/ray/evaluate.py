"""Evaluation on a Ray cluster: actors decode the batches, and this process scores.

The actors start with the first batch that has to be decoded, each with its own copy of the student, which must be on a
disk that all machines share. Batches are the same as in one process, and so are the answers. Latency is measured on an
actor, because this process may have no GPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.crew import Crew, Words, number_of_actors
from pst_dist.clusters.ray.gpus import settled_actors
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import Turns
from pst_dist.evaluation.batches import Batch, Done, Outcome, decode_batch
from pst_dist.evaluation.decoder import Place, answer_times, decodes_in_bf16, place_of, set_precision
from pst_dist.logs import Progress, progress
from pst_dist.student.saved import LoadedStudent, load_student

log = logging.getLogger(__name__)
_WORDS = Words("evaluate", "actor", "the student", "batches", "lower evaluate.batch_size, or set evaluate.batch_tokens")


class StudentActor:
    """A student in its own process."""

    def __init__(self, config: Config, folder: str, threads: int, on_gpu: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        self._config, self._folder, self._on_gpu = config, Path(folder), on_gpu
        self._loaded: LoadedStudent | None = None

    def ready(self) -> None:
        """Load the student (not in `__init__`, whose errors Ray turns into text); raises what that raises."""
        if self._loaded is None:
            self._loaded = load_student(self._folder, None if self._on_gpu else "cpu")
            set_precision(self._config, self._loaded)

    def decode(self, batch: Batch) -> Outcome:
        """One batch."""
        return decode_batch(self._student, self._config.evaluate, batch)

    def times(self, questions: Sequence[str | Turns], think_below: float) -> list[float]:
        """`answer_times` of this actor."""
        return answer_times(self._config, self._student, questions, think_below)

    def place(self) -> Place:
        """Its device."""
        return place_of(self._student)

    @property
    def _student(self) -> LoadedStudent:
        self.ready()
        assert self._loaded is not None
        return self._loaded


class OnRay:
    """An executor on the cluster of `evaluate.ray`, or where that names none, of `train.ray`; a context manager."""

    device: str | None = "cpu"

    def __init__(self, config: Config) -> None:
        ray = config.evaluate.ray
        self._config = config
        self._settings = ray.model_copy(update={"address": ray.address or config.train.ray.address})
        self._stack = contextlib.ExitStack()
        self._ray: Any = None
        self._crew: Crew[int] | None = None
        self._todo: Sequence[Batch] = ()

    def __enter__(self) -> OnRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def may_use_bf16(self, config: Config, student: LoadedStudent) -> tuple[bool, ...]:
        """Both for `auto` and a student trained in bfloat16: only the cluster knows whether actors have GPUs."""
        return tuple(sorted({decodes_in_bf16(config, student, device) for device in ("cpu", "cuda")}))

    def place(self, config: Config, student: LoadedStudent) -> Place:
        """The device of an actor."""
        found: Place = self._ask("starting", lambda handle: handle.place.remote())
        return found

    def run(
        self, config: Config, student: LoadedStudent, todo: Sequence[Batch], done: Done | None, bar: Progress
    ) -> Iterator[tuple[int, Outcome]]:
        """(place, outcome) of each batch, in the order in which actors finish.

        Raises EnvironmentFault when the cluster has no room, PeerLostError when actors keep dying, and any PstError of
        an actor.
        """
        found: list[tuple[int, Outcome]] = []

        def tell(k: int, outcome: Outcome) -> None:
            if done is not None:
                done.put(todo[k], outcome)
            bar.advance(len(todo[k].questions))
            found.append((k, outcome))

        crew, self._todo = self._started(), todo
        count = number_of_actors(self._settings, self._ray.cluster_resources(), len(todo), _WORDS, "evaluate.ray")
        gpus = self._settings.num_gpus_per_actor
        each = f" with {gpus:g} GPU each" if gpus else ""
        log.info("evaluate: %d batches on %d Ray actors%s", len(todo), count, each)
        crew.grow(count)
        crew.work(range(len(todo)), tell, bar)
        yield from found

    def times(
        self, config: Config, student: LoadedStudent, questions: Sequence[str | Turns], think_below: float
    ) -> list[float]:
        """`answer_times` of one actor."""
        found: list[float] = self._ask(
            "measuring latency", lambda handle: handle.times.remote(list(questions), think_below)
        )
        return found

    def _ask(self, what: str, call: Any) -> Any:
        crew = self._started()
        with progress(f"evaluate {self._config.arm}: {what} on Ray", unit="answers") as bar:
            found = crew.ask(call, lambda: bar.advance(0, "waiting for an actor"))
            bar.advance()
        return found

    def _started(self) -> Crew[int]:
        """The crew; when first called, connects to the cluster and starts one actor."""
        if self._crew is not None:
            return self._crew
        ray = self._ray = self._stack.enter_context(ray_cluster(self._settings))
        resources = ray.cluster_resources()
        settings = self._settings = settled_actors(self._settings, resources)
        gpus, count = settings.num_gpus_per_actor or 0, number_of_actors(settings, resources, 1, _WORDS, "evaluate.ray")
        actor_class = ray.remote(
            num_cpus=settings.num_cpus_per_actor, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )(StudentActor)
        folder, threads = str(run_dir(self._config).best.absolute()), max(1, int(settings.num_cpus_per_actor))
        self._crew = Crew[int](
            ray,
            lambda: actor_class.remote(self._config, folder, threads, bool(gpus)),
            count,
            _WORDS,
            call=lambda handle, k: handle.decode.remote(self._todo[k]),
            name_of=lambda k: f"batch {k}",
        )
        self._stack.callback(self._crew.dismiss)
        return self._crew
