"""Timelines as pictures and traces."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from ds_pipe import Costs, make_schedule, simulate
from ds_pipe.pictures import svg, trace

SCHEDULE = make_schedule("zb_v", num_ranks=2, num_micro_batches=4)
TIMELINE = simulate(SCHEDULE, Costs.uniform(4, latency=0.25))


def test_a_picture_has_a_box_for_each_piece_of_work() -> None:
    root = ElementTree.fromstring(svg(TIMELINE, title="V < W"))
    boxes = [element for element in root if element.tag.endswith("rect")][1:]
    assert len(boxes) == 3 * 4 * 4  # F, I and W of 4 micro-batches at 4 stages
    ends = [float(box.get("x", "")) + float(box.get("width", "")) for box in boxes]
    assert max(ends) <= 1200
    assert "V < W" in "".join(root.itertext())


def test_a_trace_has_everything() -> None:
    events = json.loads(json.dumps(trace(TIMELINE, microseconds=1.0)))["traceEvents"]
    assert len(events) == sum(map(len, SCHEDULE.rows))
    assert max(event["ts"] + event["dur"] for event in events) == TIMELINE.seconds
    messages = [event for event in events if event["cat"] == "SEND"]
    assert {event["dur"] for event in messages} == {0.25}
    assert {event["tid"] for event in messages} == {1, 3}
