"""Tables of what `overhead.py` measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Result: TypeAlias = dict[Any, Any]


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    print(f"\n{title}")
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]))


def show_end_to_end(result: Result) -> None:
    """The comparison, and where (b) spends its time."""
    names = ("direct", "app", "difference", "paired_difference", "ratio", "first_item")
    rows = [
        (
            str(steps),
            *(f"{one[name]:.3f}" for name in names),
            "-" if one["first_processing"] is None else f"{one['first_processing']:.3f}",
            "yes" if one["equal_frames"] else "NO",
        )
        for steps, one in result["steps"].items()
    ]
    numbers = ("(a)", "(b)", "(b)-(a)", "by rounds", "(b)/(a)", "first item", "PROCESSING")
    heads = ("steps", *numbers, "equal frames")
    table(f"End to end, seconds, medians of {result['rounds']}", heads, rows)
    parts = [
        (str(steps), *(f"{value:.3f}" for value in one["parts"].values()))
        for steps, one in result["steps"].items()
    ]
    table(
        "Where (b) spends it, seconds, medians",
        ("steps", "until started", "engine", "around", "until answered", "all but engine"),
        parts,
    )
    cpu = [
        (str(steps), *(f"{value:.2f}" for value in one["cpu"].values()))
        for steps, one in result["steps"].items()
    ]
    table(
        "CPU seconds, medians, ffmpeg apart",
        ("steps", "(a)", "(b) rank", "(b) app", "(b) client"),
        cpu,
    )


def show_submit(result: Result) -> None:
    """Submit by door and backlog."""
    rows = [
        (str(pending), door, *milliseconds(one))
        for pending, doors in result.items()
        for door, one in doors.items()
    ]
    table("/submit_job, milliseconds", ("waiting", "through", "p50", "p95", "max"), rows)


def show_listing(result: Result) -> None:
    """Listing by size and question, in process and through the client."""
    for size, one in result.items():
        title = (
            f"{size} jobs: open {one['studio']['open_seconds']:.2f} s, "
            f"app answers after {one['client']['answered_after_seconds']:.2f} s; milliseconds"
        )
        heads = ("list_jobs", "found", "p50", "p95", "max", "CPU p95", "client p50", "p95", "max")
        rows = [
            (
                name,
                str(calls["total"]),
                *milliseconds(calls),
                f"{calls['cpu_p95'] * 1000:.2f}",
                *milliseconds(one["client"]["calls"][name]),
            )
            for name, calls in one["studio"]["calls"].items()
        ]
        table(title, heads, rows)


def milliseconds(one: Result) -> list[str]:
    """Cells of p50, p95 and the longest."""
    return [f"{one[name] * 1000:.2f}" for name in ("p50", "p95", "max")]


def show_targets(found: list[Result]) -> None:
    """Promised and kept."""
    rows = [
        (
            one["name"],
            "-" if one["seconds"] is None else f"{one['seconds']:.4f}",
            f"{one['most']:g}",
            "met" if one["met"] else "MISSED",
        )
        for one in found
    ]
    table("Targets, seconds", ("", "measured", "at most", ""), rows)
