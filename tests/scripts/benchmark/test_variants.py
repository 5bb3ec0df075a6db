"""scripts/bench --variants: the order of the rounds, what is told of them, and a real run."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.errors import RequestError
from scripts.benchmark import report, variant_worker, variants
from scripts.benchmark.variants import Setup, VariantError, Worker, measure_variants, parse_variants
from tests.scripts.benchmark.test_bench import COLUMNS, bench

SETUP = Setup(None, "tiny", None, "cpu", "float32", 1, 64)
GIB = 2**30


def test_names() -> None:
    assert parse_variants("all") == ["none", "fp8", "int8", "int4"]
    assert parse_variants("int4,int4+fp8-kv") == ["none", "int4", "int4+fp8-kv"]
    assert parse_variants("int8,none,int8") == ["none", "int8"]
    for text in ("", "int2", "all,int8", "int8+fp8", "int8;int4"):
        with pytest.raises(RequestError, match="--variants: expected 'all' or some of none, fp8"):
            parse_variants(text)


class FakeWorker:
    """Notes what is asked of whom; a request takes as many seconds as it is late."""

    log: list[tuple[str, str]]
    broken: dict[str, str]
    failing: dict[tuple[str, str], str]
    peak: int | None

    def __init__(self, setup: Setup, name: str, directory: Path | None):
        self.name = name
        self.log.append((name, "load"))
        if name in self.broken:
            raise VariantError(self.broken[name])
        self.loaded = {"load_seconds": None, "weights_bytes": 7}

    def ask(self, what: str, request: str | None = None, path: str | None = None) -> dict:
        self.log.append((self.name, request or what))
        if (self.name, request or what) in self.failing:
            raise VariantError(self.failing[self.name, request or what])
        if what == "compare":
            measured = {"leading": 0.5, "agreement": 0.9, "cosine": 0.99, "divergence": 1e-3}
            return {"text": measured, "audio": None}
        number = self.log.count((self.name, request or what))
        return {
            "warm_up": {"peak_memory": self.peak},
            "refer": {},
            "answer": {"total_seconds": float(number**2), "decode_steps": 5, "speech_codes": 0},
            "decode": {"step_seconds": 0.1 * number},
        }[what]

    def close(self) -> None:
        self.log.append((self.name, "close"))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    FakeWorker.log, FakeWorker.broken, FakeWorker.failing = [], {}, {}
    FakeWorker.peak = GIB
    monkeypatch.setattr(variants, "Worker", FakeWorker)
    return FakeWorker


def test_rounds_are_interleaved(workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: 3 * GIB)
    found = measure_variants(SETUP, ["none", "int8", "int4"], runs=3)
    assert found["together"] and not found["left_out"]
    turn = ["text", "speech", "decode"]
    expected = [("none", w) for w in ("load", "warm_up", "refer")]
    expected += [(name, w) for name in ("int8", "int4") for w in ("load", "warm_up", "compare")]
    expected += 3 * [(name, w) for name in ("none", "int8", "int4") for w in turn]
    closed = {(name, "close") for name in ("none", "int8", "int4")}
    assert workers.log[: len(expected)] == expected
    assert set(workers.log[len(expected) :]) == closed and len(workers.log) == len(expected) + 3
    none, int8, _ = found["rows"]
    assert none["quality"] is None and int8["quality"]["text"]["cosine"] == 0.99
    # Medians of 1, 4, 9 and of 0.1, 0.2, 0.3.
    assert int8["requests"]["speech"]["total_seconds"] == 4
    assert int8["steps_per_second"] == pytest.approx(5)
    assert int8["peak_memory"] == GIB
    assert int8["disk_bytes"] is None


def test_what_does_not_fit_together_is_loaded_in_turns(workers, monkeypatch) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: GIB)
    found = measure_variants(SETUP, ["none", "int8"], runs=2)
    assert not found["together"]
    expected = [
        *[("none", w) for w in ("load", "warm_up", "refer", "close")],
        *[("int8", w) for w in ("load", "warm_up", "compare", "close")],
    ]
    turn = ("load", "warm_up", "text", "speech", "decode", "close")
    expected += 2 * [(name, w) for name in ("none", "int8") for w in turn]
    assert workers.log == expected
    assert "loaded in turns" in report.table({"variants": found}, "variants")


def test_a_variant_that_cannot_run_is_listed(workers, monkeypatch) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: 9 * GIB)
    workers.broken["int8"] = "it is not there"
    found = measure_variants(SETUP, ["none", "int8", "int4"], runs=1)
    assert [row["name"] for row in found["rows"]] == ["none", "int4"]
    assert found["left_out"] == {"int8": "it is not there"}
    assert "Left out: int8: it is not there" in report.table({"variants": found}, "variants")
    assert not any(name == "int8" and what == "text" for name, what in workers.log)


def test_a_variant_that_fails_later_is_left_out_by_name(workers, monkeypatch) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: 9 * GIB)
    workers.failing["int8", "speech"] = "out of memory"
    found = measure_variants(SETUP, ["none", "int8", "int4"], runs=2)
    assert [row["name"] for row in found["rows"]] == ["none", "int4"]
    assert found["left_out"] == {"int8": "out of memory"}
    assert workers.log.count(("int8", "close")) == workers.log.count(("int8", "speech")) == 1
    workers.failing |= {("none", "text"): "too slow", ("int4", "text"): "too old"}
    with pytest.raises(VariantError, match="none: too slow; int8: out of memory; int4: too old"):
        measure_variants(SETUP, ["none", "int8", "int4"], runs=2)


@pytest.mark.parametrize(("peak", "free"), [(None, 9 * GIB), (GIB, None)])
def test_memory_that_is_not_known_is_not_counted_on(workers, monkeypatch, peak, free) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: free)
    workers.peak = peak
    found = measure_variants(SETUP, ["none", "int8"], runs=1)
    assert not found["together"] and found["rows"][0]["peak_memory"] == peak
    assert "peak memory, GB" in report.table({"variants": found}, "variants")


def test_only_what_answers_need_is_in_memory_when_peaks_begin(golden, monkeypatch) -> None:
    found = []

    def models(device: torch.device) -> None:
        gc.collect()
        alive = [m for m in gc.get_objects() if type(m) is LanguageModel]
        found.extend(m.audio_head.weight.shape[0] for m in alive if m not in before)

    gc.collect()
    before = [m for m in gc.get_objects() if type(m) is LanguageModel]
    monkeypatch.setattr(variant_worker, "forget_peak", models)
    monkeypatch.setattr(variant_worker, "Parts", lambda device: None)
    given = asdict(SETUP) | {"scheme": "none", "kv_cache": "none"}
    variant = variant_worker.Variant(given)
    assert found == [variant.model.language_model.audio_head.weight.shape[0]]


def test_many_variants_make_several_tables(workers, monkeypatch) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: 99 * GIB)
    names = parse_variants("fp8,int8,int4,none+fp8-kv,fp8+fp8-kv")
    found = measure_variants(SETUP, names, runs=1)
    lines = report.table({"variants": found}, "variants").splitlines()
    assert max(map(len, lines)) <= COLUMNS
    heads = [line.split()[2:] for line in lines if line.startswith("against none")]
    assert heads == [names[:5], names[5:]]
    speeds = [line.split()[3:] for line in lines if line.startswith("  decode steps alone")]
    assert speeds == [["1.00"] * 5, ["1.00"]]
    for track, value in (("text", "50%"), ("audio", "-")):
        shown = [line.split()[4:] for line in lines if f"tokens, {track}" in line]
        assert shown == [["-", *[value] * 4], [value]]


def test_without_the_plain_model_there_is_nothing_to_relate_to(workers, monkeypatch) -> None:
    monkeypatch.setattr(variants, "free_memory", lambda device: 9 * GIB)
    workers.broken["none"] = "too large"
    found = measure_variants(SETUP, ["none", "int8"], runs=1)
    (row,) = found["rows"]
    assert row["quality"] is None
    lines = report.table({"variants": found}, "variants").splitlines()
    assert any(line.split() == ["decode", "steps", "alone", "-"] for line in lines)


def test_with_none_of_them_it_fails(workers) -> None:
    workers.broken |= {"none": "too large", "int8": "too old"}
    with pytest.raises(VariantError, match="none: too large; int8: too old"):
        measure_variants(SETUP, ["none", "int8"], runs=1)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match=r"tiktoken\.model: file missing"):
        Worker(SETUP, "none", tmp_path)


def test_a_process_that_was_killed_is_an_error_and_can_be_closed() -> None:
    worker = Worker(SETUP, "none", None)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(VariantError, match="ended with status -9"):
        worker.ask("warm_up")
    worker.close()


def test_the_tiny_checkpoint(golden: Path, tmp_path: Path) -> None:
    """Its rows are no whole groups of int4."""
    checkpoint, kept = golden / "e2e" / "checkpoint", tmp_path / "kept"
    files = ["--json", "v.json", "--plot", "v.png", "--prepared", kept]
    how = ["--device", "cpu", "--threads", 1, "--steps", 64, "--runs", 1]
    given = ["--weights", checkpoint, "--variants", "int8,int4", *files, *how]
    done = bench(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("Variants, ") : done.stdout.index("Left out: ")]
    assert max(map(len, table.splitlines())) <= COLUMNS
    found = json.loads((tmp_path / "v.json").read_text())["variants"]
    assert found["left_out"].keys() == {"int4"} and "use 'int8'" in found["left_out"]["int4"]
    none, int8 = found["rows"]
    for row in (none, int8):
        written = sum(p.stat().st_size for p in (kept / row["name"]).rglob("*") if p.is_file())
        assert row["disk_bytes"] == written > 0
        assert row["load_seconds"] > 0 and row["steps_per_second"] > 0
        assert row["peak_memory"] > row["weights_bytes"]
        speech = row["requests"]["speech"]
        parts = ("load_audio", "speech_codes", "whisper", "prompt", "prefill", "decode")
        seconds = [speech[f"{part}_seconds"] for part in (*parts, "detokenizer", "vocoder")]
        assert all(value > 0 for value in seconds) and sum(seconds) < speech["total_seconds"]
        assert "vocoder_seconds" not in row["requests"]["text"]
    assert int8["weights_bytes"] < none["weights_bytes"]
    assert int8["requests"]["text"]["quantization"] == "int8"
    for track in ("text", "audio"):
        quality = int8["quality"][track]
        assert 0.999 < quality["cosine"] < 1 and 0 < quality["divergence"] < 0.1
        assert 0 <= quality["leading"] <= 1 and 0.5 < quality["agreement"] <= 1
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--quantization=int8", "--long-run", "--profile=t.json"])
def test_options_without_effect_are_refused(option: str, tmp_path: Path) -> None:
    done = bench("--random", "tiny", "--variants", "all", option, cwd=tmp_path)
    assert done.returncode == 2 and "has no effect with --variants" in done.stderr


def test_unknown_variants_are_refused(tmp_path: Path) -> None:
    done = bench("--random", "tiny", "--variants", "int2", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert "bench: error: --variants: expected 'all' or some of none, fp8" in done.stderr


def test_free_memory_of_the_host() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert 0 < variants.free_memory(torch.device("cpu")) < total


def test_what_only_linux_knows_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(variants, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(variant_worker, "CLEAR_REFS", tmp_path / "clear_refs")
    variant_worker.forget_peak(torch.device("cpu"))
    assert variants.free_memory(torch.device("cpu")) is None
    assert variant_worker.peak_memory(torch.device("cpu")) is None
