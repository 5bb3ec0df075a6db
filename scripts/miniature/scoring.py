"""Scores of the miniature on held-out conversations.

Answers are greedy. Spoken answers are transcribed by a recognizer that is independent of the model.
Ablations remove inputs that a correct pipeline needs, which has to lower the scores.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soxr
import torch
from tqdm import tqdm

from kimia_infer.api.engine import HeadRows
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.api.parameters import Parameters, parse_parameters
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, ConversationFile, DataError
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.prompt import Prompt, parse_messages
from scripts.miniature.recognizer import SpeechRecognizer

KINDS = ("transcription", "question", "dialogue", "repeat", "read")
HELD_OUT_SETS = ("held_out", "held_out_voices")

ANSWERED = ("question", "dialogue")
"""Kinds with an answer that is not a repetition."""

ASKED = ("transcription", "question")
"""Kinds that ablations are measured on."""

ABLATIONS = ("features", "codes", "delay", "request")

LONG_SECONDS, PAUSE = 600, 0.5

MOST_STEPS = 400
"""Limit for one answer; the longest needs a fourth of it."""


@dataclass(frozen=True)
class Case:
    """A conversation without its last answer, whose expected ``text`` is scored."""

    kind: str
    chats: list[dict]
    text: str
    spoken: bool


@dataclass(frozen=True)
class Answer:
    """Text and speech codes (from 0) of one answer, and whether it has an end token."""

    text: str
    codes: tuple[int, ...]
    ended: bool


Answered = tuple[list[Case], list[Answer], list[str]]
"""Cases, their answers, and what was recognized in the spoken ones."""


def read_cases(path: Path, world: Path, kinds: Sequence[str], limit: int) -> list[Case]:
    """At most ``limit`` cases of each of ``kinds`` from a set of the world."""
    file = ConversationFile(path)
    counts = dict.fromkeys(kinds, 0)
    cases = []
    for index in range(len(file)):
        line = file.raw(index)
        kind = line["kind"]
        if counts.get(kind, limit) >= limit:
            continue
        counts[kind] += 1
        chats = [_placed(message, world) for message in line["conversation"]]
        answer = chats.pop()["content"]
        text = answer if isinstance(answer, str) else answer[1]
        cases.append(Case(kind, chats, text, line["task_type"] != UNDERSTANDING))
    return cases


def _placed(message: dict, world: Path) -> dict:
    kind, content = message["message_type"], message["content"]
    if kind == "audio":
        content = str(world / content)
    elif kind == "audio-text":
        content = [str(world / content[0]), content[1]]
    return {"role": message["role"], "message_type": kind, "content": content}


@dataclass(frozen=True)
class Serving:
    """How weights and key/value cache are stored in memory; None: as the checkpoint says."""

    quantization: str | None = None
    kv_cache: str | None = None


AS_STORED = Serving()


def load_model(
    directory: Path,
    head_rows: HeadRows = "track",
    audio_delay: int | None = None,
    serving: Serving = AS_STORED,
) -> KimiAudio:
    """The checkpoint on the CPU; ``audio_delay`` replaces the one that it was trained with."""
    cpu, scheme = torch.device("cpu"), serving.quantization
    components = load_components(directory, True, cpu, torch.float32, quantization=scheme)
    if audio_delay is not None:
        model = components.language_model
        model.config = replace(model.config, audio_delay=audio_delay)
    return KimiAudio.from_components(components, head_rows=head_rows, kv_cache=serving.kv_cache)


def answer(model: KimiAudio, case: Case, ablation: str = "none") -> Answer:
    """The greedy answer to ``case`` under an ablation.

    "features" zeroes the Whisper features of all audio, "codes" shuffles the speech codes that
    these belong to, "request" asks with the token of the other kind of answer.
    """
    asked = _parameters(case.spoken != (ablation == "request"))
    prompt, features = model.encode_chat(parse_messages(case.chats), asked)
    if ablation == "codes":
        prompt = replace(prompt, audio_ids=_shuffled(prompt))
    if ablation == "features" and features is not None:
        features = torch.zeros_like(features)
    parameters = _parameters(case.spoken)
    generation = model.generation(prompt, features, parameters, SeededRandomness(0))
    for _ in generation.run():
        pass
    offset = model.kimia_token_offset
    codes = tuple(token - offset for token in generation.audio_ids if token >= offset)
    return Answer(model.detokenize_text(generation.text_ids), codes, generation.ended)


def _shuffled(prompt: Prompt) -> list[int]:
    """The ids of the audio track with the speech codes in a random order."""
    ids, heard = torch.tensor(prompt.audio_ids), torch.tensor(prompt.is_continuous)
    order = torch.randperm(int(heard.sum()), generator=torch.Generator().manual_seed(0))
    ids[heard] = ids[heard][order]
    return ids.tolist()


def _parameters(speech: bool) -> Parameters:
    return parse_parameters(output_type="both" if speech else "text", max_new_tokens=MOST_STEPS)


def transcribed(cases: Sequence[Case], answers: Sequence[Answer]) -> float:
    """Word error rate."""
    return jiwer.wer([case.text for case in cases], [answer.text for answer in answers])


def right(cases: Sequence[Case], answers: Sequence[Answer]) -> float:
    """Share of the answers with exactly the expected text."""
    pairs = zip(cases, answers, strict=True)
    return sum(case.text == answer.text for case, answer in pairs) / len(cases)


def agreement(answers: Sequence[Answer], said: Sequence[str]) -> float:
    """Share of the answers whose text equals what was recognized in their speech."""
    pairs = zip(answers, said, strict=True)
    return sum(answer.text == heard for answer, heard in pairs) / len(answers)


def spoken_right(cases: Sequence[Case], said: Sequence[str]) -> float:
    """Share of the spoken answers that were recognized as the expected text."""
    return sum(case.text == heard for case, heard in zip(cases, said, strict=True)) / len(cases)


def hear_all(
    model: KimiAudio, recognizer: SpeechRecognizer, cases: Sequence[Case], answers: Sequence[Answer]
) -> list[str]:
    """What is recognized of each answer, each spoken from different noise; "" without speech."""
    said = []
    for seed, (case, given) in enumerate(zip(cases, answers, strict=True)):
        heard = ""
        if case.spoken and given.codes:
            wave = model.detokenize_audio(torch.tensor([given.codes]), seed=seed)
            assert model.detokenizer is not None
            rate = model.detokenizer.sample_rate
            wave = soxr.resample(wave.reshape(-1).numpy(), rate, SAMPLE_RATE)
            heard = recognizer.hear(wave, "answer" if case.kind in ANSWERED else "anything")
        said.append(heard)
    return said


def measure(directory: Path, world: Path, limit: int = 100, serving: Serving = AS_STORED) -> dict:
    """The figures of a miniature, as shares of 1; at most ``limit`` cases of each kind.

    ``world`` is the folder of the spoken small world. Ablations are compared with "none".
    """
    model, recognizer = load_model(directory, serving=serving), SpeechRecognizer()
    figures: dict = {"sets": {}, "ablations": {}}
    answered: Answered = ([], [], [])
    for name in HELD_OUT_SETS:
        answered = _answers(model, recognizer, world, name, KINDS, limit, "none")
        figures["sets"][name] = scores(answered)
    # Held-out voices need every input that an ablation removes.
    figures["ablations"]["none"] = understood(answered)
    for ablation in ABLATIONS:
        changed = model
        if ablation == "delay":
            changed = load_model(directory, audio_delay=0, serving=serving)
        answered = _answers(changed, recognizer, world, HELD_OUT_SETS[-1], ASKED, limit, ablation)
        figures["ablations"][ablation] = understood(answered)
    figures["long_recording"] = measure_long(model, world, LONG_SECONDS)
    figures["same_tokens_with_full_heads"] = _same_tokens(
        load_model(directory, "full", serving=serving), model, world, max(1, limit // 4)
    )
    return figures


def scores(answered: Answered) -> dict:
    """Scores of each kind, and agreement over all spoken answers."""
    values: dict = {}
    for kind in KINDS:
        cases, answers, said = _of(answered, lambda case, kind=kind: case.kind == kind)
        values[kind] = {"count": len(cases), "word_errors": transcribed(cases, answers)}
        values[kind]["right"] = right(cases, answers)
        if cases[0].spoken:
            values[kind]["agreement"] = agreement(answers, said)
            values[kind]["spoken_right"] = spoken_right(cases, said)
    _, answers, said = _of(answered, lambda case: case.spoken)
    values["agreement"] = agreement(answers, said)
    return values


def understood(answered: Answered) -> dict[str, float]:
    """Scores of transcriptions and questions."""
    both, written, asked = (
        _of(answered, lambda case, kinds=kinds: case.kind in kinds)
        for kinds in (ASKED, ASKED[:1], ASKED[1:])
    )
    return {
        "all_right": right(*both[:2]),
        "word_errors": transcribed(*written[:2]),
        "right": right(*asked[:2]),
        "spoken_right": spoken_right(asked[0], asked[2]),
    }


def _of(answered: Answered, chosen: Callable[[Case], bool]) -> Answered:
    rows: list[Any] = [row for row in zip(*answered, strict=True) if chosen(row[0])]
    cases, answers, heard = ([row[column] for row in rows] for column in range(3))
    return cases, answers, heard


def measure_long(model: KimiAudio, world: Path, seconds: float) -> dict[str, float]:
    """Word error rate of one recording of many held-out sentences, and of each sentence alone."""
    cases = read_cases(world / "held_out.jsonl", world, ("transcription",), 1000)
    pause = np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)
    sounds, chosen, length = [], [], 0
    for case in itertools.cycle(cases):
        wave = load_audio(case.chats[-1]["content"])
        length += len(wave) + len(pause)
        if length > seconds * SAMPLE_RATE:
            break
        sounds += [wave, pause]
        chosen.append(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        write_wav(path, np.concatenate(sounds), SAMPLE_RATE)
        text = model.transcribe(str(path)).text
    return {
        "seconds": length / SAMPLE_RATE,
        "word_errors": jiwer.wer(" ".join(case.text for case in chosen), text),
        "alone": transcribed(chosen, [answer(model, case) for case in chosen]),
    }


def _same_tokens(full: KimiAudio, model: KimiAudio, world: Path, limit: int) -> bool:
    """Whether full heads give the same answers."""
    cases = read_cases(world / "held_out.jsonl", world, KINDS, limit)
    return all(answer(full, case) == answer(model, case) for case in cases)


def _answers(
    model: KimiAudio,
    recognizer: SpeechRecognizer,
    world: Path,
    name: str,
    kinds: Sequence[str],
    limit: int,
    ablation: str,
) -> Answered:
    path = world / f"{name}.jsonl"
    cases = read_cases(path, world, kinds, limit)
    if missing := set(kinds) - {case.kind for case in cases}:
        raise DataError(f"{path}: no {', '.join(sorted(missing))}")
    title = f"{name}, ablation: {ablation}"
    answers = [answer(model, case, ablation) for case in tqdm(cases, title, unit=" answers")]
    return cases, answers, hear_all(model, recognizer, cases, answers)
