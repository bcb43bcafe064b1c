"""What a training measures of itself for `pst watch`."""

from types import SimpleNamespace

import pytest

from pst_dist.training.reporting import live
from pst_dist.training.reporting.live import BusyShare


def test_the_busy_share_counts_from_the_last_call_and_is_at_most_one(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock.now))
    share = BusyShare()
    clock.now = 110.0
    assert share.since_last(4.0) == pytest.approx(0.4), "4 of 10 seconds"
    clock.now = 112.0
    assert share.since_last(5.0) == pytest.approx(0.5), "1 more of 2 seconds"
    assert share.since_last(6.0) == 1.0, "no time has passed"
