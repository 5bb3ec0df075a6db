"""Parts of Kokoro against values recorded from the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kimia_infer.layers.harmonics import Source
from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE, GeneratorSizes
from kimia_infer.models.kokoro.generator import Generator, SnakeBlock
from kimia_infer.models.kokoro.layers import AdaIN, AdaLayerNorm, Rows, StyledBlock
from kimia_infer.models.kokoro.prosody import ProsodyPredictor
from kimia_infer.models.kokoro.source import Spectrum
from kimia_infer.models.kokoro.text_encoder import TextEncoder
from tests.models.kokoro.recorded import Unit

LENGTHS = [11, 7, 9]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def ragged() -> Rows:
    return Rows(torch.tensor(LENGTHS))


def test_norms() -> None:
    layer = Unit("adalayernorm", AdaLayerNorm(8, 12))
    close(layer.module(layer["x"], layer["s"]), layer["y"])
    instance = Unit("adain", AdaIN(8, 12))
    x, style, y = instance["x"].mT, instance["s"], instance["y"].mT
    close(instance.module(x, style, Rows()), y)
    close(instance.module(x[:1], style[:1], Rows()), y[:1])


@pytest.mark.parametrize(
    ("name", "outputs"), [("resblk_same", 12), ("resblk_wider", 20), ("resblk_up", 20)]
)
def test_styled_block(name: str, outputs: int) -> None:
    unit = Unit(name, StyledBlock(8, 12, outputs, upsample=name == "resblk_up"))
    close(unit.module(unit["x"].mT, unit["s"], Rows()).mT, unit["y"])


def test_snake_block() -> None:
    unit = Unit("snakeblk", SnakeBlock(8, 12, 7, [1, 3, 5]))
    close(unit.module(unit["x"].mT, unit["s"], Rows()).mT, unit["y"])


def test_text_encoder() -> None:
    unit = Unit("text_encoder", TextEncoder(32, 5, 2, 40))
    close(unit.module(unit["ids"], ragged()).mT, unit["y"])
    close(unit.module(unit["ids"][:1], Rows()).mT, unit["y_first_alone"])


def test_durations() -> None:
    unit = Unit("predictor", ProsodyPredictor(32, 16, 2, 10))
    d = unit.module.text_encoder(unit["d_en"].mT, unit["style"], ragged())
    close(d, unit["d"])
    close(unit.module.durations(d, ragged()), unit["dur_logits"])
    for row, length in enumerate(LENGTHS):
        alone = unit.module.text_encoder(
            unit["d_en"].mT[row : row + 1, :length], unit["style"][row : row + 1], Rows()
        )
        close(alone, unit[f"d_alone.{row}"])
        close(unit.module.durations(alone, Rows()), unit[f"dur_logits_alone.{row}"])


def test_pitch_and_energy() -> None:
    unit = Unit("predictor", ProsodyPredictor(32, 16, 2, 10))
    pitch, energy = unit.module.curves(unit["en"].mT, unit["style"], Rows())
    close(pitch, unit["F0"])
    close(energy, unit["N"])


def test_spectrum() -> None:
    unit = Unit("stft", Spectrum(5))
    found = unit.module(unit["wave"], Rows())
    close(found, torch.cat([unit["torch.mag"], unit["torch.phase"]], dim=1).mT)
    magnitude, angle = found.chunk(2, dim=-1)
    close(unit.module.inverse(magnitude, angle, Rows()), unit["torch.inverse"][:, 0])


def test_source() -> None:
    unit = Unit("source", Source(300, HARMONICS, SAMPLE_RATE))
    pitch = unit["f0"]
    close(unit.module.sines(pitch)[:, ::10], unit["sines_no_draws_every_10th"])
    close(unit.module(pitch, None), unit["out_no_draws"][..., 0])
    drawn = np.random.RandomState(12).standard_normal((1, 4500, 9)).astype(np.float32)
    close(unit.module(pitch, torch.from_numpy(drawn)), unit["out_draws"][..., 0])


def test_generator() -> None:
    sizes = GeneratorSizes(
        upsample_rates=[10, 6],
        upsample_kernel_sizes=[20, 12],
        upsample_initial_channel=32,
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        gen_istft_n_fft=20,
        gen_istft_hop_size=5,
    )
    unit = Unit("generator", Generator(sizes, 16))
    audio = unit.module(unit["x"].mT, unit["s"], unit["f0"], Rows(), None)
    expected = unit["audio"][:, 0]
    close(audio, expected, 1e-5 * float(expected.abs().max()))
