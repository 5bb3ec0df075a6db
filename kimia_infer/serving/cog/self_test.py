"""Before the first request: weights and results are finite, and the model answers with speech."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.audio.files import SAMPLE_RATE, wav_bytes

log = logging.getLogger(__name__)

STEPS = 24
"""Decode steps of a test answer."""

FRAMES = 200
"""Frames of the spectrogram given to the speech tokenizer: two seconds."""


class SelfTestError(RuntimeError):
    """The loaded model gives no usable answer; the message names the stage and what to do."""


def self_test(model: KimiAudio) -> None:
    """Check every weight, run every stage, and answer synthetic audio.

    Weights, encoders, logits of both tracks, mel and waveform must be finite. Whether the answer
    makes sense, or is silent, is not checked: a checkpoint may be trained to answer so.
    Raises SelfTestError naming the stage that fails.
    """
    started = time.perf_counter()
    for stage, module in _modules(model).items():
        _check_weights(stage, module)
    with torch.inference_mode():
        _try_encoders(model)
        if model.detokenizer is not None:
            _try_detokenizer(model)
        _try_answers(model)
    log.info("Self-test passed in %.1f s", time.perf_counter() - started)


def _modules(model: KimiAudio) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {
        "speech tokenizer": model.speech_codes.module,
        "Whisper encoder": model.whisper_features.module,
        "language model": model.language_model,
    }
    if model.detokenizer is not None:
        modules |= {"DiT": model.detokenizer.dit, "vocoder": model.detokenizer.vocoder}
    return modules


def _check_weights(stage: str, module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.itemsize == 1:
            weight = weight.bfloat16()  # floats of 8 bits have no sum
        # One value that is not finite makes the sum so, and a sum needs no memory.
        if not math.isfinite(weight.sum().item()):
            raise SelfTestError(
                f"self-test: {stage}: the weight {name} contains values that are not finite; the "
                "checkpoint is damaged, download or prepare it again"
            )


def _try_encoders(model: KimiAudio) -> None:
    with _trying("speech tokenizer"):
        module = model.speech_codes.module
        device = module.conv1.weight.device  # the host's where encoders are offloaded
        mel = torch.zeros(1, module.config.encoder.num_mel_bins, FRAMES, device=device)
        vectors = module(mel, torch.ones(1, FRAMES, device=device))
        _check("speech tokenizer", vectors, model)
    with _trying("Whisper encoder"):
        _check("Whisper encoder", model.whisper_features.encode(_tone()), model)


def _try_detokenizer(model: KimiAudio) -> None:
    """Synthesize a first chunk of codes, of the usual size."""
    detokenizer = model.detokenizer
    assert detokenizer is not None
    mel_bins = detokenizer.dit.config.mel_bins
    codes = torch.zeros(detokenizer.config.chunk_codes, dtype=torch.int64)
    with _trying("detokenizer"), detokenizer.graphs.stream():
        stream = detokenizer.start(lambda _, frames: torch.zeros(frames, mel_bins))
        wave = stream.push(codes, final=False).cpu()
        assert stream.mel is not None
        _check("DiT", stream.mel, model)
        _check("vocoder", wave, model)
        stream.close()


def _try_answers(model: KimiAudio) -> None:
    """Answer with text alone, then with speech if possible; the last logits are still there."""
    content = wav_bytes(_tone(), SAMPLE_RATE)
    chat = [{"role": "user", "message_type": "audio", "content": content}]
    for output_type in ("text",) if model.detokenizer is None else ("text", "both"):
        options = parse_parameters(output_type=output_type, max_new_tokens=STEPS, seed=0)
        with _trying(f"an answer with output_type={output_type!r}"):
            wave = None
            with contextlib.suppress(FloatingPointError):  # the check below says more
                wave = model.complete(chat, options).wav
            rows = model.decoder.rows
            _check("language model, text track", rows.text.logits[:1], model)
            if output_type == "both":
                _check("language model, audio track", rows.audio.logits[:1], model)
        if wave is not None:  # a model may choose to say nothing
            _check("speech of an answer", wave, model)


@contextlib.contextmanager
def _trying(stage: str) -> Iterator[None]:
    try:
        yield
    except SelfTestError:
        raise
    except Exception as error:
        raise SelfTestError(f"self-test: {stage}: {type(error).__name__}: {error}") from error


def _check(stage: str, result: Tensor, model: KimiAudio) -> None:
    """Raise SelfTestError unless the result has values, all of them finite."""
    bad = int((~torch.isfinite(result)).sum())
    if bad or not result.numel():
        raise SelfTestError(
            f"self-test: {stage}: {bad} of {result.numel()} values computed are not finite, though "
            f"the weights are; {model.dtype} or a kernel does not work on {model.device} (choose "
            "another KIMI_AUDIO_DTYPE, KIMI_AUDIO_ATTENTION or KIMI_AUDIO_DEVICE), or a weight is "
            "far too large (download or prepare the checkpoint again)"
        )


def _tone() -> Tensor:
    """One second of a rising tone, float32 [samples] at 16 kHz."""
    time_axis = torch.linspace(0, 1, SAMPLE_RATE)
    return 0.3 * torch.sin(2 * math.pi * (200 + 150 * time_axis) * time_axis)
