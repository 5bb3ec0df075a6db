"""Variants beside each other: as tables of at most 100 columns and as stacked bars."""

from __future__ import annotations

from scripts.benchmark.quality import TRACKS

GIGA = 1e9
STAGES = (
    "load_audio",
    "speech_codes",
    "whisper",
    "prompt",
    "prefill",
    "decode",
    "detokenizer",
    "vocoder",
)
MOMENTS = ("first_text", "first_audio", "total")
COUNTS = ("decode_steps", "speech_codes")
LABEL, CELL = 26, 14
ACROSS = 5  # columns of a table


def variants_table(results: dict) -> list[str]:
    """Lines: seconds of each request by stage, what else was measured, and the quality."""
    found = results["variants"]
    rows = found["rows"]
    how = "all loaded at once" if found["together"] else "loaded in turns, for lack of memory"
    lines = [f"Variants, {found['runs']} interleaved rounds, {how}: median seconds (of the total)"]
    plain = next((row for row in rows if row["name"] == "none"), None)
    for first in range(0, len(rows), ACROSS):
        shown = rows[first : first + ACROSS]
        for request in shown[0]["requests"]:
            lines += _request_lines(request, shown)
        lines += ["", *_figure_lines(shown, plain), "", *_quality_lines(shown)]
    lines += [f"Left out: {name}: {why}" for name, why in found["left_out"].items()]
    return lines


def _line(label: str, values: list, form: str = "s") -> str:
    cells = ("-" if value is None else format(value, form) for value in values)
    return f"{label:{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _request_lines(request: str, rows: list[dict]) -> list[str]:
    metrics = [row["requests"][request] for row in rows]
    lines = ["", _line(f"{request} request", [row["name"] for row in rows])]
    for stage in STAGES:
        if all(f"{stage}_seconds" not in each for each in metrics):
            continue
        shares = []
        for each in metrics:
            seconds = each.get(f"{stage}_seconds", 0.0)
            shares.append(f"{seconds:.3f} {seconds / each['total_seconds']:4.0%}")
        lines.append(_line(f"  {stage.replace('_', ' ')}", shares))
    for moment in MOMENTS:
        if any(f"{moment}_seconds" in each for each in metrics):
            values = [each.get(f"{moment}_seconds") for each in metrics]
            lines.append(_line(f"  {moment.replace('_', ' ')}", values, ".3f"))
    for count in COUNTS:
        values = [each[count] for each in metrics]
        lines.append(_line(f"  {count.replace('_', ' ')}, number", values, "d"))
    return lines


def _figure_lines(rows: list[dict], plain: dict | None) -> list[str]:
    """``plain`` is the variant "none", if it could be measured."""
    lines = [_line("speed, none = 1", [row["name"] for row in rows])]
    base = None if plain is None else _speeds(plain)
    for label in _speeds(rows[0]):
        values = [base and _speeds(row)[label] / base[label] for row in rows]
        lines.append(_line(f"  {label}", values, ".2f"))
    lines.append(_line("decode steps/s alone", [row["steps_per_second"] for row in rows], ".1f"))
    for label, key in (
        ("prepared checkpoint, GB", "disk_bytes"),
        ("weights in memory, GB", "weights_bytes"),
        ("peak memory, GB", "peak_memory"),
    ):
        values = [None if row[key] is None else row[key] / GIGA for row in rows]
        lines.append(_line(label, values, ".3f"))
    return [*lines, _line("load and warm-up, s", [row["load_seconds"] for row in rows], ".2f")]


def _speeds(row: dict) -> dict[str, float]:
    """In one second, by what is counted."""
    requests = row["requests"].items()
    speeds = {f"{name} request": 1 / metrics["total_seconds"] for name, metrics in requests}
    return speeds | {"decode steps alone": row["steps_per_second"]}


def _quality_lines(rows: list[dict]) -> list[str]:
    """Nothing for the plain variant, nor for a track that its answer did not have."""
    lines = [_line("against none", [row["name"] for row in rows])]
    for label, key, form in (
        ("equal greedy tokens", "leading", ".0%"),
        ("agreement", "agreement", ".1%"),
        ("cosine", "cosine", ".5f"),
        ("divergence", "divergence", ".1e"),
    ):
        for track in TRACKS:
            found = [row["quality"] and row["quality"][track] for row in rows]
            values = [measured and measured[key] for measured in found]
            lines.append(_line(f"  {label}, {track}", values, form))
    return lines


def draw_variants(results: dict, axis) -> None:
    """The stages of the spoken request, one bar a variant; a mark where the answer was complete.

    Where speech is synthesized beside decoding, a bar is longer than the time it took.
    """
    rows = results["variants"]["rows"]
    names = [row["name"] for row in rows]
    metrics = [row["requests"]["speech"] for row in rows]
    lefts = [0.0] * len(rows)
    for stage in STAGES:
        widths = [each.get(f"{stage}_seconds", 0.0) for each in metrics]
        axis.barh(names, widths, left=lefts, label=stage.replace("_", " "))
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    totals = [each["total_seconds"] for each in metrics]
    axis.plot(totals, names, "k|", markersize=24, linestyle="", label="total")
    for name, end, row in zip(names, map(max, lefts, totals), rows, strict=True):
        text = f"  {row['steps_per_second']:.1f} decode steps/s alone"
        axis.annotate(text, (end, name), verticalalignment="center")
    axis.invert_yaxis()
    axis.set_xlim(right=1.8 * max(*lefts, *totals))
    axis.set_xlabel("seconds of a spoken request")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, markerscale=0.4)
