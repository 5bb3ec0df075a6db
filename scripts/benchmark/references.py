"""Compares a device with the recorded references.

They were recorded in float32 on a CPU from the published implementation (tests/golden/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from kimia_infer.api.parameters import Parameters
from kimia_infer.audio.files import load_audio
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, DecodeInput, Generation
from kimia_infer.layers.attention import BACKENDS, CachedAttention, choose_backend
from kimia_infer.layers.sampler import Sampling, SeededRandomness
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component, whisper_component
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, WhisperFeatures
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from kimia_infer.models.kimi_audio.vocoder import Vocoder, vocoder_component
from scripts.benchmark.checks import Check, Findings, Found, Place, skipped
from scripts.benchmark.runner import ROOT

GOLDEN = ROOT / "tests" / "golden"
FLOAT_LIMIT = 1e-3
"""Largest error of float32 values between 1 and 25. On the CPU it is 1e-4; another device adds in
another order."""


def checks(place: Place) -> dict[str, Check]:
    """By component, in the order of a request."""
    return {
        "language model": lambda: logits(place),
        "token loop": lambda: token_loop(place),
        "batch": lambda: batched(place),
        "detokenizer": lambda: speech_streams(place),
        "vocoder": lambda: vocoder_waves(place),
        "Whisper": lambda: whisper(place),
        "speech tokenizer": lambda: speech_codes(place),
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected.float().cpu()).abs().max())


def _golden_model(device: torch.device) -> LanguageModel:
    return language_model_component(GOLDEN / "llm").load(device, torch.float32)


def _read(*names: str) -> dict[str, Tensor]:
    return load_file(GOLDEN.joinpath(*names))


def _json(*names: str):
    return json.loads(GOLDEN.joinpath(*names).read_text(encoding="utf-8"))


@torch.inference_mode()
def logits(place: Place) -> Findings:
    """Logits of a prompt and of single steps after it, by each backend of attention."""
    device, model = place.device, _golden_model(place.device)
    recorded = _read("llm", "forward.safetensors")
    on = {name: value.to(device) for name, value in recorded.items()}
    features = torch.cat([on[n] for n in sorted(on) if n.startswith("prefill.whisper_feature.")])
    length, steps = on["prefill.audio_ids"].shape[1], len(on["decode.audio_ids"])
    for name in BACKENDS:
        try:
            backend = choose_backend(device, model.config.head_dim, name)
        except ValueError as error:
            yield f"logits, {name}", Found(None, FLOAT_LIMIT, skipped(error))
            continue
        cache = model.new_cache(length + steps, length + steps)
        attention = CachedAttention(backend, cache)
        audio, text = on["prefill.audio_ids"], on["prefill.text_ids"]
        x = model.embed(audio, text, on["prefill.is_continuous_mask"], features)
        hidden = model(x, attention.sequence(0, 0))
        found = model.text_head(hidden.text[0]), model.audio_head(hidden.audio[0])
        expected = on["prefill.text_logits"], on["prefill.audio_logits"]
        yield f"prompt, {name}", Found(max(map(_difference, found, expected)), FLOAT_LIMIT)
        errors = []
        for step in range(steps):
            audio, text = (on[f"decode.{t}_ids"][step].view(1, 1) for t in ("audio", "text"))
            start, position = torch.tensor([[0], [length + step]], device=device)
            attend = attention.recorded_tokens(start, position, length + steps)
            hidden = model(model.embed(audio, text), attend)
            found = model.text_head(hidden.text[0, 0]), model.audio_head(hidden.audio[0, 0])
            expected = on["decode.text_logits"][step], on["decode.audio_logits"][step]
            errors += map(_difference, found, expected)
        yield f"steps, {name}", Found(max(errors), FLOAT_LIMIT)


class RecordedDraws:
    """Recorded uniform numbers in place of a seeded generator."""

    def __init__(self, run: dict, sampling: Sampling):
        order = [t for t in ("text", "audio") if not getattr(sampling, t).greedy]
        self.drawn = {
            (order[i % len(order)], i // len(order)): drawn["u"]
            for i, drawn in enumerate(run.get("draws", []))
        }

    def uniforms(self, track: str, steps: int) -> Tensor:
        values = [self.drawn.get((track, step), 0.0) for step in range(steps)]
        return torch.tensor(values, dtype=torch.float64)


def recorded_prompt(name: str, device: torch.device) -> DecodeInput:
    """A prompt of the recorded runs."""
    tensors = {k: v.to(device) for k, v in _read("llm", "prompts.safetensors").items()}
    features = [tensors[k] for k in sorted(tensors) if k.startswith(f"{name}.feat.")]
    mask = tensors.get(f"{name}.mask")
    return DecodeInput(
        tensors[f"{name}.audio_ids"].view(1, -1),
        tensors[f"{name}.text_ids"].view(1, -1),
        None if mask is None else mask.view(1, -1),
        torch.cat(features) if features else None,
    )


def recorded_sampling(params: dict) -> Sampling:
    """How the tokens of a recorded run were chosen."""
    names = {name: params[name] for name in params.keys() & Parameters.model_fields.keys()}
    return Parameters(**names).sampling


def recorded_control() -> ControlTokens:
    ids = _json("llm", "special_tokens.json")
    ends = (ids["msg_end"], ids["media_end"])
    return ControlTokens(ids["kimia_text_blank"], ids["kimia_text_eos"], ends)


def use_recorded_heads(model: LanguageModel, name: str) -> None:
    """Give ``model`` those of the heads ``name`` that were recorded."""
    heads = _read("llm", "heads.safetensors")
    for head, stored in ((model.text_head, "lm_head"), (model.audio_head, "mimo_output")):
        if (weight := heads.get(f"{name}.{stored}.weight")) is not None:
            head.weight.data = weight.to(model.device)


def token_loop(place: Place) -> Findings:
    """How many recorded runs have other tokens."""
    device, control = place.device, recorded_control()
    runs, model = _json("llm", "generate.json"), _golden_model(device)
    own_heads = model.text_head.weight.data, model.audio_head.weight.data
    for launch, make_graphs in place.launches().items():
        different = []
        for run in runs:
            model.text_head.weight.data, model.audio_head.weight.data = own_heads
            use_recorded_heads(model, run["heads"])
            params, sampling = run["params"], recorded_sampling(run["params"])
            prompt, steps = recorded_prompt(run["prompt"], device), params["max_new_tokens"]
            decoder = Decoder(model, control, prompt.length + steps, make_graphs=make_graphs)
            draws = RecordedDraws(run, sampling)
            found = generated(
                Generation(decoder, prompt, params["output_type"], steps, sampling, draws, 7)
            )
            if found != (run["returned_text"], run["returned_audio"]):
                different.append(run["name"])
        yield f"{len(runs)} runs, {launch}", Found(len(different), 0, ", ".join(different))


def generated(generation: Generation) -> tuple[list[int], list[int]]:
    """The ids of a generation that is run to its end."""
    for _ in generation.run():
        pass
    return generation.text_ids, generation.audio_ids


def batched(place: Place) -> Findings:
    """How many answers that are generated side by side differ from those generated alone."""
    model, control, steps = _golden_model(place.device), recorded_control(), 40
    prompts = [recorded_prompt(name, place.device) for name in ("two_audio", "text_only")]
    sampling = recorded_sampling({"text_temperature": 0.8})
    capacity = steps + max(prompt.length for prompt in prompts)
    for launch, make_graphs in place.launches().items():
        decoder = Decoder(model, control, capacity, make_graphs=make_graphs, slots=3)

        def start(seed: int, decoder: Decoder = decoder) -> Generation:
            prompt, draws = prompts[seed % len(prompts)], SeededRandomness(seed)
            output = "text" if seed == 1 else "both"
            return Generation(decoder, prompt, output, steps, sampling, draws)

        alone = [generated(start(seed)) for seed in range(3)]
        together = [start(seed) for seed in range(3)]
        for generation in together:
            for _ in decoder.begin(generation):
                pass
        while decoder.running:
            for generation, progress in decoder.step():
                if progress.finished:
                    decoder.release(generation)
        found = [(generation.text_ids, generation.audio_ids) for generation in together]
        different = sum(one != other for one, other in zip(found, alone, strict=True))
        yield f"3 answers side by side, {launch}", Found(different, 0)


def golden_vocoder(device: torch.device) -> Vocoder:
    with _folder("vocoder", "generator.safetensors", "config.json") as folder:
        return vocoder_component(folder).load(device, torch.float32)


@contextmanager
def _folder(source: str, weights: str, config: str) -> Iterator[Path]:
    """Recorded weights and their configuration, named as in a checkpoint."""
    with TemporaryDirectory() as folder:
        Path(folder, "model.safetensors").symlink_to(GOLDEN / source / weights)
        Path(folder, config).symlink_to(GOLDEN / source / config)
        yield Path(folder)


def speech_streams(place: Place) -> Findings:
    """Mel and waveform of every chunk of the recorded utterances."""
    device, recorded = place.device, _read("detok", "stream.safetensors")
    runs = {name: run for name, run in _json("detok", "stream.json").items() if "_" not in name}
    with _folder("detok", "audio_detokenizer.safetensors", "config.yaml") as folder:
        dit = dit_component(folder).load(device, torch.float32)
    vocoder = golden_vocoder(device)
    for launch, make_graphs in place.launches().items():
        detokenizer = Detokenizer(dit, vocoder, graphs=make_graphs(device))
        detokenizer.warm_up()
        mel_error = wave_error = 0.0
        for name, run in runs.items():
            noise = lambda chunk, _, name=name: recorded[f"{name}.noise.{chunk}"]  # noqa: E731
            stream = detokenizer.start(noise)
            chunks = torch.tensor(run["codes"]).split(detokenizer.config.chunk_codes)
            for index, codes in enumerate(chunks):
                wave = stream.push(codes, final=index == len(chunks) - 1)
                assert stream.mel is not None
                mel_error = max(mel_error, _difference(stream.mel, recorded[f"{name}.mel.{index}"]))
                wave_error = max(wave_error, _difference(wave, recorded[f"{name}.wav.{index}"]))
        yield f"mel, {launch}", Found(mel_error, FLOAT_LIMIT)
        yield f"waveform, {launch}", Found(wave_error, FLOAT_LIMIT)


@torch.inference_mode()
def vocoder_waves(place: Place) -> Findings:
    recorded, model = _read("vocoder", "golden.safetensors"), golden_vocoder(place.device)
    errors = [
        _difference(model(recorded[f"mel.{n}"].to(place.device)), recorded[f"wav.{n}"])
        for n in (1, 5, 33)
    ]
    yield "waveform", Found(max(errors), FLOAT_LIMIT)


def whisper(place: Place) -> Findings:
    recorded, folder = _read("whisper", "golden.safetensors"), GOLDEN / "whisper"
    encoder = whisper_component(folder).load(place.device, torch.float32)
    for launch, make_graphs in place.launches().items():
        features = WhisperFeatures(encoder, folder, make_graphs(place.device))
        features.warm_up()
        errors = [
            _difference(
                features.encode(load_audio(GOLDEN / "audio" / f"{name}.wav")),
                recorded[f"{name}.features"],
            )
            for name in _recordings(_json("whisper", "meta.json"))
        ]
        yield f"features, {launch}", Found(max(errors), FLOAT_LIMIT)


def _recordings(recorded: dict) -> list[str]:
    """Names of those at 16 kHz, which can be read without further packages."""
    meta = _json("audio", "meta.json")
    return [n for n in recorded if n in meta and meta[n]["sr"] == 16_000]


def speech_codes(place: Place) -> Findings:
    """How many codes are not the recorded ones."""
    folder, recorded = GOLDEN / "glm4", _json("glm4", "codes.json")
    module = speech_tokenizer_component(folder).load(place.device, torch.float32)
    for launch, make_graphs in place.launches().items():
        codes, different, total = SpeechCodes(module, folder, make_graphs(place.device)), 0, 0
        codes.warm_up()
        for name in _recordings(recorded):
            found = codes.encode(load_audio(GOLDEN / "audio" / f"{name}.wav")).tolist()
            expected = recorded[name]["codes"]
            different += abs(len(found) - len(expected))
            different += sum(a != b for a, b in zip(found, expected, strict=False))
            total += len(expected)
        # One frame of the longest recording is almost equally near to two entries of the code book.
        yield f"{total} codes, {launch}", Found(different, 1)
