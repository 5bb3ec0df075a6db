"""How fast Kokoro speaks beside the stock package and onnxruntime, interleaved in one run.

    python -m scripts.benchmark.kokoro --weights DIR                       float32 and bfloat16
    python -m scripts.benchmark.kokoro --weights DIR --onnx FILE.onnx      and the int8 export

The stock package takes part where ``kokoro`` can be imported. It and onnxruntime are in none of
the requirements. Prints seconds for a second of audio, of processor time and of the clock, the
median of several rounds, for texts of about 1, 5 and 30 seconds.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimia_infer.models.kokoro.checkpoint import load_network, open_network
from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE
from kimia_infer.models.kokoro.network import KokoroNetwork, batch_of
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.weights.tensors import Reader

CPU = torch.device("cpu")
VOICE = "af_heart"
SENTENCE = "ðə kwˈɪk bɹˈWn fˈɑks ʤˈʌmps ˈOvəɹ ðə lˈAzi dˈɔɡ, ænd ðˈɛn ɪt ɹˈʌnz bˈæk tə ðə hˈWs."
TEXTS = {"1 s": "həlˈO, wˌʌt ɪz ðˈæt?", "5 s": SENTENCE, "30 s": " ".join([SENTENCE] * 6)[:500]}

Speak = Callable[[str], int]
"""Speaks phonemes; the number of samples."""


def ours(network: KokoroNetwork, voices: Voices) -> Speak:
    @torch.inference_mode()
    def speak(phonemes: str) -> int:
        ids, rows = batch_of([[network.config.vocab[s] for s in phonemes]], CPU)
        style = voices.style(VOICE, len(phonemes))[None]
        prosody = network.prosody(ids, style, torch.ones(1), rows)
        noise = lambda _, samples: torch.randn(samples, HARMONICS)  # noqa: E731
        return len(network.waves(prosody, style, noise)[0])

    return speak


def stock(weights: Path, voices: Voices) -> Speak | None:
    """The package ``kokoro`` with the same weights, in its own form of weight norm."""
    try:
        package = importlib.import_module("kokoro.model")
    except ImportError:
        return None
    store, reader = open_network(weights), Reader()
    sections: dict[str, dict[str, Tensor]] = {}
    for name in store.tensors:
        section, _, rest = name.partition(".")
        value = reader.tensor(store, name)
        into = sections.setdefault(section, {})
        plain = "noise_convs" in rest or "_proj" in rest or value.dim() != 3
        if plain or not rest.endswith(".weight"):
            into[rest] = value
            continue
        norm = value.flatten(1).norm(dim=1).view(-1, 1, 1)
        into[f"{rest}_g"], into[f"{rest}_v"] = norm, torch.where(norm == 0, 1.0, value)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(sections, file.name)
        model = package.KModel(config=str(weights / "config.json"), model=file.name).eval()

    @torch.inference_mode()
    def speak(phonemes: str) -> int:
        return len(model(phonemes, voices.style(VOICE, len(phonemes))[None], 1.0))

    return speak


def onnx(path: Path, vocab: dict[str, int], voices: Voices, threads: int) -> Speak:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def speak(phonemes: str) -> int:
        ids = np.array([[0, *(vocab[s] for s in phonemes), 0]], dtype=np.int64)
        style = voices.style(VOICE, len(phonemes))[None].numpy()
        speed = np.ones(1, dtype=np.float32)
        return session.run(None, {"tokens": ids, "style": style, "speed": speed})[0].size

    return speak


def measure(ways: dict[str, Speak], rounds: int) -> None:
    print(f"{'text':6}{'way':12}{'audio':>8}{'processor':>11}{'clock':>8}")
    for name, phonemes in TEXTS.items():
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, speak in ways.items():
                processor, clock = time.process_time(), time.perf_counter()
                seconds = speak(phonemes) / SAMPLE_RATE
                took = time.process_time() - processor, time.perf_counter() - clock
                if turn:  # the first one warms up
                    found[way].append((seconds, took[0] / seconds, took[1] / seconds))
        for way, rows in found.items():
            audio, processor, clock = (
                statistics.median(column) for column in zip(*rows, strict=True)
            )
            print(f"{name:6}{way:12}{audio:7.2f}s{processor:11.3f}{clock:8.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument("--onnx", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network = load_network(arguments.weights, CPU)
    voices = Voices(arguments.weights, 2 * network.config.style_dim)
    ways = {"float32": ours(network, voices)}
    rough = load_network(arguments.weights, CPU, torch.bfloat16)
    ways["bfloat16"] = ours(rough, voices)
    if (package := stock(arguments.weights, voices)) is not None:
        ways["stock"] = package
    if arguments.onnx:
        vocab = dict(network.config.vocab)
        ways["onnx int8"] = onnx(arguments.onnx, vocab, voices, arguments.threads)
    measure(ways, arguments.rounds)


if __name__ == "__main__":
    main()
