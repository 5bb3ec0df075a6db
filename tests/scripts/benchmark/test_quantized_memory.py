"""Memory of the quantized model at the published size, counted on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.api.memory import LONGEST, RESERVE, MemoryPlan, SpeechSizes
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, DecodeInput, Generation
from kimia_infer.layers.quantization import SCHEMES, stored_build
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.encoders import SpeechTokenizer
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import TensorStore
from scripts.benchmark.decoding import GREEDY
from scripts.benchmark.sizes import PUBLISHED
from scripts.benchmark.training_memory import PeakMemory
from tests.paths import GOLDEN

CPU = torch.device("cpu")
GB = 10**9
# What the card needs besides: the CUDA context, libraries' workspaces and recorded graphs.
REST = 1.5 * GB


def allocated(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    return Component("part", build, [], TensorStore({}, GOLDEN)).allocate(CPU, dtype)


@dataclass
class Loaded:
    """All parts as they are served."""

    language_model: LanguageModel
    rest: list[nn.Module]

    def parameters(self) -> list[torch.Tensor]:
        return [p for module in (self.language_model, *self.rest) for p in module.parameters()]


@contextmanager
def loaded(scheme: str, speech: bool) -> Iterator[Loaded]:
    """The published model, without values."""
    half = torch.bfloat16
    with FakeTensorMode():
        build = stored_build(lambda: LanguageModel(PUBLISHED.language_model), scheme)
        rest = [
            allocated(lambda: SpeechTokenizer(PUBLISHED.speech_tokenizer), torch.float32),
            allocated(lambda: WhisperEncoder(PUBLISHED.whisper), half),
        ]
        if speech:
            rest.append(allocated(lambda: DiT(PUBLISHED.dit), half))
            rest.append(allocated(lambda: Vocoder(PUBLISHED.vocoder), half))
        yield Loaded(allocated(build, half), rest)


def peak(scheme: str, speech: bool) -> tuple[int, SpeechSizes]:
    """With everything loaded, while the longest prompt, one for text, is embedded and read.

    Also the sizes of what hears and speaks.
    """
    with loaded(scheme, speech) as model, PeakMemory({}) as counted, torch.inference_mode():
        counted.see(model.parameters())
        weights = counted.now
        network, config = model.language_model, PUBLISHED.language_model
        decoder = Decoder(network, ControlTokens(0, 0, (0,)), LONGEST, speaks=speech)
        ids = torch.zeros(1, LONGEST - 1, dtype=torch.int64)
        features = torch.zeros(LONGEST - 1, config.adaptor_input_dim, dtype=torch.bfloat16)
        prompt = DecodeInput(ids, ids, ids == 0, features)
        output, draws = "both" if speech else "text", SeededRandomness(0)
        generation = Generation(decoder, prompt, output, 1, GREEDY, draws)
        del features, prompt
        for _ in decoder.begin(generation):
            pass
        cached = 2 * decoder.attention.cache.keys.nbytes
        sizes = SpeechSizes.of(*model.rest)
    assert weights == sum(p.nbytes for p in model.parameters())
    assert counted.most > weights + cached
    return counted.most, sizes


@pytest.mark.parametrize(
    ("scheme", "speech", "limit"),
    [("int8", True, 22), ("int4", True, 19), ("fp8", True, 22), ("int4", False, 15)],
)
def test_peak(scheme: str, speech: bool, limit: int, long: bool) -> None:
    """Also: loading is refused by a sum that is neither less nor much more than what is counted."""
    if (scheme, speech) != ("int4", True) and not long:
        pytest.skip("the same with fewer kinds of matrices, or less speech; runs with --long")
    found, sizes = peak(scheme, speech)
    assert found + REST <= limit * GB
    plan = MemoryPlan(PUBLISHED.language_model, torch.bfloat16, "none", sizes, CPU, CPU)
    reading = plan.reading_bytes(scheme)
    kept, synthesis = sizes.speaking(1) if speech else (0, 0)
    later = max(synthesis, sizes.encoding, reading) - reading  # before or after the prompt is read
    planned = plan.needed(scheme, speech)[CPU] - RESERVE - kept - later
    assert found <= planned <= 1.03 * found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_the_language_model(scheme: str) -> None:
    """By arithmetic: what is quantized, and what is not in two bytes a value."""
    config = PUBLISHED.language_model
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.total_layers
    joined = hidden + 2 * config.kv_heads * config.head_dim
    attention, forward = hidden * (joined + hidden), 3 * hidden * inner
    scales = {"attention": joined + hidden, "forward": 2 * inner + hidden}
    small = layers * (joined + 2 * hidden) + 2 * hidden  # biases and norms
    adaptor = hidden * (config.adaptor_input_dim + hidden + 4)
    others = 2 * (3 * config.vocab_size * hidden + adaptor + small)
    quantized = {
        "none": 2 * (attention + forward),
        "int4": attention + 2 * scales["attention"] + forward * 9 // 16,
    }
    eight = attention + forward + 2 * sum(scales.values())
    expected = others + layers * quantized.get(scheme, eight)
    with loaded(scheme, speech=False) as model:
        assert sum(p.nbytes for p in model.language_model.parameters()) == expected
