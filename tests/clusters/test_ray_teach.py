"""A teacher on Ray: the samples of one process, also when a replica is killed in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo

from pst_dist.clusters.ray.teach import number_of_replicas, ray_teacher
from pst_dist.config.loading import load_config
from pst_dist.config.schema import RayConfig
from pst_dist.errors import EnvironmentFault
from pst_dist.storage.json_files import read_lines
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.teach import teach

pytestmark = pytest.mark.ray


def texts(output: Path) -> dict[str, str]:
    journal = output.with_name(output.stem + ".teach") / "journal.jsonl"
    return {line["key"]: line["text"] for line in read_lines(journal) if "key" in line}


def test_replicas_write_what_one_process_writes_and_a_lost_one_is_replaced(tmp_path):
    pytest.importorskip("ray")
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
