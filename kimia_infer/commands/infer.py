"""Ask Kimi-Audio for one answer: the transcript goes to stdout, speech to a wav file.

    kimi-audio infer --weights weights/mini --audio question.wav --output reply.wav
    kimi-audio infer --task transcribe --audio lecture.mp3
    kimi-audio infer --output answers --audio question.wav another.wav
    kimi-audio infer --audio next.wav --history chat.json
    kimi-audio infer --url http://127.0.0.1:5000 --stream --play --audio question.wav

A history file lists earlier messages; their audio files are relative to it:
  [{"role": "user", "message_type": "audio", "content": "question.wav"},
   {"role": "assistant", "message_type": "audio-text", "content": ["reply.wav", "At ten."]}]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia_infer.commands.infer_files import DEFAULT_DIRECTORY, answer_files, check_files
from kimia_infer.commands.parser import (
    MODEL_ARGUMENTS,
    WEIGHTS_HELP,
    Parser,
    UsageError,
    add_kokoro,
    add_model,
    check_adapter,
    check_kokoro,
    model_arguments,
)
from kimia_infer.commands.timings import summarize
from kimia_infer.serving.cog.schema import read_inputs
from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.files import no_file

if TYPE_CHECKING:
    from kimia_infer.serving.client import Chunk, Prediction

FILES = ("audio", "history", "voice")

EPILOG = """\
With --url, KIMI_AUDIO_TOKEN is sent as bearer token; an interruption ends the answer there, too.
Exit status: 0 done, 1 the prediction failed or was refused, 2 usage, 130 interrupted."""

CONVERSIONS = {"integer": (int, "N"), "number": (float, "X")}


def add_arguments(parser: Parser) -> None:
    parser.usage = (
        "%(prog)s [--weights DIR | --url URL | --answer FILE] [--audio FILE] [--text TEXT] [...]"
    )
    parser.epilog = EPILOG
    source = parser.add_argument_group("who answers").add_mutually_exclusive_group()
    source.add_argument("--weights", help=f"{WEIGHTS_HELP} [KIMI_AUDIO_WEIGHTS]")
    source.add_argument("--url", help="address of a Cog server, instead of loading weights")
    source.add_argument("--answer", type=Path, metavar="FILE", help="a saved answer of Cog")
    add_question(parser.add_argument_group("the question"))
    add_sampling(parser.add_argument_group("sampling"))
    add_model(model := parser.add_argument_group("the model, with --weights"))
    add_kokoro(model)
    add_output(parser.add_argument_group("the answer"))


def add_question(group: Any) -> None:
    add = group.add_argument
    tasks = ("chat", "transcribe", "speak")
    add("--task", choices=tasks, metavar="TASK", help=f"{', '.join(tasks)} (a text) [chat]")
    add(
        "--audio",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="audio of the user's turn; several are answered each on its own",
    )
    add("--text", help="text of the user's turn, before the audio")
    add("--history", type=Path, metavar="FILE", help="JSON file with earlier messages")
    add("--output-type", choices=("text", "both"), help="text only, or text and speech [both]")
    add("--speaker", metavar="NAME", help="a voice of Kokoro, such as kokoro:af_heart")
    add("--voice", type=Path, metavar="FILE", help="answer in this voice: a recording of 1 to 30 s")


def add_sampling(group: Any) -> None:
    """The inputs that are numbers, with their help and defaults."""
    for name, schema in read_inputs("StreamingPredictor").items():
        if schema["type"] in CONVERSIONS:
            kind, letter = CONVERSIONS[schema["type"]]
            default = "" if schema["default"] is None else f" [{schema['default']}]"
            text = schema["description"] + default
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=letter, help=text)


def add_output(group: Any) -> None:
    add = group.add_argument
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"[answer.wav; with several --audio the directory {DEFAULT_DIRECTORY}]",
    )
    add("--metrics", action="store_true", help="print timings and all other metrics to stderr")
    add(
        "--stream",
        action="store_true",
        help="with a --url that streams: print text as it is generated",
    )
    add("--play", action="store_true", help="with --stream: play speech with ffplay or aplay")
    add(
        "--preset",
        choices=("low_latency", "quality"),
        metavar="NAME",
        help="low_latency or quality [low_latency]",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="X",
        help="seconds to wait, with --url [600]",
    )


def check(parser: Parser, arguments: Namespace) -> None:
    """Refuse combinations in which an argument would be ignored."""
    several = arguments.audio is not None and len(arguments.audio) > 1
    if arguments.output is None:
        arguments.output = DEFAULT_DIRECTORY if several else Path("answer.wav")
    given = given_inputs(arguments)
    if arguments.url is not None or arguments.answer is not None:
        for name in MODEL_ARGUMENTS:
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                parser.error(f"--{option} has no effect with --url or --answer")
    else:
        check_adapter(parser, arguments)
        if arguments.kokoro and not arguments.speaker:
            parser.error("--kokoro has no effect without --speaker")
        check_kokoro(parser, arguments)
        if arguments.speaker and not (arguments.kokoro or os.environ.get("KIMI_AUDIO_KOKORO")):
            parser.error("--speaker needs --kokoro auto, or a directory of Kokoro")
    if arguments.url is not None and not arguments.url.lower().startswith(("http://", "https://")):
        parser.error(f"--url: expected http://HOST:PORT or https://..., found {arguments.url!r}")
    if arguments.stream and arguments.url is None:
        parser.error("--stream needs --url")
    for name in ("play", "preset"):
        if getattr(arguments, name) and not arguments.stream:
            parser.error(f"--{name} has no effect without --stream")
    if arguments.answer is not None and given:
        parser.error(f"--{min(given).replace('_', '-')} has no effect with --answer")
    if arguments.answer is None and not given.keys() & {"audio", "text"}:
        parser.error("nothing to answer: give --audio, --text or both")
    for name in FILES:
        paths = given.get(name, [])
        for path in paths if isinstance(paths, list) else [paths]:
            if not path.is_file():
                parser.error(f"--{name}: {no_file(path)}")
    if several:
        check_files(parser, arguments)
        return
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no directory {arguments.output.parent}")
    if arguments.output_type != "text" and arguments.task != "transcribe":
        check_target(parser, arguments.output)


def check_target(parser: Parser, path: Path) -> None:
    """Refuse a file that cannot be written before anything is computed for it."""
    try:
        if path.is_file():
            path.open("ab").close()
        elif path.is_dir():
            parser.error(f"--output: {path} is a directory")
        elif not path.exists():
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        parser.error(f"--output: {path} cannot be written ({error.strerror})")


def given_inputs(arguments: Namespace) -> dict[str, Any]:
    """The inputs of a prediction that are on the command line."""
    names = [name for name in read_inputs("StreamingPredictor") if name != "history_audio"]
    values = {name: getattr(arguments, name) for name in names}
    if arguments.audio is not None and len(arguments.audio) == 1:
        (values["audio"],) = arguments.audio
    return {name: value for name, value in values.items() if value is not None}


def needs_packages(arguments: Namespace) -> bool:
    """Requests to a server and saved answers need the standard library alone."""
    return not (arguments.url or arguments.answer) or arguments.history is not None


def run(arguments: Namespace) -> int:
    given = given_inputs(arguments)
    if isinstance(given.get("audio"), list):
        return answer_files(arguments, given)
    if arguments.answer is not None:
        answer = from_file(arguments.answer)
    elif arguments.url is not None:
        answer = from_server(arguments)
    else:
        answer = from_model(arguments)
    if not arguments.stream:
        print(answer.text, flush=True)
    return 0 if report(answer, arguments) else 1


def report(answer: Prediction, arguments: Namespace) -> bool:
    """Write the speech to its file, and everything else but the text to stderr.

    Returns whether the speech could be written.
    """
    written = True
    for note in answer.notes:
        log(f"note: {note}")
    if answer.audio is not None:
        try:
            arguments.output.write_bytes(answer.audio)
            log(f"speech: {arguments.output}")
        except OSError as error:
            log(f"infer: --output: {arguments.output} cannot be written ({error.strerror})")
            written = False
    elif arguments.output_type != "text" and arguments.task != "transcribe":
        log(f"no speech: {answer.audio_reason or 'the answer is text'}")
    if arguments.metrics:
        for line in summarize(answer.metrics):
            log(line)
        for name, value in answer.metrics.items():
            log(f"  {name}: {value:.3f}" if isinstance(value, float) else f"  {name}: {value}")
    return written


def from_file(path: Path) -> Prediction:
    from kimia_infer.serving.client import PredictionError, parse_prediction

    try:
        return parse_prediction(path.read_bytes())
    except PredictionError as error:
        raise PredictionError(f"{path}: {error}") from error


def from_server(arguments: Namespace) -> Prediction:
    from kimia_infer.serving.client import data_uri, post_prediction, stream_prediction

    inputs = with_history(given_inputs(arguments))
    for name in {"audio", "voice"} & inputs.keys():
        inputs[name] = data_uri(inputs[name])
    if "history_audio" in inputs:
        inputs["history_audio"] = list(map(data_uri, inputs["history_audio"]))
    request = stream_prediction if arguments.stream else post_prediction
    token = os.environ.get("KIMI_AUDIO_TOKEN")
    answer = request(arguments.url, inputs, token=token, timeout=arguments.timeout, report=log)
    return show_stream(answer, arguments.play) if isinstance(answer, Iterator) else answer


def show_stream(chunks: Iterator[Chunk | Prediction], play: bool) -> Prediction:
    """Print the text and play the speech as they arrive; the last of ``chunks``."""
    from kimia_infer.serving.client import Prediction
    from kimia_infer.serving.player import Player

    player = Player() if play else None
    if player is not None and player.name is None:
        log("neither ffplay nor aplay is installed, so the speech is only saved")
    started = time.monotonic()
    seconds: dict[str, float] = {}
    answer = None
    try:
        for chunk in chunks:
            if isinstance(chunk, Prediction):
                answer = chunk
                print(flush=True)
                seconds["answered"] = time.monotonic() - started
                break
            for kind, content in (("first text", chunk.text), ("first speech", chunk.pcm)):
                if content:
                    seconds.setdefault(kind, time.monotonic() - started)
            print(chunk.text, end="", flush=True)
            if player is not None:
                player.play(chunk.pcm)
    except KeyboardInterrupt:
        if player is not None:
            player.stop()
        raise
    assert answer is not None, "a stream ends with a prediction or an error"
    log(", ".join(f"{kind} after {value:.2f} s" for kind, value in seconds.items()))
    if player is not None and not player.finish():
        log(f"{player.name} could not play; the speech is only saved")
    return answer


def from_model(arguments: Namespace) -> Prediction:
    """The answer of a model that is loaded here, as predict.py would give it."""
    from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
    from kimia_infer.serving.client import Prediction
    from kimia_infer.serving.cog.inputs import build_chat, parse_inputs, respond

    try:
        inputs = parse_inputs(with_history(given_inputs(arguments)))
        build_chat(inputs)  # fails at once if it can without a model
    except RequestError as error:
        raise UsageError(str(error)) from error
    weights = arguments.weights or weights_from_environment()

    from kimia_infer.api.kimia import KimiAudio  # imports PyTorch: seconds
    from kimia_infer.audio.files import wav_bytes
    from kimia_infer.utils.progress import progress

    listens = inputs.task == "transcribe"
    loading = model_arguments(arguments)
    speaks = not listens and inputs.output_type == "both"
    loading["load_detokenizer"] = speaks and not inputs.speaker
    if not inputs.speaker:
        loading |= {"kokoro": None, "kokoro_adapter": None}
    model = KimiAudio(weights, **loading)
    with progress("Generating", unit="seconds of audio" if listens else "steps") as bar:

        def advance(done: float, total: float) -> None:
            bar.total = round(total)
            bar.update(round(done) - bar.n)

        events: Iterator[Any] = respond(model, inputs, report=advance)
        *_, answer = events
    wav = getattr(answer, "wav", None)
    audio = None if wav is None else wav_bytes(wav, answer.sample_rate)
    reason = getattr(answer, "audio_reason", None)
    return Prediction(answer.text, audio, answer.metrics, reason, answer.notes)


def with_history(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with the history file replaced by its text and the files that it names.

    In the text, files are named by their index in ``history_audio``, as the predictor expects.
    """
    if "history" not in given:
        return dict(given)
    from kimia_infer.serving.cog.inputs import parse_history

    source: Path = given["history"]
    files: list[Path] = []

    def resolve(where: str, reference: Any) -> int:
        path = source.parent / reference if isinstance(reference, str) else None
        if path is None or not path.is_file():
            raise RequestError(f"{where}: {reference!r} is not an audio file beside it")
        files.append(path)
        return len(files) - 1

    try:
        messages = parse_history(source.read_text(encoding="utf-8"), resolve)
    except (RequestError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: {error}") from error
    return given | {"history": json.dumps(messages), "history_audio": files}


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
