"""The token loop on Triton's kernels, interpreted: the recorded tokens, step by step."""

from __future__ import annotations

import json
import os

import pytest
import torch

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, Generation
from kimia_infer.layers.attention import BACKENDS, choose_backend
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.language_model import language_model_component
from tests.engine.helpers import (
    RUNS,
    put_heads,
    read_prompts,
    recorded_uniforms,
    sampling_of,
)
from tests.interpreted import interpreted, needs_triton
from tests.paths import GOLDEN
from tests.randomness import RecordedRandomness
from tests.traced import FixedShapes

HEAD_DIM = LanguageModelConfig.from_directory(GOLDEN / "llm").head_dim
STEPS = 8
"""Two codes of speech follow the delay of its track: one is read to say the next."""
pytestmark = [
    needs_triton,
    pytest.mark.skipif(HEAD_DIM < 16 or HEAD_DIM & (HEAD_DIM - 1), reason="no such kernel"),
]


def generate(run: dict, steps: int) -> tuple[list[int], list[int]]:
    """The first ids of a recorded run, every kernel interpreted; for the worker process."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    from kimia_infer.layers import attention_kernels

    # Sequences this short fill a split or two, and programs of empty ones take most of the time.
    attention_kernels.SPLITS = attention_kernels.FEWEST_SPLITS = 4
    model = language_model_component(GOLDEN / "llm").load(torch.device("cpu"), torch.float32)
    put_heads(model, run["heads"])
    assert choose_backend(model.device, HEAD_DIM) is BACKENDS["triton"]
    ids = json.loads((GOLDEN / "llm" / "special_tokens.json").read_text())
    ends = (ids["msg_end"], ids["media_end"])
    control = ControlTokens(ids["kimia_text_blank"], ids["kimia_text_eos"], ends)
    prompt, params = read_prompts(GOLDEN)[run["prompt"]], run["params"]
    decoder = Decoder(model, control, prompt.length + steps, make_graphs=FixedShapes)
    sampling = sampling_of(params)
    randomness = RecordedRandomness(recorded_uniforms(run, sampling), {})
    generation = Generation(decoder, prompt, params["output_type"], steps, sampling, randomness)
    for _ in generation.run():
        pass
    return generation.text_ids, generation.audio_ids


@pytest.mark.parametrize("index", range(len(RUNS)), ids=lambda index: RUNS[index]["name"])
def test_recorded_run(index: int, long: bool) -> None:
    """The interpreter takes a second or more for a step: a few of one run, or all of all."""
    if index and not long:
        pytest.skip("runs with --long")
    run = RUNS[index]
    text, audio = interpreted(generate, run, run["params"]["max_new_tokens"] if long else STEPS)
    assert text == run["returned_text"][: len(text)]
    assert audio == run["returned_audio"][: len(audio)]
    assert text or audio or not (run["returned_text"] or run["returned_audio"])
