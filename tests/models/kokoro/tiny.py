"""A Kokoro directory with small prosody and a decoder that hums, for what needs no voice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kimia_infer.models.kokoro import decoder
from tests.models.kokoro.recorded import published_shapes, recipe, whole_config

CHANNELS, STYLE = 16, 8
SYMBOLS = " ,;:.?!ˈˌbdfɡhʤklmnpɹstvwzʃʧʒθðjŋTæɑɛɪiʌʊuɔAIOWYɜəɐᵊᵻ"
VOICES = ("af_heart", "am_adam", "bf_emma")
WIDTH = 32


@contextmanager
def narrow_kokoro(directory: Path, longest: int = 6) -> Iterator[Path]:
    """:func:`tiny_directory` with a decoder of few channels, which networks built within have.

    Its published width is a constant of the program, so other processes cannot load it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "WIDTH", WIDTH)
        yield tiny_directory(directory, longest)


def tiny_directory(directory: Path, longest: int = 6) -> Path:
    """``directory`` with a configuration, weights and three voices.

    Its symbols are those of English; one is spoken for ``longest`` frames at most.
    """
    config = whole_config()
    config |= {"hidden_dim": CHANNELS, "style_dim": STYLE, "n_layer": 3, "max_dur": longest}
    config["vocab"] = {symbol: number for number, symbol in enumerate(SYMBOLS, 1)}
    config["plbert"] = config["plbert"] | {
        "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32,
        "num_hidden_layers": 2, "embedding_size": 8, "max_position_embeddings": 256,
    }  # fmt: skip
    config["istftnet"] = config["istftnet"] | {"upsample_initial_channel": 8}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.full(shape, 0.01) if name.startswith("decoder.") else recipe(name, shape)
        for name, shape in published_shapes(config).items()
    }
    bias = "decoder.generator.conv_post.bias"  # without it each frame's impulse is windowed away
    tensors[bias] = torch.linspace(-1, 1, len(tensors[bias]))
    save_file(tensors, directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    voices = {name: torch.randn(510, 2 * STYLE, generator=generator) for name in VOICES}
    save_file(voices, directory / "voices.safetensors")
    return directory
