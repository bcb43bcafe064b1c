"""Rates and caps, with a clock that the test turns."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.limits import Bucket, Pace
from pst_dist.teacher.messages import Reply, Request, Usage
from pst_dist.teacher.settings import TeachSettings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_six_seconds_worth_through_and_then_its_rate():
    clock = Clock()
    bucket = Bucket(600, clock)  # 10 a second, 60 at once
    for _ in range(60):
        assert bucket.seconds_until(1) == 0
        bucket.take(1)
    assert bucket.seconds_until(1) == pytest.approx(0.1)
    assert bucket.seconds_until(5) == pytest.approx(0.5)
    clock.now = 0.1
    assert bucket.seconds_until(1) == 0
    bucket.take(1)
    clock.now = 1000
    assert bucket.seconds_until(60) == 0 and bucket.seconds_until(61) == 0, "it never holds more"


def test_a_request_larger_than_the_bucket_waits_for_a_full_one_and_is_paid_back():
    clock = Clock()
    bucket = Bucket(600, clock)
    bucket.take(160)
    assert bucket.seconds_until(160) == pytest.approx(16.0)
    bucket.take(-100)  # it used 60 only
    assert bucket.seconds_until(60) == pytest.approx(6.0)


def test_the_pace_is_kept_and_a_pause_holds_everybody(monkeypatch):
    clock = Clock()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr("pst_dist.teacher.limits.asyncio.sleep", sleep)

    async def story() -> list[float]:
        pace = Pace(60, 6000, clock=clock)  # 6 requests or 600 tokens at once
        sent = []
        for _ in range(8):
            await pace.ready(50)
            sent.append(clock.now)
        pace.pause(30)
        pace.pause(5)
        await pace.ready(1)
        return [*sent, clock.now]

    times = asyncio.run(story())
    assert times[:6] == [0.0] * 6
    assert times[6:8] == pytest.approx([1.0, 2.0])
    assert times[8] == pytest.approx(32.0), "the longer pause stays"


def ledger(tmp_path: Path, **more) -> Ledger:
    values = {"endpoint": "http://localhost/v1", "model": "m", "output": tmp_path / "o.jsonl", "reply_tokens": 100}
    return Ledger(TeachSettings(**values | more))


def request(key: str, size: int = 400) -> Request:
    return Request(key=key, turns=(("user", "x" * size),), most_tokens=100, temperature=0.0, seed=1)


def reply(prompt: int, completion: int) -> Reply:
    return Reply(text="y", finish="stop", usage=Usage(prompt=prompt, completion=completion, prompt_bytes=400))


def test_money_and_tokens_are_added_up(tmp_path):
    account = ledger(tmp_path, price_in=1.0, price_out=4.0)
    account.add(reply(1_000_000, 0), earlier=True)
    account.add(reply(0, 500_000))
    assert account.cost == pytest.approx(3.0) and account.tokens == 1_500_000
    assert account.to_json()["requests_of_earlier_starts"] == 1


def test_a_cap_counts_the_requests_in_flight_with_the_most_that_they_can_use(tmp_path):
    account = ledger(tmp_path, max_tokens=2000)
    one = account.most(request("a"))
    assert one == 100 + 400 + 8 + 1, "a token for each byte, before anything is known"
    sent = 0
    while sent < 50 and account.refused_by(request(f"{sent}")) is None:
        account.begin(request(f"{sent}"))
        sent += 1
    assert sent == 2000 // one and account.in_flight == sent
    account.end(request("0"), reply(100, 2))  # it used less, so there may be room again
    assert account.in_flight == sent - 1
    assert account.refused_by(request("n")) is None


def test_the_estimate_of_a_prompt_learns_from_the_server_and_from_the_journal(tmp_path):
    account = ledger(tmp_path)
    account.add(reply(100, 1), earlier=True)
    assert account.prompt_estimate(request("b")) == 100 + 8 + 1
    account.begin(request("a"))
    account.end(request("a"), reply(200, 1))  # another script: the larger ratio counts
    account.add(reply(50, 1))
    assert account.prompt_estimate(request("b")) == 200 + 8 + 1


def test_a_request_without_a_reply_costs_nothing_but_is_no_longer_in_flight(tmp_path):
    account = ledger(tmp_path, max_tokens=10_000)
    account.begin(request("a"))
    account.end(request("a"), None)
    assert account.in_flight == 0 and account.tokens == 0
