"""Fine-tuning of the language model: settings to a finished run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig
from tqdm import tqdm

from kimia_infer.api.loading import check_vocabulary
from kimia_infer.language_model.config import LanguageModelConfig
from kimia_infer.tokenizer.speech import SpeechCodes, speech_tokenizer_part
from kimia_infer.tokenizer.text import TextTokenizer
from kimia_infer.tokenizer.whisper import encoder_config, feature_extractor
from kimia_infer.training.adapters import lora_config
from kimia_infer.training.building import WHISPER_FOLDER, Source, build_network
from kimia_infer.training.checkpoints import (
    MODEL,
    TrainingError,
    all_checkpoints,
    publish,
    read_facts,
)
from kimia_infer.training.config import FinetuneSettings, to_dict
from kimia_infer.training.conversations import ConversationFile
from kimia_infer.training.dataset import Samples, check_lines
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.training.parallel import start
from kimia_infer.training.samples import EncodeSpeech, SampleBuilder
from kimia_infer.training.servable import link_or_copy, write_adapter, write_model
from kimia_infer.training.trainer import Outcome, Trainer
from kimia_infer.weights.checkpoint import read_json
from kimia_infer.weights.published import SPEECH_TOKENIZER_FOLDER
from kimia_infer.weights.resolve import resolve_weights

FINAL, SETTINGS = "final", "settings.yaml"
FREE_TO_CHANGE = (
    "output",
    "model",
    "data",
    "eval_data",
    "audio_root",
    "device",
    "workers",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "gradient_checkpointing",
    "batch_size",  # with accumulation and processes; the product has to stay
    "accumulation",
)
"""Settings that a resumed run may change, because its steps do not depend on them; files may
have moved."""


def finetune(settings: FinetuneSettings, resume: bool = False) -> Outcome:
    """Run or, with ``resume``, continue a fine-tuning; ``output/final`` is what it gives.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError, TrainingError: what is wrong with
            the settings, the data, the model or the run.
    """
    state = start(settings.device)
    output = Path(settings.output)
    checkpoint = _place(output, settings, resume)
    adapters = None
    if settings.method == "lora":
        adapters = lora_config(settings.lora, settings.trained_parts, settings.model)
    directory = resolve_weights(settings.model, detokenizer=False)
    source = Source.open(directory)
    samples, held_out = read_data(settings, directory)
    network = _network(settings, source, adapters, state)
    if adapters is not None:
        write = partial(write_adapter, network=network, config=adapters, state=state)
    else:
        with_whisper = "whisper" in settings.trained_parts
        write = partial(
            write_model, network=network, source=source, with_whisper=with_whisper, state=state
        )
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(yaml.safe_dump(to_dict(settings), sort_keys=False))
    trainer = Trainer(settings, state, network, samples, held_out, write)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    outcome = trainer.run()
    if outcome.complete and state.is_main_process:
        _finish(outcome.checkpoint / MODEL, output / FINAL)
    state.wait_for_everyone()
    return outcome


def _place(output: Path, settings: FinetuneSettings, resume: bool) -> Path | None:
    """The checkpoint to continue from; TrainingError if the directory does not suit."""
    found = all_checkpoints(output)
    if not resume:
        if found:
            raise TrainingError(
                f"output: {output} holds {found[-1].name} of another run; continue it with "
                "--resume, or name another directory"
            )
        return None
    if not found:
        raise TrainingError(f"output: {output} holds no checkpoint to resume from")
    before, asked = read_facts(found[-1])["settings"], to_dict(settings)
    for name, value in asked.items():
        if name not in FREE_TO_CHANGE and before.get(name) != value:
            raise TrainingError(
                f"{name}: {value!r}, but {found[-1]} was trained with {before.get(name)!r}; "
                "resume with the same settings"
            )
    return found[-1]


def read_data(settings: FinetuneSettings, directory: Path) -> tuple[Samples, Samples | None]:
    """Training and evaluation data, checked line by line.

    Evaluation uses the first ``eval_ratio`` of the lines, at least one, as published; or those
    of ``eval_data``; or nothing where the ratio is 0.
    """
    file = ConversationFile(settings.data)
    builder = make_builder(settings, directory)
    skip = settings.bad_lines == "skip"
    lines = range(len(file))
    if settings.eval_data is not None:
        other = ConversationFile(settings.eval_data)
        held_out, _ = check_lines(other, builder, range(len(other)), skip)
        return check_lines(file, builder, lines, skip)[0], held_out
    usable, _ = check_lines(file, builder, lines, skip)
    if settings.eval_ratio == 0:
        return usable, None
    count = max(1, int(len(usable) * settings.eval_ratio))
    if count == len(usable):
        raise TrainingError(
            f"{file.path}: one line is not enough for training and evaluation; add lines, name "
            "eval_data, or set eval_ratio=0"
        )
    first, rest = usable.lines[:count], usable.lines[count:]
    return Samples(file, builder, rest), Samples(file, builder, first)


def make_builder(settings: FinetuneSettings, directory: Path) -> SampleBuilder:
    """Builds samples with the tokenizers of ``directory``; codes that lack are computed."""
    config = LanguageModelConfig.from_directory(directory)
    tokenizer = TextTokenizer(directory)
    check_vocabulary(tokenizer, config, directory)
    whisper = directory / WHISPER_FOLDER
    mels = encoder_config(read_json(whisper / "config.json"), whisper).num_mel_bins
    return SampleBuilder(
        tokenizer.encode,
        tokenizer.special,
        config,
        feature_extractor(whisper, mels),
        Path(settings.audio_root),
        min(settings.max_length, config.max_positions),
        LazySpeechCodes(directory / SPEECH_TOKENIZER_FOLDER),
        settings.spoken_answers,
    )


class LazySpeechCodes:
    """Computes codes on the CPU; the speech tokenizer is loaded when it is first needed."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._encode: EncodeSpeech | None = None

    def __call__(self, wave):
        if self._encode is None:
            part = speech_tokenizer_part(self.directory)
            module = part.load(torch.device("cpu"), torch.float32)
            self._encode = SpeechCodes(module, self.directory).encode
        return self._encode(wave)


def _network(
    settings: FinetuneSettings, source: Source, adapters: LoraConfig | None, state: PartialState
) -> TrainingNetwork:
    precision = settings.precision or ("fp32" if state.device.type == "cpu" else "bf16")
    elements = sum(part.elements for part in source.children.values())
    shown = state.is_main_process
    with tqdm(
        total=elements, desc="Loading weights", unit=" values", unit_scale=True, disable=not shown
    ) as bar:
        report: Callable[[int], None] = bar.update
        return build_network(
            source,
            state,
            torch.bfloat16 if precision == "bf16" else torch.float32,
            settings.trained_parts,
            adapters,
            settings.gradient_checkpointing,
            settings.seed,
            report,
        )


def _finish(model: Path, final: Path) -> None:
    """The last checkpoint's model under a name of its own, which outlives checkpoints."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for folder, _, names in os.walk(model):
        target = part / Path(folder).relative_to(model)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            link_or_copy(Path(folder) / name, target / name)
    publish(part, final)
