"""Variables that choose how the model runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.offloading import OFFLOADS
from kimia_infer.commands import parser
from kimia_infer.layers.attention import BACKENDS, KV_CACHES
from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.serving.cog.fetch import Limits
from kimia_infer.serving.cog.settings import DOWNLOAD_SECONDS, CogSettings
from kimia_infer.serving.settings import read_settings
from kimia_infer.utils.errors import ConfigurationError
from tests.paths import ROOT


def test_unset_and_empty_mean_the_default() -> None:
    names = ("DEVICE", "DTYPE", "HEAD_ROWS", "ATTENTION", "TIMEOUT", "ADAPTER", "QUANTIZATION")
    names += ("KV_CACHE", "OFFLOAD", "SLOTS", "SPEECH_DEVICE", "OUTPUT", "URLS", "URL_MEGABYTES")
    assert (
        read_settings(CogSettings, {})
        == read_settings(CogSettings, {f"KIMI_AUDIO_{n}": "" for n in names})
        == CogSettings()
    )


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
        "KIMI_AUDIO_SLOTS": "16",
        "KIMI_AUDIO_SPEECH_DEVICE": "cpu",
        "KIMI_AUDIO_KOKORO": "auto",
        "KIMI_AUDIO_KOKORO_ADAPTER": "mine",
        "KIMI_AUDIO_OUTPUT": "text",
        "KIMI_AUDIO_URLS": "any",
        "KIMI_AUDIO_URL_MEGABYTES": "3",
    }
    expected = ("cpu", "bfloat16", "full", "sdpa", 1.5, str(tmp_path), "int4", "fp8", "encoders")
    expected += (16, "cpu", "auto", "mine", "text", "any", 3)
    assert tuple(read_settings(CogSettings, variables).model_dump().values()) == expected


def test_downloads_have_the_shorter_of_both_time_limits() -> None:
    short = CogSettings(timeout=2, url_megabytes=3).limits(5.0, print)
    assert short == Limits(5.0, 2.0, 3_000_000, False, print)
    assert CogSettings(timeout=9e9).limits(5.0, print).seconds == DOWNLOAD_SECONDS
    private = CogSettings(urls="any").limits(5.0, print)
    assert private == Limits(5.0, DOWNLOAD_SECONDS, 500_000_000, True, print)


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("KIMI_AUDIO_DEVICE", "gpu", ["cpu"]),
        ("KIMI_AUDIO_DEVICE", "cuda:99", ["cpu"]),
        ("KIMI_AUDIO_DTYPE", "float16", ["float32", "bfloat16"]),
        ("KIMI_AUDIO_HEAD_ROWS", "none", ["track", "full"]),
        ("KIMI_AUDIO_ATTENTION", "flash", list(BACKENDS)),
        ("KIMI_AUDIO_TIMEOUT", "soon", ["seconds"]),
        ("KIMI_AUDIO_TIMEOUT", "0", ["more than 0"]),
        ("KIMI_AUDIO_TIMEOUT", "-1", ["more than 0"]),
        ("KIMI_AUDIO_TIMEOUT", "inf", ["seconds"]),
        ("KIMI_AUDIO_TIMEOUT", "nan", ["seconds"]),
        ("KIMI_AUDIO_ADAPTER", "owner/name", ["directory"]),
        ("KIMI_AUDIO_URLS", "none", ["public", "any"]),
        ("KIMI_AUDIO_URL_MEGABYTES", "0", ["at least 1 MB"]),
        ("KIMI_AUDIO_QUANTIZATION", "int2", ["none", "fp8", "int8", "int4"]),
        ("KIMI_AUDIO_KV_CACHE", "int8", ["none", "fp8"]),
        ("KIMI_AUDIO_OFFLOAD", "detokenizer", ["encoders"]),
        ("KIMI_AUDIO_SLOTS", "0", ["at least 1", "at most 32"]),
        ("KIMI_AUDIO_SLOTS", "33", ["at least 1", "at most 32"]),
        ("KIMI_AUDIO_SLOTS", "many", ["whole number"]),
        ("KIMI_AUDIO_SPEECH_DEVICE", "cuda:99", ["cpu"]),
        ("KIMI_AUDIO_OUTPUT", "audio", ["text", "both"]),
    ],
)
def test_other_values_are_refused_with_the_choices(name: str, value: str, choices: list) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_settings(CogSettings, {name: value})
    message = str(caught.value)
    assert message.startswith(name) and repr(value) in message
    assert all(choice in message for choice in choices)


def test_arguments_of_the_model() -> None:
    arguments = CogSettings(dtype="bfloat16", output="text").model_arguments()
    assert arguments["load_detokenizer"] is False and arguments["dtype"] == "bfloat16"
    assert set(arguments) <= set(inspect.signature(KimiAudio.__init__).parameters)


def test_a_transcriber_has_the_settings_but_no_voice() -> None:
    settings = CogSettings(dtype="bfloat16", quantization="int4", kokoro_adapter="warm")
    arguments = settings.transcriber_arguments()
    assert (arguments["dtype"], arguments["quantization"]) == ("bfloat16", "int4")
    assert not arguments["load_detokenizer"] and arguments["slots"] == 1
    assert arguments["kokoro"] is arguments["kokoro_adapter"] is None


def test_choices_are_those_of_the_modules_that_use_them() -> None:
    properties = CogSettings.model_json_schema(by_alias=False)["properties"]

    def choices(name: str) -> list[str]:
        schema = properties[name]["anyOf"][0]
        return schema.get("enum") or [schema["const"]]

    assert choices("attention") == list(BACKENDS)
    assert choices("quantization") == list(SCHEMES)
    assert choices("quantization") == list(parser.QUANTIZATIONS)
    assert choices("dtype") == list(parser.DTYPES)
    assert choices("kv_cache") == list(KV_CACHES)
    assert choices("offload") == list(OFFLOADS)


def test_settings_can_be_read_without_pytorch() -> None:
    code = (
        "import sys; from kimia_infer.serving.settings import Settings, read_settings; "
        "read_settings(Settings, {'KIMI_AUDIO_DEVICE': 'cpu'}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_variable_is_documented() -> None:
    sources = [*(ROOT / "kimia_infer" / "serving").rglob("*.py"), *ROOT.glob("cog*.yaml")]
    sources += (ROOT / "kimia_infer" / "weights").rglob("*.py")
    read = {
        name
        for path in sources
        for name in re.findall(r"KIMI_AUDIO_[A-Z_]*[A-Z]", path.read_text())
    }
    read |= {f"KIMI_AUDIO_{name.upper()}" for name in CogSettings.model_fields}
    documented = (ROOT / "docs" / "deploy.md").read_text()
    assert {f"| `{name}` |" for name in read} <= set(re.findall(r"\| `\w+` \|", documented))
