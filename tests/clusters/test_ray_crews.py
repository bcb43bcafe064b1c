"""Crews of actors on a real local Ray cluster that serves the file: they answer, and teach, as one process does.

The errors of actors are one line, and a replica that is killed in the middle is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo
from evaluated import make_run
from tiny import ROWS, fitted

from pst_dist.answering.files import AnswerJob, answer_file
from pst_dist.answering.windows import AnswerSettings
from pst_dist.clusters.ray.answer import number_of_actors, on_ray
from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.crew import Crew
from pst_dist.clusters.ray.teach import number_of_replicas, ray_teacher
from pst_dist.config.loading import load_config
from pst_dist.config.schema import RayConfig
from pst_dist.errors import EnvironmentFault, PstError
from pst_dist.evaluation.evaluate import evaluate
from pst_dist.pipeline import make_scores
from pst_dist.storage.json_files import read_lines
from pst_dist.student.saved import load_student
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.teach import teach

pytest.importorskip("ray", reason="needs ray")
pytestmark = pytest.mark.ray
SETTINGS = AnswerSettings(explain=True, confidence=True, batch_size=2, max_new_tokens=24)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Each test finds this process connected, and keeps that cluster."""
    with ray_cluster(RayConfig()):
        yield


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_write_the_bytes_of_one_process_and_their_errors_are_ours(tmp_path, cluster):
    fitted("pst").save(tmp_path / "best")
    student = load_student(tmp_path / "best", "cpu")
    questions = tmp_path / "q.jsonl"
    rows = [{"id": n, "question": ROWS[n % 4].question + " " * (n % 3)} for n in range(70)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    answer_file(AnswerJob(str(questions), str(alone), settings=SETTINGS), student)
    config = RayConfig(num_actors=2)
    ray = on_ray(tmp_path / "best", together, SETTINGS, config)
    answer_file(AnswerJob(str(questions), str(together), settings=SETTINGS), student, answerer=ray)
    assert together.read_bytes() == alone.read_bytes()
    assert not (tmp_path / "together.jsonl.questions").exists()
    broken = on_ray(tmp_path / "no_student", tmp_path / "c.jsonl", SETTINGS, RayConfig(num_actors=1))
    with pytest.raises(PstError) as caught:
        answer_file(AnswerJob(str(questions), str(tmp_path / "c.jsonl"), settings=SETTINGS), student, answerer=broken)
    assert "\n" not in str(caught.value) and "no_student" in str(caught.value)
    assert not (tmp_path / "c.jsonl.questions").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_score_as_one_process_does_and_a_lost_one_is_replaced(tmp_path, cluster, monkeypatch):
    settings = {"batch_size": 1, "latency_rows": 2, "backend": "ray", "ray": {"num_actors": 2}}
    here, there = make_run(tmp_path / "here", **settings), make_run(tmp_path / "there", **settings)
    alone, told = evaluate(here), []
    decode = Crew.work

    def kill_the_first(crew, todo, tell, bar):
        def tell_and_kill(item, result):
            if not told:
                crew._ray.kill(next(iter(crew._members)).handle)
            told.append(item)
            tell(item, result)

        decode(crew, todo, tell_and_kill, bar)

    monkeypatch.setattr(Crew, "work", kill_the_first)
    results = make_scores(there)
    assert len(told) == 6 + 6 + 6 and results["milliseconds_to_answer"]["rows"] == 2
    own = [Path(run.output_dir, "eval", "test", "samples.jsonl").read_bytes() for run in (here, there)]
    assert own[0] == own[1]
    timed = {"milliseconds_to_answer", "rows_per_second"}
    assert {k: v for k, v in results.items() if k not in timed} == {k: v for k, v in alone.items() if k not in timed}
    told.clear()
    assert make_scores(there) == results and not told, "a finished evaluation starts no actor"


def test_a_cluster_without_room_says_what_it_lacks():
    assert number_of_actors(RayConfig(), {"CPU": 8.0}, 3) == 3
    assert number_of_actors(RayConfig(num_actors=2), {"CPU": 8.0}, 30) == 2
    with pytest.raises(EnvironmentFault, match=r"an actor needs 1 CPU, 1 GPU, the cluster has 8 CPU, 0 GPU"):
        number_of_actors(RayConfig(num_gpus_per_actor=1), {"CPU": 8.0}, 3)


def texts(output: Path) -> dict[str, str]:
    journal = output.with_name(output.stem + ".teach") / "journal.jsonl"
    return {line["key"]: line["text"] for line in read_lines(journal) if "key" in line}


def test_replicas_write_what_one_process_writes_and_a_lost_one_is_replaced(tmp_path, cluster):
    folder = zoo.make("llama3", tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": n + 1}) + "\n" for n in range(24)))
    template = tmp_path / "short.txt"
    template.write_text("{question}")
    config = load_config(None, [f"data.train={rows}", "data.answer_type=number"])
    shared = {
        "teacher_model": str(folder),
        "prompts": (str(template),),
        "reply_tokens": 6,
        "temperature": 1.0,
        "concurrency": 4,
    }
    alone = TeachSettings(output=tmp_path / "alone.jsonl", **shared)
    teach(config, alone)
    spread = TeachSettings(output=tmp_path / "spread.jsonl", **shared)
    ray_config = RayConfig(num_actors=2, num_cpus_per_actor=0.5)
    with ray_teacher(ray_config) as make:

        def make_and_kill(settings, ledger):
            teacher = make(settings, ledger)
            first, ask = teacher._lanes[0], teacher._batcher.ask
            count = 0

            async def counted(request):
                nonlocal count
                count += 1
                if count == 12:
                    first._ray.kill(first._actor)  # as an out-of-memory killer would
                return await ask(request)

            teacher._batcher.ask = counted
            return teacher

        outcome = teach(config, spread, make_and_kill)
    assert outcome.report["complete"] and len(texts(spread.output)) == 24
    assert texts(spread.output) == texts(alone.output)


def test_the_number_of_replicas_fits_the_cluster():
    config = RayConfig(num_cpus_per_actor=2)
    assert number_of_replicas(config, {"CPU": 9}, 100) == 4
    assert number_of_replicas(config, {"CPU": 9}, 3) == 3
    assert number_of_replicas(RayConfig(num_actors=2), {"CPU": 9}, 100) == 2
    with pytest.raises(EnvironmentFault, match="the cluster has 1 CPU"):
        number_of_replicas(config, {"CPU": 1}, 1)
