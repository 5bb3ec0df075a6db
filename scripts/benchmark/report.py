"""What was measured, as tables of at most 100 columns, as JSON and as a plot."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.benchmark.variant_report import draw_variants, variants_table

GIGA = 1e9
# Metrics of a request that are neither a stage nor its sum.
LENGTHS = ("input_audio_seconds", "output_audio_seconds", "least_lead_seconds")
MOMENTS = ("first_text_seconds", "first_audio_seconds", "total_seconds")


def table(results: dict, name: str) -> str:
    """One section of the results."""
    makers = {
        "about": lambda results: _fields(results["about"]),
        "decoding": _decoding,
        "long_run": _long_run,
        "speaking": _speaking,
        "profile": _profile,
        "speech": _speech,
        "encoders": _encoders,
        "requests": _requests,
        "cold_start": _cold_start,
        "memory": _memory,
        "variants": variants_table,
    }
    return "\n".join(makers[name](results))


def write_json(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _fields(values: dict) -> list[str]:
    width = max(map(len, values))
    return [f"{name.replace('_', ' '):{width}}  {value}" for name, value in values.items()]


def _decoding(results: dict) -> list[str]:
    decoding, bandwidth = results["decoding"], results["bandwidth"]
    lines = [
        f"Decode steps: prompt {decoding['prompt_length']}, {decoding['steps']} steps, "
        f"{decoding['runs']} interleaved runs, median step; attention: {decoding['attention']}",
        f"{'':16}{'head rows':>10}{'steps/s':>10}{'ratio':>8}{'ms/step':>10}{'MB/step':>11}"
        f"{'GB/s':>9}{'of copy':>9}",
    ]
    for row in decoding["modes"]:
        speed = row["bytes_per_second"]
        lines.append(
            f"{row['name']:16}{row['head_rows']:>10}{row['steps_per_second']:10.1f}"
            f"{row['ratio_to_plain']:8.2f}{1e3 * row['step_seconds']:10.2f}"
            f"{row['bytes_per_step'] / 1e6:11.1f}{speed / GIGA:9.1f}{speed / bandwidth:9.0%}"
        )
    lines += [
        f"Copy bandwidth {bandwidth / GIGA:.1f} GB/s: bytes read plus bytes written, best copy.",
        "MB/step: weights and filled cache that the mode has to read, each once.",
        f"Both tracks with full heads chose the plain loop's tokens in the first "
        f"{decoding['equal_steps']} of {decoding['steps']} steps.",
    ]
    return lines


def _long_run(results: dict) -> list[str]:
    run = results["long_run"]
    first, last = run["first_step_seconds"], run["last_step_seconds"]
    lines = [
        f"Long run, both tracks, {run['steps']} steps: first and last {run['window']}",
        f"  median step      {1e3 * first:10.2f} ms {1e3 * last:10.2f} ms",
    ]
    for name, bytes_then in run["first_memory"].items():
        if bytes_then is not None and not name.startswith("peak"):
            bytes_now = run["last_memory"][name]
            lines.append(f"  {name:16} {bytes_then / 1e6:10.1f} MB {bytes_now / 1e6:10.1f} MB")
    return lines


def _speaking(results: dict) -> list[str]:
    speaking = results["speaking"]
    lines = ["Decode steps of both tracks, cut heads, and speech synthesis at the same time"]
    for row in speaking["modes"]:
        speed, step = row["steps_per_second"], 1e3 * row["step_seconds"]
        lines.append(f"{row['name']:24}{speed:10.1f} steps/s{step:10.2f} ms/step")
    return [*lines, f"Real-time factor of that synthesis: {speaking['real_time_factor']:.3f}"]


def _profile(results: dict) -> list[str]:
    found = results["profile"]
    lines = [f"Profile of {found['steps']} decode steps, both tracks, {found['looks']} looks"]
    if found["device"] == "cpu":
        return [*lines, "On the CPU there is no device to wait for and nothing to count."]
    for what, field in (("calls that can wait", "calls"), ("copies to the host", "copies_to_host")):
        counts = [f"{count} {name}" for name, count in found[field].items()]
        lines.append(f"  {what:20}  {', '.join(counts) or 'none'}")
    return [*lines, f"  {'device busy':20}  {found['busy']:.1%} of the time"]


def _speech(results: dict) -> list[str]:
    lines = ["Speech", f"{'':24}{'audio s':>9}{'plain s':>10}{'s':>10}{'ratio':>8}{'RTF':>8}"]
    for row in results["speech"]:
        lines.append(
            f"{row['name']:24}{row['audio_seconds']:9.2f}{row['plain_seconds']:10.3f}"
            f"{row['seconds']:10.3f}{row['ratio_to_plain']:8.2f}{row['real_time_factor']:8.3f}"
        )
    return lines


def _encoders(results: dict) -> list[str]:
    lines = ["Audio encoders", f"{'':24}{'audio s':>9}{'s':>10}{'RTF':>8}"]
    for row in results["encoders"]:
        lines.append(
            f"{row['name']:24}{row['audio_seconds']:9.2f}{row['seconds']:10.4f}"
            f"{row['real_time_factor']:8.4f}"
        )
    return lines


def _requests(results: dict) -> list[str]:
    rows = results["requests"]
    names = list(dict.fromkeys(n for r in rows for n in (*stages(r["metrics"]), *MOMENTS)))
    wide = 22
    lines = [
        "Whole requests, warm: median seconds",
        " " * wide + "".join(f"{row['name']:>{wide}}" for row in rows),
    ]

    def line(label: str, values: list[float | int | None], form: str) -> str:
        cells = ("-" if value is None else format(value, form) for value in values)
        return f"{label:{wide}}" + "".join(f"{cell:>{wide}}" for cell in cells)

    for name in [*(n for n in names if n not in MOMENTS), *MOMENTS]:
        label = name.removesuffix("_seconds").replace("_", " ")
        lines.append(line(label, [row["metrics"].get(name) for row in rows], ".3f"))
    for name in ("prompt_tokens", "decode_steps", "text_tokens", "speech_codes", *LENGTHS):
        form = ".3f" if name in LENGTHS else "d"
        values = [row["metrics"].get(name) for row in rows]
        lines.append(line(name.replace("_", " "), values, form))
    for name in ("steps_per_second", "real_time_factor"):
        lines.append(line(name.replace("_", " "), [row.get(name) for row in rows], ".3f"))
    peaks = [row["peak_memory"] and row["peak_memory"] / GIGA for row in rows]
    return [*lines, line("peak memory, GB", peaks, ".2f")]


def stages(metrics: dict) -> dict[str, float]:
    """The metrics of a request that are seconds of a stage."""
    other = (*LENGTHS, *MOMENTS)
    return {n: v for n, v in metrics.items() if n.endswith("_seconds") and n not in other}


def _cold_start(results: dict) -> list[str]:
    cold = results["cold_start"]
    names = ("import", "load", "warm_up", "first_request", "total")
    first = cold["first_request_metrics"]
    before = sum(cold[f"{name}_seconds"] for name in names[:3])
    loaded = "files may be cached" if cold["from_files"] else "load: random weights are made"
    lines = [f"Cold start: a fresh process to the end of its first spoken answer ({loaded})"]

    def line(label: str, seconds: float) -> str:
        return f"  {label.replace('_', ' '):28}{seconds:9.3f} s"

    for name in names:
        lines.append(line(name, cold[f"{name}_seconds"]))
        if name == "first_request":
            for stage, seconds in stages(first).items():
                lines.append(line(f"  {stage.removesuffix('_seconds')}", seconds))
    for name in MOMENTS[:2]:
        if name in first:
            lines.append(line(f"to {name.removesuffix('_seconds')}", before + first[name]))
    return [*lines, "  " + _amounts(cold["memory"])]


def _memory(results: dict) -> list[str]:
    return ["Memory of the benchmark itself, copy buffers included: " + _amounts(results["memory"])]


def _amounts(memory: dict) -> str:
    known = {n.replace("_", " "): v for n, v in memory.items() if v is not None}
    return ", ".join(f"{name} {value / GIGA:.2f} GB" for name, value in known.items())


def draw(results: dict, path: Path) -> None:
    """Stages of requests as stacked bars; achieved bytes per second below the bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    makers = {"requests": _draw_requests, "decoding": _draw_decoding, "variants": draw_variants}
    panels = [name for name in makers if name in results]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False)
    for name, axis in zip(panels, axes[0], strict=True):
        makers[name](results, axis)
    about = results["about"]
    figure.suptitle(f"{about['model']}: {about['device']}, {about['dtype']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_requests(results: dict, axis) -> None:
    rows = results["requests"]
    bars = [_bar(row["metrics"]) for row in rows]
    bottoms = [0.0] * len(rows)
    for stage in dict.fromkeys(name for bar in bars for name in bar):
        heights = [bar.get(stage, 0.0) for bar in bars]
        axis.bar([row["name"] for row in rows], heights, bottom=bottoms, label=stage)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axis.set_ylabel("seconds")
    axis.set_title("whole request, warm")
    axis.legend()


def _bar(metrics: dict) -> dict[str, float]:
    """Stages that add up to the total; of the detokenizer, what decoding does not hide."""
    bar = {n.removesuffix("_seconds").replace("_", " "): v for n, v in stages(metrics).items()}
    speech = bar.pop("detokenizer", 0.0)
    rest = max(0.0, metrics["total_seconds"] - sum(bar.values()))
    return bar | {"detokenizer": min(speech, rest), "other": max(0.0, rest - speech)}


def _draw_decoding(results: dict, axis) -> None:
    rows = results["decoding"]["modes"]
    labels = [f"{row['name']}\n{row['head_rows']} heads" for row in rows]
    bars = axis.barh(labels, [row["bytes_per_second"] / GIGA for row in rows])
    axis.bar_label(bars, [f"{row['steps_per_second']:.1f} steps/s" for row in rows], padding=3)
    axis.axvline(results["bandwidth"] / GIGA, color="black", linestyle="--", label="copy bandwidth")
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel("GB/s of weights and filled cache")
    axis.set_title("decode steps")
    axis.legend(loc="lower right")
