"""What a comparison of schedules is shown as: a table, and a page with a timeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from xml.sax.saxutils import escape

from .instruction import Op
from .pictures import COLORS, svg
from .plan import Plan, Plans

_STYLE = (
    "body{font-family:sans-serif}td,th{padding:2px 12px;text-align:right}td:first-child,th:first-child{text-align:left}"
)
_WORDS = {
    Op.F: "forward",
    Op.B: "backward",
    Op.I: "gradient of inputs",
    Op.W: "gradient of weights",
    Op.UNSHARD: "gather",
    Op.REDUCE: "reduce",
}
_HEAD = ("schedule", "step", "bubble", "peak of a rank", "messages", "")
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def table(found: Plans) -> str:
    """Return one line for each schedule, the fastest first, and one for each that there cannot be.

    Example:
        >>> from . import Costs
        >>> from .plan import compare
        >>> print(table(compare(Costs.uniform(2), num_ranks=2, num_micro_batches=4)).splitlines()[0].split()[0])
        schedule
    """
    rows = [_HEAD, *(_cells(plan) for plan in found.plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *(f"{name}: no: {why}" for name, why in found.impossible.items())])


def stages(plan: Plan, names: Sequence[str] = ()) -> str:
    """Return which layers each stage has.

    Args:
        plan: Which.
        names: Of the layers; none: only their numbers.
    """
    lines = []
    for stage, (first, last) in enumerate(pairwise(plan.bounds)):
        called = f": {names[first]} ... {names[last - 1]}" if names else ""
        lines.append(f"stage {stage} on rank {plan.schedule.placement[stage]}: layers {first} ... {last - 1}{called}")
    return "\n".join(lines)


def page(found: Plans, plan: Plan, *, title: str) -> str:
    """Return HTML that needs no other file: the table, and the timeline of one schedule.

    Args:
        found: From ``compare``.
        plan: Of which the timeline is drawn.
        title: Of the page.
    """
    return "\n".join(
        [
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *_html_table(found),
            f"<h2>{escape(plan.name)}</h2>",
            svg(plan.timeline, title=f"{plan.name}, seconds"),
            f"<p>{' '.join(_legend(plan))}</p>",
            f"<pre>{escape(stages(plan))}</pre>",
            "</body></html>",
            "",
        ]
    )


def _html_table(found: Plans) -> Iterator[str]:
    yield "<table>"
    yield "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in _HEAD) + "</tr>"
    for plan in found.plans:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(plan)) + "</tr>"
    for name, why in found.impossible.items():
        yield f'<tr><td>{escape(name)}</td><td colspan="{len(_HEAD) - 1}">{escape(why)}</td></tr>'
    yield "</table>"


def _legend(plan: Plan) -> Iterator[str]:
    drawn = {event.instruction.op for row in plan.timeline.rows for event in row if event.end > event.start}
    for op, color in COLORS.items():
        if op in drawn:
            yield f'<span style="color:{color}">&#9632;</span> {_WORDS[op]}'


def _cells(plan: Plan) -> Sequence[str]:
    peaks = [_size(peak) for peak in plan.peak_bytes]
    return (
        plan.name,
        _duration(plan.timeline.seconds),
        f"{100 * plan.timeline.bubble_share:.1f} %",
        " ".join(peaks) if len(peaks) <= 4 else f"{_size(min(plan.peak_bytes))} ... {_size(max(plan.peak_bytes))}",
        str(plan.num_messages),
        "" if plan.fits else "does not fit",
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _size(nbytes: float) -> str:
    unit = 0
    while nbytes >= 1024 and unit < len(_SIZES) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.3g} {_SIZES[unit]}"
