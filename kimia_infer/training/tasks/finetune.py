"""Fine-tuning of the language model: settings to a finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import (
    SPEECH_TOKENIZER_FOLDER,
    WHISPER_FOLDER,
    resolve_weights,
)
from kimia_infer.models.kimi_audio.components import (
    checked_text_tokenizer,
    understanding_components,
)
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import PADDING_FIELD, feature_extractor
from kimia_infer.training.adapters import lora_config
from kimia_infer.training.config import FinetuneConfig
from kimia_infer.training.dataset import Lines, Samples, check_lines, split_data
from kimia_infer.training.documents import DocumentBuilder, DocumentFile
from kimia_infer.training.feature_cache import FeatureCache
from kimia_infer.training.model_files import Components, build_network, write_adapter, write_model
from kimia_infer.training.network import StreamDropout, TrainingNetwork
from kimia_infer.training.run_directory import checkpoint_to_resume
from kimia_infer.training.samples import LazySpeechCodes, SampleBuilder
from kimia_infer.training.trainer import Trainer, TrainingResult
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.progress import progress

if TYPE_CHECKING:
    from peft import LoraConfig


def finetune(config: FinetuneConfig, resume: bool = False) -> TrainingResult:
    """Run or, with ``resume``, continue a fine-tuning; the model is in ``output/final``.

    Raises:
        ConfigurationError, DataError, CheckpointError, WeightsError, TrainingError: what is
            wrong with the settings, the data, the model or the run.
    """
    checkpoint = checkpoint_to_resume(config, resume)
    state = PartialState(cpu=config.device == "cpu")
    if config.method == "qlora" and state.num_processes > 1:
        raise ConfigurationError(
            "method: qlora is for one process; use lora, whose weights are divided"
        )
    adapters = None
    if config.method != "full":
        adapters = lora_config(config.lora, config.trained_components, config.model)
    directory = resolve_weights(config.model, detokenizer=False)
    components = understanding_components(directory)
    samples, validation = read_data(config, directory)
    padding = getattr(samples.builder.extractor, PADDING_FIELD)
    if state.num_processes > 1 and padding is not None:
        # Segments of several lengths: each process would call the encoder, which is divided among
        # them, another number of times.
        raise ConfigurationError(
            f"model: {WHISPER_FOLDER}/preprocessor_config.json has {PADDING_FIELD}; such a "
            f"checkpoint is trained in one process, not in {state.num_processes}"
        )
    network = _network(config, components, adapters, state)
    if config.feature_dropout or config.code_dropout:
        blank = samples.builder.special.text_blank
        network.stream_dropout = StreamDropout(config.feature_dropout, config.code_dropout, blank)
    if config.feature_cache is not None:
        cache = FeatureCache(
            Path(config.feature_cache), network.whisper, network.dtype, samples.builder.extractor
        )
        data = [part for part in (samples, validation) if part is not None]
        recordings = (path for part in data for path in part.recordings())
        cache.fill(recordings, network.whisper_features, state)
        for part in data:
            part.builder = replace(part.builder, read_features=cache.read)
    write: Callable[[Path], None] = partial(
        write_model,
        network=network,
        source=directory,
        components=components,
        with_whisper="whisper" in config.trained_components,
        state=state,
    )
    if adapters is not None:
        write = partial(write_adapter, network=network, config=adapters, state=state)
    lengths = samples.lengths if config.group_by_length else None
    trainer = Trainer(config, state, network, samples, validation, write, lengths)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer.run()


def read_data(config: FinetuneConfig, directory: Path) -> tuple[Samples, Samples | None]:
    """Training and validation data, checked line by line with the tokenizers of ``directory``."""
    model = LanguageModelConfig.from_directory(directory)
    tokenizer = checked_text_tokenizer(directory)
    whisper = understanding_components(directory)["whisper"]
    mels = whisper.store.tensors["conv1.weight"].shape[1]
    kind = DocumentBuilder if config.pretrain else SampleBuilder
    builder = kind(
        tokenizer.encode,
        tokenizer.special,
        model,
        feature_extractor(directory / WHISPER_FOLDER, mels),
        Path(config.audio_root),
        min(config.max_length, model.max_positions),
        LazySpeechCodes(directory / SPEECH_TOKENIZER_FOLDER),
        config.spoken_answers,
    )
    skip = config.bad_lines == "skip"

    def lines(data: str) -> Lines:
        file = ConversationFile(data)
        pretrains = isinstance(builder, DocumentBuilder)
        return DocumentFile(file, config.mix, builder, skip) if pretrains else file

    return split_data(config, lambda data: check_lines(lines(data), builder, skip))


def _network(
    config: FinetuneConfig,
    components: Components,
    adapters: LoraConfig | None,
    state: PartialState,
) -> TrainingNetwork:
    assert state.device is not None
    precision = config.precision or ("fp32" if state.device.type == "cpu" else "bf16")
    elements = sum(component.elements for component in components.values())
    hidden = not state.is_main_process
    with progress("Loading weights", elements, "values", unit_scale=True, disable=hidden) as bar:
        return build_network(
            components,
            state,
            torch.bfloat16 if precision == "bf16" else torch.float32,
            config.trained_components,
            adapters,
            config.gradient_checkpointing,
            config.seed,
            report=bar.update,
            quantized=config.method == "qlora",
        )
