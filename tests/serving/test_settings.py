"""Variables that choose how the model runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kimia_infer.layers.attention import BACKENDS
from kimia_infer.serving.cog.settings import Settings, SettingsError, read_settings
from tests.paths import ROOT


def test_unset_and_empty_mean_the_default() -> None:
    names = ("DEVICE", "DTYPE", "HEAD_ROWS", "ATTENTION", "TIMEOUT", "ADAPTER", "QUANTIZATION")
    names += ("KV_CACHE", "OFFLOAD", "OUTPUT")
    assert read_settings({}) == read_settings({f"KIMI_AUDIO_{n}": "" for n in names}) == Settings()


def test_values_are_taken(tmp_path: Path) -> None:
    variables = {
        "KIMI_AUDIO_DEVICE": "cpu",
        "KIMI_AUDIO_DTYPE": "bfloat16",
        "KIMI_AUDIO_HEAD_ROWS": "full",
        "KIMI_AUDIO_ATTENTION": "sdpa",
        "KIMI_AUDIO_TIMEOUT": "1.5",
        "KIMI_AUDIO_ADAPTER": str(tmp_path),
        "KIMI_AUDIO_QUANTIZATION": "int4",
        "KIMI_AUDIO_KV_CACHE": "fp8",
        "KIMI_AUDIO_OFFLOAD": "encoders",
        "KIMI_AUDIO_OUTPUT": "text",
    }
    expected = ("cpu", "bfloat16", "full", "sdpa", 1.5, str(tmp_path), "int4", "fp8", "encoders")
    assert read_settings(variables) == Settings(*expected, "text")


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("KIMI_AUDIO_DEVICE", "gpu", ["cpu"]),
        ("KIMI_AUDIO_DEVICE", "cuda:99", ["cpu"]),
        ("KIMI_AUDIO_DTYPE", "float16", ["float32", "bfloat16"]),
        ("KIMI_AUDIO_HEAD_ROWS", "none", ["track", "full"]),
        ("KIMI_AUDIO_ATTENTION", "flash", list(BACKENDS)),
        ("KIMI_AUDIO_TIMEOUT", "soon", ["seconds"]),
        ("KIMI_AUDIO_TIMEOUT", "0", ["above 0"]),
        ("KIMI_AUDIO_TIMEOUT", "-1", ["above 0"]),
        ("KIMI_AUDIO_TIMEOUT", "inf", ["seconds"]),
        ("KIMI_AUDIO_TIMEOUT", "nan", ["seconds"]),
        ("KIMI_AUDIO_ADAPTER", "owner/name", ["not a directory"]),
        ("KIMI_AUDIO_QUANTIZATION", "int2", ["none", "fp8", "int8", "int4"]),
        ("KIMI_AUDIO_KV_CACHE", "int8", ["none", "fp8"]),
        ("KIMI_AUDIO_OFFLOAD", "detokenizer", ["encoders"]),
        ("KIMI_AUDIO_OUTPUT", "audio", ["text", "both"]),
    ],
)
def test_other_values_are_refused_with_the_choices(name: str, value: str, choices: list) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    message = str(caught.value)
    assert message.startswith(name) and repr(value) in message
    assert all(choice in message for choice in choices)


def test_every_variable_is_documented() -> None:
    root = ROOT
    sources = [*(root / "kimia_infer").rglob("*.py"), *root.glob("cog*.yaml")]
    read = {
        name
        for path in sources
        for name in re.findall(r"KIMI_AUDIO_[A-Z_]*[A-Z]", path.read_text())
    }
    documented = (root / "docs" / "deploy.md").read_text()
    assert {f"| `{name}` |" for name in read} <= set(re.findall(r"\| `\w+` \|", documented))
