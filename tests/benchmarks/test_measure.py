"""Timing of repeated calls: units, the device that is waited for, and how often slow calls are repeated."""

import time

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import FEWEST


@pytest.fixture
def clock(monkeypatch):
    """A clock that only ``clock.append(seconds)`` moves."""
    passed: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: sum(passed))
    return passed


def test_a_call_of_a_quarter_second_takes_250_ms(clock):
    found = measure.measure(lambda: clock.append(0.25), torch.device("cpu"), warmup=2, repeats=3)
    assert found == measure.Measurement(median_ms=250.0, iqr_ms=0.0, repeats=3, peak_bytes=None)
    assert len(clock) == 5


@pytest.mark.parametrize(("seconds", "repeats"), [(0.5, FEWEST), (2.9, 12), (100.0, 40)])
def test_slow_calls_are_repeated_until_the_seconds_are_over(clock, seconds, repeats):
    """At a quarter second each: but for the fewest and the most."""
    found = measure.measure(lambda: clock.append(0.25), torch.device("cpu"), warmup=0, repeats=40, seconds=seconds)
    assert found.repeats == repeats


def test_the_named_gpu_is_waited_for_and_its_memory_counted(clock, monkeypatch):
    """What the calls of each GPU have queued passes when that one is waited for."""
    queued = {0: 0.0, 1: 0.0}
    bytes_of = {0: 5, 1: 7}

    def of(device):
        return 0 if device is None else torch.device(device).index

    def synchronize(device=None):
        clock.append(queued[of(device)])
        queued[of(device)] = 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: bytes_of.update({of(device): 0}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: bytes_of[of(device)])

    def call():
        queued[1] += 0.5
        bytes_of[1] = max(bytes_of[1], 3)

    found = measure.measure(call, torch.device("cuda:1"), warmup=1, repeats=2)
    assert found == measure.Measurement(median_ms=500.0, iqr_ms=0.0, repeats=2, peak_bytes=3)
    assert bytes_of[0] == 5, "the other GPU's count is left alone"
