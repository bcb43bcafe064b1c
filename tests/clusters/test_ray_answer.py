"""Questions answered on a real local Ray cluster: the bytes of one process, and errors of actors as one line."""

from __future__ import annotations

import json

import pytest
from tiny import ROWS, fitted

from pst_dist.answering.files import AnswerJob, answer_file
from pst_dist.answering.windows import AnswerSettings
from pst_dist.clusters.ray.answer import number_of_actors, on_ray
from pst_dist.config.schema import RayConfig
from pst_dist.errors import EnvironmentFault, PstError
from pst_dist.student.saved import load_student

SETTINGS = AnswerSettings(explain=True, confidence=True, batch_size=2, max_new_tokens=24)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_write_the_bytes_of_one_process_and_their_errors_are_ours(tmp_path):
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


def test_a_cluster_without_room_says_what_it_lacks():
    assert number_of_actors(RayConfig(), {"CPU": 8.0}, 3) == 3
    assert number_of_actors(RayConfig(num_actors=2), {"CPU": 8.0}, 30) == 2
    with pytest.raises(EnvironmentFault, match=r"an actor needs 1 CPU, 1 GPU, the cluster has 8 CPU, 0 GPU"):
        number_of_actors(RayConfig(num_gpus_per_actor=1), {"CPU": 8.0}, 3)
