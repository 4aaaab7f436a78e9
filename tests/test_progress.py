"""Progress: events in order, cancellation, and what a user without a terminal sees."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from saeunlearn.errors import Cancelled, SaeunlearnError
from saeunlearn.progress import ConsoleProgress, Progress


@pytest.mark.parametrize("kind", [Progress, ConsoleProgress])
def test_events_say_what_was_done(kind: type[Progress]) -> None:
    events: list[dict[str, Any]] = []
    p = kind(events.append)
    p.start("work", 5)
    p.step(2)  # without figures no event: a step a token would drown a run's log
    p.step(3, loss=0.5)
    p.note("half way")
    p.finish(loss=0.25)
    assert [{k: v for k, v in e.items() if k != "time"} for e in events] == [
        {"event": "start", "what": "work", "total": 5},
        {"event": "step", "what": "work", "done": 5, "loss": 0.5},
        {"event": "note", "message": "half way"},
        {"event": "finish", "what": "work", "done": 5, "loss": 0.25},
    ]
    times = [e["time"] for e in events]
    assert times == sorted(times)
    assert times[0] > 1e9
    assert json.dumps(events)


def test_over_is_a_stage_that_knows_its_length() -> None:
    events: list[dict[str, Any]] = []
    p = Progress(events.append)
    assert list(p.over([1, 2, 3], "list")) == [1, 2, 3]
    assert list(p.over(iter([1, 2]), "iterator")) == [1, 2]
    assert list(p.over(iter([1]), "told", 7)) == [1]
    assert [e["total"] for e in events if e["event"] == "start"] == [3, None, 7]
    assert [e["done"] for e in events if e["event"] == "finish"] == [3, 2, 1]  # each stage counts from 0


@pytest.mark.parametrize("kind", [Progress, ConsoleProgress])
def test_cancelling_from_another_thread_stops_at_the_next_step(kind: type[Progress]) -> None:
    p = kind()
    seen: list[int] = []

    def count() -> None:
        for i in p.over(range(10), "counting"):
            seen.append(i)
            if i == 3:
                thread = threading.Thread(target=lambda: setattr(p, "cancelled", True))
                thread.start()
                thread.join()

    with pytest.raises(Cancelled, match="'counting'") as raised:
        count()
    assert seen == [0, 1, 2, 3]
    assert isinstance(raised.value, SaeunlearnError)


def test_console_writes_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    p = ConsoleProgress()
    p.start("scores", 2)
    p.step(2, loss=1.0)
    p.note("one long text was cut")
    p.finish(loss=1.23456, layers="0,1")
    p.start("quick", 1)
    p.finish()  # short and without figures: not worth a line
    out, err = capsys.readouterr()
    assert out == ""  # stdout belongs to results
    assert err.splitlines() == ["one long text was cut", "  scores: 0.0 s · loss 1.235 · layers 0,1"]
