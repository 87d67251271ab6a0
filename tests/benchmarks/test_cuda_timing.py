"""The CUDA clock without a GPU: a stand-in for torch.cuda records in which order it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import timing


class Device:
    """A device on which every call takes one millisecond."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0
        self.captured: list[Callable[[], None]] | None = None

    def work(self, name: str) -> Callable[[], None]:
        def call() -> None:
            if self.captured is not None:
                self.captured.append(call)
                return
            self.log.append(name)
            self.now_ms += 1.0

        return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = fake.now_ms
            fake.log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Graph:
        def replay(self) -> None:
            fake.log.append("replay")
            for _ in self.calls:
                fake.now_ms += 1.0

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        fake.captured = graph.calls = []
        yield
        fake.captured = None

    class Stream:
        def wait_stream(self, other: object) -> None:
            fake.log.append("wait")

    @contextmanager
    def stream(_: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: fake.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: fake.log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return fake


def test_a_round_is_one_pair_of_events_behind_a_busy_stream(device: Device) -> None:
    found = timing.compare({"a": [device.work("a0"), device.work("a1")]}, torch.device("cuda"), seconds=0, min_rounds=2)["a"]
    one_round = ["synchronize", "a0", "a1", "synchronize", "sleep", "event", "a0", "a1", "event", "synchronize"]
    assert device.log == one_round * 4  # two to warm up, two timed
    assert found.median_s == pytest.approx(1e-3)  # a call, not a round
    assert found.clock == "cuda_events" and found.host_s is not None and found.host_s >= 0


def test_a_graph_replays_all_calls(device: Device) -> None:
    found = timing.cuda_graph_time([device.work("a0"), device.work("a1")], replays=2)
    assert found.median_s == pytest.approx(1e-3) and found.calls == 2
    assert device.log.count("a0") == 3  # before the capture, which itself runs nothing
    replay = ["synchronize", "sleep", "event", "replay", "event", "synchronize"]
    assert device.log[-13:] == ["replay", *replay, *replay]
