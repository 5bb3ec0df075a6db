"""The networks of a checkpoint directory, loaded strictly; no code of the checkpoint runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimia_infer.layers.operators import use_onednn
from kimia_infer.models.step_audio_editx import vq02, vq06
from kimia_infer.models.step_audio_editx.config import (
    LanguageModelConfig,
    RecognizerConfig,
    SoundConfig,
)
from kimia_infer.models.step_audio_editx.flow import Flow
from kimia_infer.models.step_audio_editx.hift import Vocoder, vocoder_slots
from kimia_infer.models.step_audio_editx.language_model import LanguageModel
from kimia_infer.models.step_audio_editx.layout import (
    CENTERS_NAME,
    MODEL_FOLDER,
    RECOGNIZER_FOLDER,
    SOUND_FOLDER,
    SPEAKER_NAME,
    TOKENIZER_FOLDER,
    VQ06_NAME,
)
from kimia_infer.models.step_audio_editx.onnx_weights import CODEBOOK, POSITIONS, read_onnx_weights
from kimia_infer.models.step_audio_editx.packing import VQ02_CODES, VQ06_CODES
from kimia_infer.models.step_audio_editx.speaker import SpeakerEncoder
from kimia_infer.models.step_audio_editx.text_tokenizer import TextTokenizer
from kimia_infer.models.step_audio_editx.variants import load_language_model
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, plain_component
from kimia_infer.weights.tensors import TensorStore, open_pickle

HEAD_SIZE = 64
"""Of VQ06's encoder, whose file does not say how many heads there are."""


@dataclass(frozen=True)
class Networks:
    """Everything that answers a request. The language model alone is in the dtype of serving."""

    tokenizer: TextTokenizer
    language_model: LanguageModel
    vq02: vq02.Vq02
    vq06: vq06.Vq06
    speaker: SpeakerEncoder
    flow: Flow
    vocoder: Vocoder


def load_networks(
    directory: Path, device: torch.device, dtype: torch.dtype, variant: str = "none"
) -> Networks:
    """All networks for inference on ``device``, the language model in ``dtype``.

    ``variant`` is how its matrices are kept, see ``variants``.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is missing, has another shape, or
            has no place in its network.
    """
    folder = directory / MODEL_FOLDER
    sound, recognizer = folder / SOUND_FOLDER, directory / TOKENIZER_FOLDER
    config = SoundConfig.from_directory(sound)
    tokenizer = checked_tokenizer(folder)
    encoding = vq02_component(recognizer / RECOGNIZER_FOLDER)
    flowing, voicing = flow_component(sound), vocoder_component(sound)
    speaker = SpeakerEncoder(sound / SPEAKER_NAME, config.flow.speaker)
    # All headers are checked by now. The language model takes longest to read, and comes last.
    encoder = encoding.load(device, torch.float32)
    normalization = vq02.Normalization.from_file(recognizer / RECOGNIZER_FOLDER / "am.mvn")
    centers = read_centers(recognizer / CENTERS_NAME, encoder.config.width)
    first = vq02.Vq02(encoder, normalization, centers).to(device)
    second = load_vq06(recognizer / VQ06_NAME).to(device)
    flow, vocoder = flowing.load(device, torch.float32), voicing.load(device, torch.float32)
    language_model = load_language_model(folder, variant, device, dtype)
    _check_not_tied(language_model, folder)
    for network in (language_model, first, second, flow, vocoder):
        use_onednn(network)
    return Networks(tokenizer, language_model, first, second, speaker, flow, vocoder)


def checked_tokenizer(folder: Path) -> TextTokenizer:
    """The text tokenizer. Raises CheckpointError unless it fits the language model."""
    tokenizer, config = TextTokenizer(folder), LanguageModelConfig.from_directory(folder)
    if tokenizer.size > config.vocabulary or tokenizer.turn_end != config.end:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens and {tokenizer.turn_end} ends a "
            f"turn, but config.json says {config.vocabulary} and {config.end}; use files of the "
            "same checkpoint"
        )
    return tokenizer


def _check_not_tied(model: LanguageModel, folder: Path) -> None:
    """Raise CheckpointError if the head is the embedding: the answer would be a hum."""
    if torch.equal(model.lm_head.weight, model.model.embed_tokens.weight):
        raise CheckpointError(
            f"{folder}: lm_head.weight equals model.embed_tokens.weight, so it was saved by a "
            "program that ties them; use the published file"
        )


def flow_component(folder: Path) -> Component[Flow]:
    config = SoundConfig.from_directory(folder).flow
    return plain_component("flow", lambda: Flow(config), open_pickle(folder / "flow.pt", None))


def vocoder_component(folder: Path) -> Component[Vocoder]:
    """The vocoder, whose weight norm may be folded."""
    config, store = SoundConfig.from_directory(folder).hift, open_pickle(folder / "hift.pt", None)
    with torch.device("meta"):
        slots = vocoder_slots(Vocoder(config), store)
    return Component("vocoder", lambda: Vocoder(config), slots, store, ignored=())


def vq02_component(folder: Path) -> Component[vq02.SanmEncoder]:
    """The encoder of the speech recognizer; its other parts are not read."""
    config = RecognizerConfig.from_directory(folder).encoder
    store = open_pickle(folder / "model.pt", None)
    prefix = "encoder."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in store.tensors.items()
        if name.startswith(prefix)
    }
    inner = TensorStore(tensors, store.location)
    return plain_component("VQ02 encoder", lambda: vq02.SanmEncoder(config), inner)


def read_centers(path: Path, width: int) -> Tensor:
    """The centres of VQ02's codes, float32 [1024, width]."""
    try:
        centers = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file missing") from error
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: not an array of numbers ({error})") from error
    if centers.shape != (VQ02_CODES, width):
        raise CheckpointError(
            f"{path}: expected shape {[VQ02_CODES, width]}, found {list(centers.shape)}"
        )
    return torch.from_numpy(centers).float()


def load_vq06(path: Path) -> vq06.Vq06:
    """VQ06 for inference, on the CPU; its sizes are those of its tensors."""
    stored = read_onnx_weights(path)
    try:
        width = stored["encoder.conv1.weight"].shape[0]
        codes, positions = (len(stored[name]) for name in (CODEBOOK, POSITIONS))
    except KeyError as error:
        raise CheckpointError(f"{path}: tensor {error.args[0]} is missing (VQ06)") from error
    layers = len({name.split(".")[2] for name in stored if name.startswith("encoder.blocks.")})
    if codes != VQ06_CODES or width % HEAD_SIZE:
        raise CheckpointError(
            f"{path}: expected {VQ06_CODES} codes and a width of heads of {HEAD_SIZE}, "
            f"found {codes} and {width}"
        )
    with torch.device("meta"):
        model = vq06.Vq06(vq06.EncoderSizes(width, width // HEAD_SIZE, layers, codes, positions))
    try:
        model.load_state_dict(stored, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval().requires_grad_(False)
