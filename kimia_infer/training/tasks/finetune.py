"""Fine-tuning of the language model: settings to a finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from tqdm import tqdm

from kimia_infer.data.checking import hold_out
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.components import (
    checked_text_tokenizer,
    understanding_components,
)
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.layout import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.published import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes, speech_tokenizer_component
from kimia_infer.models.kimi_audio.whisper import feature_extractor
from kimia_infer.training.adapters import lora_config
from kimia_infer.training.config import ConfigError, FinetuneSettings
from kimia_infer.training.dataset import Samples, check_lines
from kimia_infer.training.feature_cache import FeatureCache
from kimia_infer.training.model_files import Source, build_network, write_adapter, write_model
from kimia_infer.training.network import StreamDropout, TrainingNetwork
from kimia_infer.training.parallel import start
from kimia_infer.training.run_directory import checkpoint_to_resume, finish, note_settings
from kimia_infer.training.samples import EncodeSpeech, SampleBuilder
from kimia_infer.training.trainer import Outcome, Trainer
from kimia_infer.weights.resolve import resolve_weights

if TYPE_CHECKING:
    from peft import LoraConfig


def finetune(settings: FinetuneSettings, resume: bool = False) -> Outcome:
    """Run or, with ``resume``, continue a fine-tuning; ``output/final`` is what it gives.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError, TrainingError: what is wrong with
            the settings, the data, the model or the run.
    """
    state = start(settings.device)
    checkpoint = checkpoint_to_resume(settings, resume)
    adapters = None
    if settings.method == "qlora" and state.num_processes > 1:
        raise ConfigError("method: qlora is for one process; use lora, whose weights are divided")
    if settings.method != "full":
        adapters = lora_config(settings.lora, settings.trained_parts, settings.model)
    directory = resolve_weights(settings.model, detokenizer=False)
    source = Source.open(directory)
    samples, held_out = read_data(settings, directory)
    network = _network(settings, source, adapters, state)
    if settings.feature_dropout or settings.code_dropout:
        blank = samples.builder.special.text_blank
        network.stream_dropout = StreamDropout(
            settings.feature_dropout, settings.code_dropout, blank
        )
    if settings.feature_cache is not None:
        root = Path(settings.feature_cache)
        samples, held_out = _with_stored_features((samples, held_out), root, network, state)
    if adapters is not None:
        write = partial(write_adapter, network=network, config=adapters, state=state)
    else:
        with_whisper = "whisper" in settings.trained_parts
        write = partial(
            write_model, network=network, source=source, with_whisper=with_whisper, state=state
        )
    if state.is_main_process:
        note_settings(settings)
    lengths = samples.lengths if settings.group_by_length else None
    trainer = Trainer(settings, state, network, samples, held_out, write, lengths)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    outcome = trainer.run()
    if outcome.complete and state.is_main_process:
        finish(outcome.checkpoint, Path(settings.output))
    state.wait_for_everyone()
    return outcome


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
    rest, first = hold_out(usable.lines, settings.eval_ratio, str(file.path), "line")
    held_out = replace(usable, lines=first) if first else None
    return replace(usable, lines=rest), held_out


def _with_stored_features(
    both: tuple[Samples, Samples | None], root: Path, network: TrainingNetwork, state: PartialState
) -> tuple[Samples, Samples | None]:
    """The samples reading Whisper features from ``root``, where all of them are then."""
    cache = FeatureCache(root, network.whisper, network.dtype)
    given = [samples for samples in both if samples is not None]
    sounds = (sound for samples in given for sound in samples.sounds())
    cache.fill(sounds, network.whisper_features, given[0].builder.extractor, state)
    reading = [replace(s, builder=replace(s.builder, read_features=cache.read)) for s in given]
    return reading[0], reading[1] if both[1] is not None else None


def make_builder(settings: FinetuneSettings, directory: Path) -> SampleBuilder:
    """Builds samples with the tokenizers of ``directory``; codes that lack are computed."""
    config = LanguageModelConfig.from_directory(directory)
    tokenizer = checked_text_tokenizer(directory)
    whisper = understanding_components(directory)["whisper"]
    mels = whisper.store.tensors["conv1.weight"].shape[1]
    return SampleBuilder(
        tokenizer.encode,
        tokenizer.special,
        config,
        feature_extractor(directory / WHISPER_FOLDER, mels),
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
            component = speech_tokenizer_component(self.directory)
            module = component.load(torch.device("cpu"), torch.float32)
            self._encode = SpeechCodes(module, self.directory).encode
        return self._encode(wave)


def _network(
    settings: FinetuneSettings, source: Source, adapters: LoraConfig | None, state: PartialState
) -> TrainingNetwork:
    precision = settings.precision or ("fp32" if state.device.type == "cpu" else "bf16")
    elements = sum(component.elements for component in source.children.values())
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
            quantized=settings.method == "qlora",
        )
