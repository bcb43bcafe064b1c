"""A few thousand malformed inputs for every parser of foreign text; `python -m tests.fuzz` runs 50,000."""

import os

import pytest
from fuzz.mutations import mutated
from fuzz.parsers import PARSERS
from fuzz.running import run, table

COUNT = int(os.environ.get("PST_FUZZ_INPUTS", "2500"))


@pytest.mark.timeout(600 if COUNT <= 2500 else 14_400)
def test_malformed_inputs_end_in_a_result_or_a_refusal_and_in_bounded_time():
    counts = run(COUNT)
    print(table(counts))
    failures = [line for count in counts for line in count.failures]
    assert not failures, "\n".join(failures[:20])
    assert {count.parser for count in counts} == {parser.name for parser in PARSERS}
    # A parser that refuses everything, or nothing, is not being tested.
    assert all(count.refused for count in counts if count.inputs >= 40 and count.parser not in LENIENT)


LENIENT = {
    *("metrics", "curves", "replies", "mounts", "nvidia-smi", "squeue", "numbers", "tracker ids", "peer hello"),
    *("rows.jsonl", "data survey"),
}
"""Parsers that pass over what they cannot read, or whose refusals are not errors of pst."""


def test_the_same_seed_gives_the_same_inputs():
    import random

    one, two = (mutated(random.Random("x"), PARSERS[0].seeds[0]) for _ in range(2))
    assert one == two != mutated(random.Random("y"), PARSERS[0].seeds[0])


def test_a_traceback_and_an_endless_call_are_counted(monkeypatch):
    from fuzz import running
    from fuzz.parsers import Parser

    def read(content, folder):
        if content != b"[1]":
            while content.startswith(b"["):
                pass
            raise KeyError("ours")

    monkeypatch.setattr(running, "PARSERS", [Parser("broken", read, [b"[1]"])])
    monkeypatch.setattr(running, "MOST_SECONDS", 0.05)
    (count,) = run(30)
    assert any("KeyError" in line for line in count.failures)
    assert any("CPU s" in line for line in count.failures)
    assert 0 < count.hangs < len(count.failures)
