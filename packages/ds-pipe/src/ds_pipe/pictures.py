"""A timeline to look at: as SVG, and as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from xml.sax.saxutils import escape

from .instruction import Op
from .simulate import Event, Timeline

_ROW, _GAP, _LEFT = 24, 6, 60  # pixels
COLORS: Mapping[Op, str] = MappingProxyType(
    {
        Op.F: "#4477aa",
        Op.B: "#228833",
        Op.I: "#66ccee",
        Op.W: "#ccbb44",
        Op.UNSHARD: "#aa3377",
        Op.REDUCE: "#ee6677",
    }
)


def svg(timeline: Timeline, *, title: str, width: int = 1200) -> str:
    """Return a picture: a line for each rank, a box for each piece of work, in it the micro-batch.

    Later chunks of a rank are drawn paler. What takes no time, and messages, are not drawn.

    Args:
        timeline: From ``simulate``.
        title: Stands above it, with time and bubble.
        width: Pixels.

    Example:
        >>> from . import Costs, make_schedule, simulate
        >>> schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=4)
        >>> picture = svg(simulate(schedule, Costs.uniform(2)), title="1F1B")
        >>> picture.count("<rect"), picture[:4]
        (17, '<svg')
    """
    height = _ROW + len(timeline.rows) * (_ROW + _GAP) + _GAP
    head = f"{title}: {timeline.seconds:g}, bubble {100 * timeline.bubble_share:.1f} %"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="4" y="16">{escape(head)}</text>',
    ]
    scale = (width - _LEFT - _GAP) / (timeline.seconds or 1.0)
    for rank, row in enumerate(timeline.rows):
        top = _ROW + rank * (_ROW + _GAP)
        lines.append(f'<text x="4" y="{top + 16}">rank {rank}</text>')
        lines += _boxes(row, top, scale)
    return "\n".join([*lines, "</svg>", ""])


def _boxes(row: Sequence[Event], top: int, scale: float) -> Iterator[str]:
    events = [event for event in row if event.instruction.op in COLORS and event.end > event.start]
    first = min((event.instruction.stage for event in events), default=0)
    for one, start, end in events:
        left, wide = _LEFT + start * scale, (end - start) * scale
        opacity = 1.0 if one.stage == first else 0.6
        yield (
            f'<rect x="{left:.2f}" y="{top}" width="{wide:.2f}" height="{_ROW}" fill="{COLORS[one.op]}" '
            f'fill-opacity="{opacity}" stroke="white"><title>{one}: {start:g} to {end:g}</title></rect>'
        )
        if wide > 12 and one.micro_batch >= 0:
            yield f'<text x="{left + 3:.2f}" y="{top + 16}" fill="white">{one.micro_batch}</text>'


def trace(timeline: Timeline, *, microseconds: float = 1e6) -> dict[str, list[dict[str, object]]]:
    """Return the trace-event format: dump it as JSON and open the file in Perfetto.

    Args:
        timeline: From ``simulate``.
        microseconds: In one unit of the timeline's time.

    Example:
        >>> from . import Costs, make_schedule, simulate
        >>> timeline = simulate(make_schedule("gpipe", num_ranks=1, num_micro_batches=1), Costs.uniform(1))
        >>> [event["name"] for event in trace(timeline)["traceEvents"] if event["dur"]]
        ['F0.0', 'B0.0']
    """
    events: list[dict[str, object]] = [
        {
            "name": str(event.instruction),
            "cat": event.instruction.op.value,
            "ph": "X",
            "pid": 0,
            "tid": 2 * rank + (event.instruction.op is Op.SEND),  # messages beside the work
            "ts": event.start * microseconds,
            "dur": (event.end - event.start) * microseconds,
        }
        for rank, row in enumerate(timeline.rows)
        for event in row
    ]
    return {"traceEvents": events}
