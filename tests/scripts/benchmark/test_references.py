"""The check of a device against the recordings, made on the CPU, and with faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kimia_infer.layers.attention import KV_CACHES
from kimia_infer.layers.quantization import SCHEMES
from scripts.benchmark import references
from scripts.benchmark.references import Place, check_all
from scripts.benchmark.sizes import SIZES
from tests.interpreted import interpreted, needs_triton
from tests.traced import FixedShapes

CPU = torch.device("cpu")


def test_recordings_on_the_cpu() -> None:
    """Also with work in the fixed shapes of recorded graphs."""
    table = check_all(Place(CPU, FixedShapes), SIZES["tiny"])
    assert not table.problems
    found = {(row["component"], row["check"]): row for row in table.rows}
    components = ("language model", "token loop", "batch", "detokenizer", "vocoder", "Whisper")
    for component in (*components, "speech tokenizer"):
        checked = [row for (name, _), row in found.items() if name == component]
        assert any(row["result"] == "ok" for row in checked), component
    assert found["token loop", "20 runs, recorded graphs"]["largest error"] == 0
    assert found["graphs", "64 sampled steps, both"]["result"] == "ok"
    assert found["kernels", "Triton"]["result"].startswith("skipped: ")


def kernels_on_the_cpu() -> dict[str, references.Found]:
    place = Place(CPU)
    steps = references.kernels(place, SIZES["tiny"])
    return dict([*steps, *references.vocoder_kernels(place, SIZES["tiny"])])


@needs_triton
def test_kernels_on_the_cpu() -> None:
    """Interpreted, as they would be checked on a GPU."""
    found = interpreted(kernels_on_the_cpu)
    assert len(found) == len(SCHEMES) * len(KV_CACHES) + 1
    for name, check in found.items():
        assert check.error is not None and check.error <= check.limit, (name, check)
    assert 0 < found["step, weights none, cache none"].limit < 0.1


def test_a_difference_is_a_problem_and_a_failure_hides_no_other_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vocoder(place: Place) -> references.Findings:
        yield "waveform", references.Found(0.5, 0.1)

    def broken(place: Place) -> references.Findings:
        raise RuntimeError("an illegal memory access")
        yield

    nothing: Callable = lambda *_: iter(())  # noqa: E731
    others = ("logits", "token_loop", "batched", "speech_streams", "speech_codes", "kernels")
    for name in (*others, "vocoder_kernels", "graphs"):
        monkeypatch.setattr(references, name, nothing)
    monkeypatch.setattr(references, "vocoder", vocoder)
    monkeypatch.setattr(references, "whisper", broken)
    table = check_all(Place(CPU), SIZES["tiny"])
    assert [row["result"] for row in table.rows] == ["WRONG", "failed"]
    assert table.problems == [
        "vocoder, waveform: 0.5 is above 0.1",
        "Whisper: RuntimeError: an illegal memory access",
    ]
