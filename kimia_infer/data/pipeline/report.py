"""The page about what was made: counts, histograms and sounds, in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kimia_infer.audio.encode import encode
from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.data.pipeline.filters import Limits, describe
from kimia_infer.data.pipeline.make import Made, Row
from kimia_infer.utils.files import write_text

REPORT_NAME = "report.html"
PLAYED_SECONDS = 10.0
PLAYED_KEPT, PLAYED_DROPPED = 8, 3
"""Sounds on the page: of what was kept, and for every fault; the page stays below some 5 MB."""
BINS, WIDTH, HEIGHT = 24, 300, 90

HISTOGRAMS: dict[str, Callable[[Row], float | None]] = {
    "seconds": lambda row: row["end"] - row["start"],
    "level, dBFS": lambda row: row["level_dbfs"],
    "highest frequency, Hz": lambda row: row["bandwidth_hz"],
    "DNSMOS": lambda row: row["score"],
    "letters per second": lambda row: len(row.get("text", "")) / (row["end"] - row["start"]),
    "confidence": lambda row: row.get("confidence"),
    "difference of two recognizers": lambda row: row.get("difference"),
}

PAGE = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Training data</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left;
vertical-align: top }} figure {{ display: inline-block; margin: 0 1.5rem 1rem 0 }}
figcaption {{ color: #555 }} .kept {{ fill: #2a7 }} .dropped {{ fill: #c55 }}
</style>
<h1>Training data</h1>
{summary}
<h2>Dropped</h2>
{dropped}
<h2>Measures</h2>
<p>Segments that were kept in green, others in red; the ends of the axes are the least and the
greatest value.</p>
{histograms}
<h2>To listen to</h2>
{sounds}
<h2>Recordings</h2>
{recordings}
<h2>Limits</h2>
<ul>{limits}</ul>
</html>
"""


def write_report(made: Made, output: Path, limits: Limits) -> Path:
    """Write the page into ``output``, where the audio of ``made`` is; its path."""
    page = PAGE.format(
        summary=_summary(made),
        dropped=_dropped(made),
        histograms="".join(_histogram(name, made.segments, of) for name, of in HISTOGRAMS.items()),
        sounds=_sounds(made, output),
        recordings=_recordings(made),
        limits="".join(f"<li>{html.escape(line)}</li>" for line in describe(limits)),
    )
    path = output / REPORT_NAME
    write_text(path, page)
    return path


def _seconds(rows: Sequence[Row]) -> float:
    return sum(row["end"] - row["start"] for row in rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """``rows`` are HTML where they are strings that begin with a tag."""

    def cell(value: object) -> str:
        text = str(value)
        return text if text.startswith("<") else html.escape(text)

    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{header}</tr>{body}</table>"


def _summary(made: Made) -> str:
    heard = sum(row["seconds"] for row in made.recordings)
    spoken = sum(row["speech_seconds"] for row in made.recordings)
    kept = _seconds(made.kept)
    rows = [
        ("recordings", len(made.recordings), f"{heard / 60:.1f} min"),
        ("speech in them", "", f"{spoken / 60:.1f} min"),
        ("segments", len(made.segments), f"{_seconds(made.segments) / 60:.1f} min"),
        ("kept", len(made.kept), f"{kept / 60:.1f} min, {kept / max(spoken, 1e-9):.0%} of speech"),
    ]
    return _table(("", "count", "length"), rows)


def _dropped(made: Made) -> str:
    rows = [
        (name, count, f"{seconds / 60:.1f} min") for name, (count, seconds) in made.faults().items()
    ]
    return _table(("limit", "segments", "length"), rows) if rows else "<p>Nothing.</p>"


def _histogram(name: str, rows: Sequence[Row], of: Callable[[Row], float | None]) -> str:
    pairs = [(value, row["fault"] is None) for row in rows if (value := of(row)) is not None]
    if not pairs:
        return ""
    values = np.array([value for value, _ in pairs])
    good = np.array([kept for _, kept in pairs])
    edges = np.histogram_bin_edges(values, BINS)
    kept, dropped = (np.histogram(values[which], edges)[0] for which in (good, ~good))
    scale = HEIGHT / (kept + dropped).max()
    step = WIDTH / BINS
    bars = []
    for place, (green, red) in enumerate(zip(kept.tolist(), dropped.tolist(), strict=True)):
        below = 0.0
        for count, kind in ((green, "kept"), (red, "dropped")):
            tall = count * scale
            bars.append(
                f'<rect class="{kind}" x="{place * step:.1f}" y="{HEIGHT - below - tall:.1f}" '
                f'width="{step - 1:.1f}" height="{tall:.1f}"/>'
            )
            below += tall
    drawing = f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(bars)}</svg>'
    caption = f"{html.escape(name)}: {values.min():.3g} to {values.max():.3g}"
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _sounds(made: Made, output: Path) -> str:
    chosen = spread(made.kept, PLAYED_KEPT)
    for fault in made.faults():
        rows = [row for row in made.segments if row["fault"] == fault]
        chosen += spread(rows, PLAYED_DROPPED)
    rows = [(_player(output / row["audio"]), row["fault"] or "kept", _said(row)) for row in chosen]
    return _table(("sound", "", "text"), rows)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most ``count`` of ``rows``, evenly from all of them."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return [rows[place] for place in places.tolist()]


def _player(path: Path) -> str:
    wave = load_audio(path)[: round(PLAYED_SECONDS * SAMPLE_RATE)]
    sound = base64.b64encode(encode(wave, "mp3", SAMPLE_RATE)).decode()
    return f'<audio controls preload="none" src="data:audio/mpeg;base64,{sound}"></audio>'


def _said(row: Row) -> str:
    second = row.get("second_text")
    texts = [row.get("text", "")] + ([f"second: {second}"] if second is not None else [])
    where = f"{Path(row['recording']).name}, {row['start']:.1f} s, speaker {row['speaker'] + 1}"
    lines = [html.escape(text) for text in (*texts, where)]
    return f"<span>{'<br>'.join(lines)}</span>"


def _recordings(made: Made) -> str:
    rows = []
    for row in made.recordings:
        own = [one for one in made.kept if one["recording"] == row["recording"]]
        name, minutes = Path(row["recording"]).name, f"{row['seconds'] / 60:.1f} min"
        rows.append((name, minutes, row["speakers"], f"{_seconds(own) / 60:.1f} min"))
    rows += [(Path(row["recording"]).name, row["error"], "", "") for row in made.unreadable]
    return _table(("recording", "length", "speakers", "kept"), rows)
