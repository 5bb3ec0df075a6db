"""Scores of the miniature on held-out conversations.

Answers are greedy. Spoken answers are transcribed by a recognizer that is independent of the model.
Ablations remove inputs that a correct pipeline needs, which has to lower the scores.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import jiwer
import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from kimia_infer.api.engine import HeadRows
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, DataError
from kimia_infer.engine.generation import Generation
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.prompt import parse_messages
from scripts.miniature.recognizer import SpeechRecognizer, understands
from scripts.miniature.spoken_world import ANSWER_RATE, read_lines
from scripts.miniature.world import unknown
from scripts.miniature.world.whole import KINDS

HELD_OUT_SETS = ("held_out", "held_out_voices")

ANSWERED = ("question", "dialogue", "unknown", "sound")
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
    """Text and speech codes (from 0) of an answer, and what was recognized in its speech."""

    case: Case
    text: str
    codes: tuple[int, ...] = ()
    heard: str = ""
    ended: bool = True


Load = Callable[..., KimiAudio]
""":func:`load_model` for one checkpoint."""


def read_cases(path: Path, kinds: Sequence[str], limit: int) -> list[Case]:
    """At most ``limit`` cases of each of ``kinds`` from a set of a world."""
    counts, cases = dict.fromkeys(kinds, 0), []
    for line in read_lines(path):
        kind, (*chats, answer) = line["kind"], line["conversation"]
        if counts.get(kind, limit) < limit:
            counts[kind] += 1
            text = answer["content"]
            text = text if isinstance(text, str) else text[1]
            cases.append(Case(kind, chats, text, line["task_type"] != UNDERSTANDING))
    return cases


def load_model(
    directory: Path,
    head_rows: HeadRows = "track",
    audio_delay: int | None = None,
    quantization: str | None = None,
    kv_cache: str | None = None,
) -> KimiAudio:
    """The checkpoint on the CPU; ``audio_delay`` replaces the one that it was trained with."""
    cpu = torch.device("cpu")
    components = load_components(directory, True, cpu, torch.float32, quantization=quantization)
    if audio_delay is not None:
        model = components.language_model
        model.config = replace(model.config, audio_delay=audio_delay)
    return KimiAudio.from_components(components, head_rows=head_rows, kv_cache=kv_cache)


def answer(model: KimiAudio, case: Case, ablation: str = "none") -> Answer:
    """The answer to one case by :func:`answer_all`."""
    return answer_all(model, [case], ablation)[0]


def answer_all(
    model: KimiAudio, cases: Sequence[Case], ablation: str = "none", title: str = "Answers"
) -> list[Answer]:
    """The greedy answers to ``cases`` under an ablation, as many at a time as there are slots.

    "features" zeroes the Whisper features of all audio, "codes" shuffles the speech codes that
    these belong to, "request" asks with the token of the other kind of answer.
    """
    decoder = model.decoder
    asked: list[Generation] = []
    with tqdm(total=len(cases), desc=title, unit=" answers", disable=None) as bar:
        while len(asked) < len(cases) or decoder.running:
            while len(asked) < len(cases) and len(decoder.running) < decoder.slots:
                asked.append(_generation(model, cases[len(asked)], ablation))
                for _ in decoder.begin(asked[-1]):
                    pass
            for generation, progress in decoder.step():  # what is released comes no more
                if generation.broken:
                    raise FloatingPointError("the logits of an answer are not finite")
                if progress.finished:
                    decoder.release(generation)
                    bar.update()
    return [_answer(model, *pair) for pair in zip(cases, asked, strict=True)]


def _generation(model: KimiAudio, case: Case, ablation: str) -> Generation:
    """The request of ``case`` under an ablation."""
    in_text, in_speech = (
        parse_parameters(output_type=output, max_new_tokens=MOST_STEPS)
        for output in ("text", "both")
    )
    asked = in_speech if case.spoken != (ablation == "request") else in_text
    prompt, features = model.encode_chat(parse_messages(case.chats), asked)
    if ablation == "codes":
        ids, heard = torch.tensor(prompt.audio_ids), torch.tensor(prompt.is_continuous)
        order = torch.randperm(int(heard.sum()), generator=torch.Generator().manual_seed(0))
        ids[heard] = ids[heard][order]
        prompt = replace(prompt, audio_ids=ids.tolist())
    if ablation == "features" and features is not None:
        features = torch.zeros_like(features)
    parameters = in_speech if case.spoken else in_text
    return model.generation(prompt, features, parameters, SeededRandomness(0))


def _answer(model: KimiAudio, case: Case, generation: Generation) -> Answer:
    offset = model.kimia_token_offset
    codes = tuple(token - offset for token in generation.audio_ids if token >= offset)
    text = model.detokenize_text(generation.text_ids)
    return Answer(case, text, codes, ended=generation.ended)


def speak(model: KimiAudio, case: Case) -> tuple[Tensor | None, str]:
    """Waveform [1, samples] and text of a spoken answer, sampled as by default."""
    arguments = {"max_new_tokens": MOST_STEPS, "seed": 0}
    return model.generate(case.chats, output_type="both", **arguments)


def word_errors(answers: Sequence[Answer]) -> float:
    """Word error rate of the texts."""
    return jiwer.wer([a.case.text for a in answers], [a.text for a in answers])


def right(answers: Sequence[Answer]) -> float:
    """Share of the answers with exactly the expected text."""
    return fmean(a.text == a.case.text for a in answers)


def at_a_loss(answers: Sequence[Answer]) -> float:
    """Share of the answers that say that the question is not understood."""
    return fmean(a.text == unknown.ANSWER for a in answers)


def spoken_right(answers: Sequence[Answer]) -> float:
    """Share of the answers whose speech was recognized as the expected text."""
    return _share(a.heard == a.case.text for a in answers if understands(a.case.text))


def agreement(answers: Sequence[Answer]) -> float:
    """Share of the answers whose text equals what was recognized in their speech."""
    return _share(a.heard == a.text for a in answers if understands(a.case.text))


def _share(holds: Iterable[bool]) -> float:
    """Of those that are True; 0 of none."""
    found = list(holds)
    return fmean(found) if found else 0.0


def recognizable(wave: Tensor) -> np.ndarray:
    """Speech of the model [1, samples] as the recognizer needs it, [samples] at 16 kHz."""
    return soxr.resample(wave.reshape(-1).numpy(), ANSWER_RATE, SAMPLE_RATE)


def hear_all(
    model: KimiAudio, recognizer: SpeechRecognizer, answers: Sequence[Answer]
) -> list[Answer]:
    """The answers with what is recognized in each, spoken from different noise.

    What the recognizer cannot know is left out.
    """
    heard = []
    for seed, given in enumerate(answers):
        if given.case.spoken and given.codes and understands(given.case.text):
            wave = recognizable(model.detokenize_audio(torch.tensor([given.codes]), seed=seed))
            said = "answer" if given.case.kind in ANSWERED else "anything"
            given = replace(given, heard=recognizer.hear(wave, said))
        heard.append(given)
    return heard


def measure(load: Load, world: Path, limit: int = 100) -> dict:
    """The figures of a miniature, as shares of 1; at most ``limit`` cases of each kind.

    ``world`` is the folder of the spoken small world. Ablations are compared with "none".
    """
    model, recognizer = load(), SpeechRecognizer()

    def answers(
        name: str, kinds: Sequence[str], ablation: str = "none", model: KimiAudio = model
    ) -> list[Answer]:
        path = world / f"{name}.jsonl"
        cases = read_cases(path, kinds, limit)
        if missing := set(kinds) - {case.kind for case in cases}:
            raise DataError(f"{path}: no {', '.join(sorted(missing))}")
        title = f"{name}, ablation: {ablation}"
        return hear_all(model, recognizer, answer_all(model, cases, ablation, title))

    sets = {name: answers(name, tuple(KINDS)) for name in HELD_OUT_SETS}
    # Held-out voices need every input that an ablation removes.
    voices = HELD_OUT_SETS[-1]
    ablations = {"none": understood(sets[voices])}
    for name in ABLATIONS:
        changed = load(audio_delay=0) if name == "delay" else model
        ablations[name] = understood(answers(voices, ASKED, name, changed))
    full = load(head_rows="full")
    some = read_cases(world / "held_out.jsonl", tuple(KINDS), max(1, limit // 4))
    return {
        "sets": {name: scores(given) for name, given in sets.items()},
        "ablations": ablations,
        "long_recording": measure_long(model, world, LONG_SECONDS),
        "same_tokens_with_full_heads": answer_all(full, some) == answer_all(model, some),
    }


def scores(answers: Sequence[Answer]) -> dict:
    """Scores of each kind, and agreement over all spoken answers."""
    values: dict = {}
    for kind in KINDS:
        some = _of(answers, kind)
        values[kind] = {
            "count": len(some), "word_errors": word_errors(some), "right": right(some),
            "at_a_loss": at_a_loss(some),
        }  # fmt: skip
        if kind != "transcription":
            values[kind] |= {"agreement": agreement(some), "spoken_right": spoken_right(some)}
    return values | {"agreement": agreement([a for a in answers if a.case.spoken])}


def understood(answers: Sequence[Answer]) -> dict[str, float]:
    """Scores of transcriptions and questions."""
    questions = _of(answers, "question")
    return {
        "all_right": right(_of(answers, *ASKED)),
        "word_errors": word_errors(_of(answers, "transcription")),
        "right": right(questions),
        "spoken_right": spoken_right(questions),
    }


def _of(answers: Sequence[Answer], *kinds: str) -> list[Answer]:
    return [given for given in answers if given.case.kind in kinds]


def measure_long(model: KimiAudio, world: Path, seconds: float) -> dict[str, float]:
    """Word error rate of one recording of many held-out sentences, and of each sentence alone."""
    cases = read_cases(world / "held_out.jsonl", ("transcription",), 1000)
    pause = np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)
    waves, chosen, length = [], [], 0
    for case in itertools.cycle(cases):
        wave = load_audio(case.chats[-1]["content"])
        length += len(wave) + len(pause)
        if length > seconds * SAMPLE_RATE:
            break
        waves += [wave, pause]
        chosen.append(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        write_wav(path, np.concatenate(waves), SAMPLE_RATE)
        text = model.transcribe(str(path)).text
    return {
        "seconds": length / SAMPLE_RATE,
        "word_errors": jiwer.wer(" ".join(case.text for case in chosen), text),
        "alone": word_errors(answer_all(model, chosen)),
    }
