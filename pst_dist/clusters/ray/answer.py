"""Answer windows of questions on a Ray cluster: `ray.data` with one student per actor.

The driver writes the questions to a file next to the output; an item of the dataset is only the position of a window in
that file, so millions of questions take little memory. Questions, output and student must be on a disk that all
machines share. Ray places the actors, restarts lost ones and repeats their windows. The answers are those of one
process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist import errors
from pst_dist.answering.windows import Answerer, AnswerSettings, answer_window
from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.gpus import room_for, settled_actors
from pst_dist.config.schema import RayConfig
from pst_dist.data.sample import Turns
from pst_dist.errors import EnvironmentFault, PeerLostError, PstError, first_line
from pst_dist.logs import Progress
from pst_dist.storage.atomic import disk_errors
from pst_dist.student.answer import Answer

if TYPE_CHECKING:
    from pst_dist.student.saved import LoadedStudent

log = logging.getLogger(__name__)
_MOST_BLOCKS = 10_000


class WindowActor:
    """A student in its own process."""

    def __init__(self, student: str, questions: str, settings: AnswerSettings, config: RayConfig) -> None:
        self._folder, self._questions, self._settings, self._config = student, questions, settings, config
        self._loaded: LoadedStudent | None = None

    def _student(self) -> LoadedStudent:
        """The student; not loaded in `__init__`, whose errors Ray turns into text."""
        if self._loaded is None:
            import torch

            from pst_dist.student.saved import load_student

            torch.set_num_threads(max(1, int(self._config.num_cpus_per_actor)))
            self._loaded = load_student(Path(self._folder), None if self._config.num_gpus_per_actor else "cpu")
        return self._loaded

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One window: {"offset": [first byte], "bytes": [length]} -> {"answers": [JSON], "error": [JSON or ""]}.

        A PstError is returned and not raised: Ray Data would keep only its text, inside others.
        """
        try:
            return {"answers": [self._answers(int(batch["offset"][0]), int(batch["bytes"][0]))], "error": [""]}
        except PstError as error:
            place = None if error.path is None else str(error.path)
            fault = [type(error).__name__, error.what, error.remedy, place, error.line]
            return {"answers": [""], "error": [json.dumps(fault)]}

    def _answers(self, offset: int, size: int) -> str:
        """The answers of a window, as JSON."""
        try:
            with open(self._questions, "rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise EnvironmentFault(
                f"cannot be read on this node: {error.strerror}",
                "put output and student on a disk that all machines share",
                path=self._questions,
            ) from error
        questions = [_question(json.loads(line)) for line in content.splitlines()]
        answers = answer_window(self._student(), questions, self._settings)
        return json.dumps([asdict(answer) for answer in answers])


def _question(value: Any) -> str | Turns:
    """A question from its JSON; turns are lists there."""
    return value if isinstance(value, str) else tuple((role, text) for role, text in value)


def on_ray(student: Path, output: Path, settings: AnswerSettings, config: RayConfig) -> Answerer:
    """An answerer on the cluster of `config`, for a student's folder; writes `OUTPUT.questions` while it works.

    Its iterator raises EnvironmentFault when the cluster cannot be reached, has no room or does not see the files,
    PeerLostError when actors keep dying, and any PstError of an actor.
    """
    questions = output.absolute().with_name(f"{output.name}.questions")

    def answer(windows: Iterator[list[str | Turns]], bar: Progress) -> Iterator[list[Answer]]:
        try:
            places = _write_questions(questions, windows)
            with ray_cluster(config) as ray:
                for answers in _answered(ray, student.absolute(), questions, places, settings, config):
                    bar.advance(len(answers))
                    yield answers
        finally:
            questions.unlink(missing_ok=True)

    return answer


def _write_questions(path: Path, windows: Iterator[list[str | Turns]]) -> list[dict[str, int]]:
    """Write the questions, one JSON value per line; returns the place of each window."""
    places: list[dict[str, int]] = []
    with disk_errors(path), path.open("wb") as stream:
        for window in windows:
            content = "".join(json.dumps(text) + "\n" for text in window).encode()
            places.append({"offset": stream.tell(), "bytes": len(content)})
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return places


def _answered(
    ray: Any, student: Path, questions: Path, places: list[dict[str, int]], settings: AnswerSettings, config: RayConfig
) -> Iterator[list[Answer]]:
    import ray.data as data

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    config = settled_actors(config, ray.cluster_resources())
    actors = number_of_actors(config, ray.cluster_resources(), len(places))
    log.info("answer: %d windows on %d Ray actors with %g GPU each", len(places), actors, config.num_gpus_per_actor)
    dataset = data.from_items(places, override_num_blocks=min(len(places), _MOST_BLOCKS)).map_batches(
        WindowActor,
        batch_size=1,
        concurrency=actors,
        num_cpus=config.num_cpus_per_actor,
        num_gpus=config.num_gpus_per_actor or None,
        fn_constructor_args=(str(student), str(questions), settings, config),
    )
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise _fault(json.loads(row["error"]))
            yield [Answer(**found) for found in json.loads(row["answers"])]
    except ray.exceptions.RayError as error:
        raise PeerLostError(
            f"an actor failed ({first_line(error, 160)})", "look for out-of-memory errors in Ray's logs; run again"
        ) from error


def _fault(fields: list[Any]) -> PstError:
    """The error of an actor, of the class that it had there."""
    name, what, remedy, path, line = fields
    kind: type[PstError] = getattr(errors, name, PstError)
    return kind(what, remedy, path=path, line=line)


def number_of_actors(config: RayConfig, resources: dict[str, float], windows: int) -> int:
    """The number of actors to start, limited by the cluster and the windows; raises EnvironmentFault when none fits."""
    room = room_for(config, resources, "an actor", "ray")
    return min(config.num_actors or room, room, windows)
