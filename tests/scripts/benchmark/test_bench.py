"""scripts/bench: what it counts, what it compares, and the command as a user runs it."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimia_infer.layers.onednn import use_onednn
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from scripts.benchmark import bandwidth, decoding, report
from scripts.benchmark.bandwidth import BOTH, MODES, Mode, step_bytes
from tests.paths import ROOT

BENCH = [sys.executable, str(ROOT / "scripts" / "bench")]
STEPS = 64
COLUMNS = 100


@pytest.fixture(scope="module")
def model(golden: Path) -> LanguageModel:
    return language_model_component(golden / "llm").load(torch.device("cpu"), torch.float32)


def bench(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [*BENCH, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/bench as a module, with a copy that takes no time."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setitem(bandwidth.COPY_BYTES, "cpu", 2**20)
    loader = SourceFileLoader("bench", str(ROOT / "scripts" / "bench"))
    module = module_from_spec(spec_from_loader("bench", loader))
    loader.exec_module(module)
    return module


def run_main(script: ModuleType, *arguments) -> int:
    """The exit status of a short run in this process."""
    common = ["--device", "cpu", "--steps", STEPS, "--runs", 1, "--threads", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *map(str, (*arguments, *common))])
        return script.main()


class ReadWeights(TorchDispatchMode):
    """Notes every part of a parameter that an operation reads."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.table = model.embedding.weight.untyped_storage().data_ptr()
        self.parts: dict[tuple[int, int], int] = {}
        self.embedded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves((args, kwargs))):
                storage = tensor.untyped_storage().data_ptr()
                if storage == self.table:
                    self.embedded += result.nbytes
                elif storage in self.parameters:
                    self.parts[storage, tensor.storage_offset()] = tensor.nbytes
        return result


@pytest.mark.parametrize("head_rows", ["track", "full"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_step_bytes_are_what_a_step_reads(mode: Mode, head_rows: str, model: LanguageModel) -> None:
    steps = decoding.first_timed_step(model.device) + 1
    model = model.with_cut_heads() if head_rows == "track" else model
    loop = decoding.library_loop(decoding.library_decoder(model, steps), mode, steps)
    run = loop.run()
    while loop.launched < steps - 1:
        next(run)
    with ReadWeights(model) as read:
        next(run)
    assert loop.launched == steps
    weights = sum(read.parts.values()) + read.embedded
    assert step_bytes(model, mode, filled=0) == weights
    # Only layers that run read their cache; with both tracks all of it.
    cache = step_bytes(model, mode, filled=10) - weights
    config = model.config
    values = 2 * config.total_layers * config.kv_heads * config.head_dim * 10
    whole_bytes = values * model.dtype.itemsize
    assert (cache == whole_bytes) == (mode is BOTH) and 0 < cache <= whole_bytes


def test_step_bytes_count_with_onednn_layers(model: LanguageModel) -> None:
    with_onednn = copy.deepcopy(model)
    use_onednn(with_onednn, min_elements=0)
    for mode in MODES:
        assert step_bytes(with_onednn, mode, filled=10) == step_bytes(model, mode, filled=10)


def test_all_loops_are_timed_and_the_plain_one_agrees(model: LanguageModel) -> None:
    contenders = decoding.make_contenders(model, STEPS)
    table = decoding.compare_decoding(model, STEPS, runs=1)
    assert len(table["modes"]) == len(contenders) == 1 + 2 * len(MODES)
    assert table["equal_steps"] == STEPS
    plain = table["modes"][0]
    assert plain["ratio_to_plain"] == 1
    for row in table["modes"]:
        speed = row["bytes_per_step"] / row["step_seconds"]
        assert row["bytes_per_second"] == pytest.approx(speed)
        assert row["ratio_to_plain"] == pytest.approx(
            plain["step_seconds"] / row["step_seconds"], rel=1e-6
        )


def test_turns_cover_a_run_once(model: LanguageModel) -> None:
    """Every step after the first few is timed once, however the run is cut in turns."""
    for contender in decoding.make_contenders(model, STEPS):
        for turn in (3, None):
            contender.seconds.clear()
            contender.begin()
            turns = 1
            while contender.take_turn(turn):
                turns += 1
            assert turns == (1 if turn is None else -(-(STEPS + 1) // turn))
            assert contender.loop.launched == STEPS
            assert len(contender.seconds) == STEPS - decoding.first_timed_step(model.device)


def test_accelerators_are_looked_at_rarely(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps between two looks share their time; the plain loop still stops at every step."""
    monkeypatch.setattr(decoding, "check_interval", lambda device: decoding.CHECK_INTERVAL)
    plain, *others = decoding.make_contenders(model, STEPS)
    for contender in (plain, *others):
        contender.begin()
        assert not contender.take_turn(None)
        assert contender.loop.launched == STEPS
    assert all(len(other.seconds) < len(plain.seconds) for other in others)
    assert decoding.equal_steps(plain.loop, others[-2].loop, model.config.audio_delay) == STEPS
    assert (others[-2].mode, others[-2].head_rows) == (BOTH, "full")


def test_equal_steps_stops_at_the_first_difference(model: LanguageModel) -> None:
    decoder, delay = decoding.library_decoder(model, STEPS), model.config.audio_delay
    loops = [decoding.library_loop(decoder, BOTH, STEPS) for _ in range(2)]
    for loop in loops:
        for _ in loop.run():
            pass
    assert decoding.equal_steps(*loops, delay) == STEPS
    loops[0].audio_ids[5] += 1
    assert decoding.equal_steps(*loops, delay) == delay + 5
    loops[1].text_ids[3] += 1
    assert decoding.equal_steps(*loops, delay) == 3


def test_bar_adds_up_where_speech_is_hidden_by_decoding() -> None:
    metrics = {"prefill_seconds": 1.0, "decode_seconds": 4.0, "detokenizer_seconds": 3.0}
    metrics |= {"first_audio_seconds": 2.0, "output_audio_seconds": 9.0}
    for total, speech, other in ((5.5, 0.5, 0.0), (8.5, 3.0, 0.5)):
        bar = report._bar(metrics | {"total_seconds": total})
        assert bar == {"prefill": 1.0, "decode": 4.0, "detokenizer": speech, "other": other}


def test_random_weights(tmp_path: Path) -> None:
    arguments = ["--random", "tiny", "--device", "cpu", "--steps", STEPS, "--runs", 1, "--long-run"]
    files = ["--json", "r.json", "--plot", "r.png", "--profile", "t.json"]
    done = bench(*arguments, *files, "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= COLUMNS
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["about"]["threads"] == 1 and results["about"]["dtype"] == "float32"
    assert results["long_run"]["steps"] == decoding.LONG_RUN_STEPS
    assert results["bandwidth"] > 0 and len(results["speech"]) == 2
    assert len(results["encoders"]) == 3 and len(results["requests"]) == 3
    assert results["profile"]["steps"] > 0 and (tmp_path / "t.json").is_file()
    assert "load: random weights are made" in done.stdout and "to first audio" in done.stdout
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_whole_requests(script: ModuleType, golden: Path, tmp_path: Path, capsys) -> None:
    question = golden / "e2e" / "audio" / "station.wav"
    path = tmp_path / "w.json"
    arguments = ["--weights", ROOT / "weights" / "mini", "--audio", question, "--json", path]
    assert run_main(script, *arguments) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= COLUMNS
    results = json.loads(path.read_text())
    text, speech, _ = (row["metrics"] for row in results["requests"])
    assert "detokenizer_seconds" in speech and "detokenizer_seconds" not in text
    for name in ("prompt", "encoders", "prefill", "decode", "total"):
        assert text[f"{name}_seconds"] > 0
    cold = results["cold_start"]
    parts = ("import", "load", "warm_up", "first_request")
    assert cold["total_seconds"] == pytest.approx(sum(cold[f"{p}_seconds"] for p in parts))
    assert cold["from_files"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized(scheme: str, script: ModuleType, tmp_path: Path, capsys) -> None:
    """The plain loop has the same values in float32, reads more, and chooses the same tokens."""
    path = tmp_path / "q.json"
    arguments = ["--random", "tiny", "--quantization", scheme, "--json", path]
    assert run_main(script, *arguments) == 0
    assert "quantization  " in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["about"]["quantization"] == scheme
    assert results["cold_start"]["first_request_metrics"]["quantization"] == scheme
    plain, *_, ours, _ = results["decoding"]["modes"]
    assert (ours["name"], ours["head_rows"]) == (BOTH.name, "full")
    assert ours["bytes_per_step"] < plain["bytes_per_step"]
    assert results["decoding"]["equal_steps"] == STEPS


def test_language_model_alone(script: ModuleType, golden: Path, capsys) -> None:
    """A checkpoint without the other parts still gets its decode steps measured."""
    assert run_main(script, "--weights", golden / "llm") == 0
    shown = capsys.readouterr()
    assert "no whole requests" in shown.err and "tiktoken.model" in shown.err
    assert "Decode steps" in shown.out and "Speech" not in shown.out


def test_bad_checkpoints(script: ModuleType, tmp_path: Path, capsys) -> None:
    assert run_main(script, "--weights", tmp_path) == 1
    assert "config.json" in capsys.readouterr().err.splitlines()[-1]
    copy = tmp_path / "mini"
    shutil.copytree(ROOT / "weights" / "mini", copy)
    (copy / "vocoder" / "config.json").write_text("{}")
    assert run_main(script, "--weights", copy) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bench: cold start failed") and "vocoder/config.json" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--weights"),
        (("--random", "tiny", "--steps", 3), "--steps"),
        (("--random", "tiny", "--json", "nowhere/r.json"), "nowhere"),
        (("--weights", ".", "--audio", "missing.wav"), "missing.wav"),
        (("--random", "tiny", "--profile", "nowhere/t.json"), "nowhere"),
        (("--weights", ".", "--prepared", "kept"), "no effect without --variants"),
        (
            ("--random", "tiny", "--variants", "all", "--prepared", "kept"),
            "no effect with --random",
        ),
    ],
)
def test_usage(arguments: tuple, message: str, tmp_path: Path) -> None:
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_help_has_examples(tmp_path: Path) -> None:
    shown = bench("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "examples:" in shown.stdout and "Exit status" in shown.stdout
