"""What all commands have in common: help, refusals, interruption, and names they only repeat."""

from __future__ import annotations

import importlib.util
import re
import resource
import signal
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest

from kimia_infer.commands import evaluate, parser, serve, train_codec
from kimia_infer.commands.main import COMMANDS, EXTRAS, main, run_command
from kimia_infer.commands.timings import summarize
from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.serving.cog.inputs import CogInputs
from tests.paths import ROOT

SCRIPTS = sorted(
    path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix
)
UNOFFERED = {"history-audio", "stop-repetition", "timeout-seconds"}
"""Inputs that come from the history file, or that a service does not offer."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = PROJECT["optional-dependencies"]
ENTRY = "import sys; from kimia_infer.commands.main import main; sys.exit(main())"


def bare(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A run in an interpreter in which nothing is installed."""
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={"PATH": ""})


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_explain_themselves_at_once_and_anywhere(name: str) -> None:
    before = cpu_seconds()
    done = bare(f"scripts/{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    assert done.stderr == ""
    assert cpu_seconds() - before < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_explain_themselves_at_once_and_anywhere(name: str) -> None:
    done = bare("-c", ENTRY, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: kimi-audio {name} " in done.stdout
    assert len(done.stdout.splitlines()) <= 70


def test_the_list_of_commands() -> None:
    for arguments in ([], ["--help"]):
        done = bare("-c", ENTRY, *arguments)
        assert done.returncode == 0
        assert all(f"  {name} " in done.stdout for name in COMMANDS)
    done = bare("-c", ENTRY, "sing")
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "expected a command" in line and "'sing'" in line


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_argument_is_refused_in_one_line(name: str) -> None:
    known = {
        "evaluate": ["--output", "x"],
        "extract-codes": ["a", "b", "--model", "c"],
        "convert-manifest": ["a", "b"],
        "make-data": ["a", "--output", "x"],
        "export": ["a", "b"],
        "prepare": ["a", "b"],
        "transcribe": ["a"],
        "batch": ["codes", "a", "b"],
        "clone": ["a", "b"],
        "edit": ["a", "--vad"],
        "finetune": ["a=b"],
        "finetune-kokoro": ["a=b"],
        "train-codec": ["vocoder", "a=b"],
    }
    done = bare("-c", ENTRY, name, *known.get(name, []), "--hepl")
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line == (
        f"kimi-audio {name}: unknown argument --hepl; did you mean --help? (see --help)"
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "download: interrupted; the same command continues"),
        (parser.UsageError("a: wrong"), 2, "download: a: wrong"),
        (
            ModuleNotFoundError("No module named 'jiwer'", name="jiwer"),
            1,
            "download: No module named 'jiwer'; install it with: pip install 'kimia-infer[eval]'",
        ),
        (FileNotFoundError(2, "No such file", "x"), 1, "download: x: No such file"),
        (
            OSError(28, "No space left on device", "a/b.json"),
            1,
            "download: a/b.json: No space left on device; make room for the output",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_a_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare() -> None:
        raise error

    assert run_command("download", [], "scripts/download", prepare) == status
    assert capsys.readouterr() == ("", f"{line}\n")


def test_extras_that_messages_name_are_those_that_install_it() -> None:
    for package, extra in EXTRAS.items():
        assert any(line.startswith(package.replace("_", "-")) for line in DECLARED[extra])


def test_a_server_says_which_extra_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "silero_vad" else find_spec(name)
    )
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert run_command("serve", ["--weights", "nowhere/known"], "kimi-audio serve") == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == (
        "kimi-audio serve: No module named 'silero_vad'; install it with: "
        "pip install 'kimia-infer[serve]'\n"
    )


@pytest.mark.parametrize(
    ("program", "options", "port"),
    [
        ("kimi-audio serve", (), 8000),
        ("scripts/serve", ("--openai",), 8000),
        ("scripts/serve", (), 5000),
        ("kimi-audio serve", ("--cog",), 5000),
        ("kimi-audio serve", ("--port", "0"), 0),
    ],
)
def test_each_server_has_a_port_of_its_own(
    program: str, options: tuple[str, ...], port: int
) -> None:
    asked = parser.Parser(prog=program)
    serve.add_arguments(asked)
    arguments = asked.parse_args(["--weights", "nowhere/known", *options])
    serve.check(asked, arguments)
    assert arguments.port == port


def test_a_fault_of_the_program_is_not_hidden() -> None:
    def prepare() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("download", [], "kimi-audio download", prepare)


def test_the_environment_is_set_up_after_the_arguments_were_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("evaluate", ["--output", "x"], "scripts/evaluate", pytest.fail)
    assert ended.value.code == 2
    assert "nothing to evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--kokoro", "auto"), "--kokoro"),
        (("--adapter", "."), "--adapter"),
        (("--slots", "2"), "--slots"),
        (("--adapter", ".", "--weights", "."), None),
        (("--quantization", "int4"), None),
        (("--openai", "--kokoro", "auto", "--weights", "."), None),
    ],
)
def test_what_the_predictor_of_editx_has_no_use_for_is_refused(
    arguments: tuple[str, ...],
    option: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("KIMI_AUDIO_WEIGHTS", raising=False)
    asked = parser.Parser(prog="scripts/serve")
    serve.add_arguments(asked)
    parsed = asked.parse_args(["--editx", "auto", *arguments])
    if option is None:
        serve.check(asked, parsed)
        return
    with pytest.raises(SystemExit):
        serve.check(asked, parsed)
    assert f"{option} has no effect with --editx" in capsys.readouterr().err


def test_a_server_is_asked_without_setting_up_an_environment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--url", "http://127.0.0.1:1", "--text", "Hi"]
    assert run_command("infer", arguments, "scripts/infer", pytest.fail) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_main_takes_its_arguments_from_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("audio,text\nnone.wav,hello\n")
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")]
    monkeypatch.setattr(sys, "argv", ["kimi-audio", "convert-manifest", *files])
    assert main() == 2
    assert "none.wav" in capsys.readouterr().err


def test_infer_offers_every_input_of_the_predictors() -> None:
    inputs = {name.replace("_", "-") for name in CogInputs.model_fields} - UNOFFERED
    done = bare("-c", ENTRY, "infer", "--help")
    assert all(f"\n  --{name} " in done.stdout for name in inputs)


def test_names_that_commands_repeat_are_those_of_the_library() -> None:
    from kimia_infer.data.recipes import RECIPES
    from kimia_infer.evaluation.items import METRICS
    from kimia_infer.training.tasks import config

    assert tuple(SCHEMES) == parser.QUANTIZATIONS
    assert tuple(RECIPES) == evaluate.RECIPES
    assert tuple(METRICS) == evaluate.METRICS
    for settings, _ in train_codec.COMPONENTS.values():
        assert hasattr(config, settings)


def test_timings_are_two_lines_in_the_order_of_the_stages() -> None:
    metrics = {
        "total_seconds": 0.5,
        "decode_seconds": 0.2,
        "encoders_seconds": 0.1,
        "prompt_seconds": 0.01,
        "load_audio_seconds": 0.02,
        "first_text_seconds": 0.15,
        "output_audio_seconds": 2.0,
    }
    assert summarize(metrics) == [
        "seconds: input 0.03, encoders 0.10, decode 0.20, total 0.50",
        "first text after 0.15 s, 2.00 s of speech, real-time factor 0.25",
    ]
    assert summarize({"predict_time": 1.0}) == []


def test_help_shows_the_settings_of_a_training() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "finetune", "--help"], capture_output=True, text=True
    )
    assert re.search(r"^  learning_rate\b.*", done.stdout, re.MULTILINE)


def test_model_arguments_are_named_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of a command line, or the variable that stands for it."""
    monkeypatch.setenv("KIMI_AUDIO_DEVICE", "cuda:98")
    for given, named in (("cuda:99", "--device"), (None, "KIMI_AUDIO_DEVICE")):
        with pytest.raises(parser.UsageError, match=f"^{named}: expected one of the devices here"):
            parser.model_arguments(Namespace(device=given))


def test_options_and_variables_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option takes the place of its variable."""
    monkeypatch.setenv("KIMI_AUDIO_SLOTS", "7")
    given = Namespace(slots=None, speech_device="cpu")
    arguments = parser.model_arguments(given)
    assert (arguments["slots"], arguments["speech_device"]) == (7, "cpu")
    assert parser.model_arguments(Namespace(slots=3))["slots"] == 3
    for wrong, named in (
        (Namespace(slots=0), "--slots"),
        (Namespace(speech_device="tpu"), "--speech-device"),
    ):
        with pytest.raises(parser.UsageError, match=f"^{named}: expected"):
            parser.model_arguments(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "packages"], "--source packages takes --model kokoro"),
        (["--model", "kokoro", "--text-only"], "--text-only is for Kimi-Audio"),
        (
            ["--model", "kokoro", "--source", "packages", "a/b"],
            "--source packages takes no repository",
        ),
    ],
)
def test_download_arguments_that_exclude_each_other(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command("download", arguments, "scripts/download_weights")
    assert message in capsys.readouterr().err
