"""Layers computed by oneDNN against float64 arithmetic and against the recorded parts."""

from __future__ import annotations

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kimia_infer.audio.files import load_audio
from kimia_infer.layers.attention import CachedAttention, choose_backend
from kimia_infer.layers.operators import MIN_ELEMENTS, OneDNNLinear, use_onednn
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component, whisper_component
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, WhisperFeatures
from kimia_infer.models.kimi_audio.flow import FrameCache, Past
from kimia_infer.models.kimi_audio.language_model import language_model_component
from kimia_infer.weights.component import Component
from tests.paths import GOLDEN

CPU = torch.device("cpu")
IN, OUT = 192, 320
FILES = json.loads((GOLDEN / "e2e" / "cases.json").read_text())["audio_files"]
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64")
    or not torch.backends.mkldnn.is_available(),
    reason="oneDNN takes over on x86 only",
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture
def layer() -> OneDNNLinear:
    return OneDNNLinear(random(OUT, IN) / IN**0.5, random(OUT, seed=1))


def served_by_onednn(part: Component) -> nn.Module:
    """The part with every linear layer replaced."""
    module = part.load(CPU, torch.float32)
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    use_onednn(module, min_elements=0)
    assert names
    assert all(type(module.get_submodule(name)) is OneDNNLinear for name in names)
    return module


def inputs() -> dict[str, Tensor]:
    return {
        "one vector": random(IN),
        "rows": random(7, IN),
        "batch": random(2, 5, IN),
        "six dimensions": random(1, 2, 1, 3, 1, IN),
        "transposed": random(IN, 7).T,
        "every other column": random(7, 2 * IN)[:, ::2],
        "expanded": random(4, IN).expand(3, 4, IN),
        "no rows": random(0, IN),
        "no rows in a batch": random(2, 0, IN),
    }


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", inputs())
def test_product(name: str, guard: type, layer: OneDNNLinear) -> None:
    x = inputs()[name]
    with guard():
        out = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert out.dtype == torch.float32 and out.layout == torch.strided
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_bias_and_on_rows_of_a_larger_weight() -> None:
    rows = random(2 * OUT, IN)[OUT // 2 : OUT // 2 + OUT]
    layer, x = OneDNNLinear(rows), random(3, IN, seed=2)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), x @ rows.T)


@torch.no_grad()
def test_product_is_computed_by_onednn(layer: OneDNNLinear) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(random(1, IN))
    assert "aten::mkldnn_linear" in {event.key for event in profile.key_averages()}


@torch.no_grad()
def test_threads_share_a_layer(layer: OneDNNLinear) -> None:
    waves = [random(1 + seed % 5, IN, seed=seed) for seed in range(200)]
    expected = [layer(x) for x in waves]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(torch.no_grad()(layer), waves), expected, strict=True):
            assert torch.equal(found, right)


@torch.no_grad()
def test_other_types_are_left_to_pytorch(layer: OneDNNLinear) -> None:
    x = random(3, IN).bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    cast = layer.to(torch.bfloat16)
    assert torch.equal(cast(x), F.linear(x, cast.weight, cast.bias))


@torch.no_grad()
def test_layers_are_replaced_in_place() -> None:
    """Large ones only; names, values and memory of the parameters stay."""
    side = MIN_ELEMENTS // 512
    large, small = nn.Linear(512, side), nn.Linear(512, side - 1, bias=False)
    other = nn.Linear(512, side, dtype=torch.bfloat16)
    module = nn.ModuleDict({"large": large, "inner": nn.Sequential(small, nn.GELU(), other)})
    before = dict(module.named_parameters())
    use_onednn(module)
    after = dict(module.named_parameters())
    assert type(module["large"]) is OneDNNLinear
    assert module["inner"][0] is small and module["inner"][2] is other
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert after[name].data_ptr() == parameter.data_ptr()
        assert after[name].nbytes == parameter.nbytes


@pytest.mark.parametrize("absent", ["machine", "library"])
def test_nothing_is_replaced_elsewhere(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if absent == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module = nn.Sequential(nn.Linear(4, 4))
    use_onednn(module, min_elements=0)
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("file", FILES)
def test_recorded_features(file: str, golden: Path) -> None:
    directory = golden / "e2e" / "checkpoint" / "whisper-large-v3"
    features = WhisperFeatures(served_by_onednn(whisper_component(directory)), directory)
    found = features.encode(load_audio(golden / "e2e" / "audio" / file))
    expected = load_file(golden / "e2e" / "cases.safetensors")[f"features.{file}"]
    close(found[FILES[file]["feature_rows_stored"]], expected)


@pytest.mark.parametrize("file", FILES)
def test_recorded_speech_codes(file: str, golden: Path) -> None:
    directory = golden / "e2e" / "checkpoint" / "glm-4-voice-tokenizer"
    codes = SpeechCodes(served_by_onednn(speech_tokenizer_component(directory)), directory)
    wave = load_audio(golden / "e2e" / "audio" / file)
    assert codes.encode(wave).tolist() == FILES[file]["codes"]


@torch.no_grad()
def test_recorded_language_model(golden: Path) -> None:
    """Logits of both heads at every position of the prompt."""
    recorded = load_file(golden / "llm" / "forward.safetensors")
    model = served_by_onednn(language_model_component(golden / "llm"))
    names = sorted(name for name in recorded if name.startswith("prefill.whisper_feature."))
    features = torch.cat([recorded[name] for name in names])
    ids = (recorded[f"prefill.{track}_ids"] for track in ("audio", "text"))
    x = model.embed(*ids, recorded["prefill.is_continuous_mask"], features)
    backend = choose_backend(CPU, model.config.head_dim)
    cache = model.new_cache(x.shape[1], x.shape[1])
    hidden = model(x, CachedAttention(backend, cache).sequence(0, 0))
    close(model.text_head(hidden.text[0]), recorded["prefill.text_logits"])
    close(model.audio_head(hidden.audio[0]), recorded["prefill.audio_logits"])


@torch.no_grad()
def test_recorded_velocities(golden: Path, tmp_path: Path) -> None:
    """One evaluation of the DiT at every recorded time."""
    (tmp_path / "model.safetensors").symlink_to(golden / "detok" / "audio_detokenizer.safetensors")
    (tmp_path / "config.yaml").symlink_to(golden / "detok" / "config.yaml")
    dit, recorded = (
        served_by_onednn(dit_component(tmp_path)),
        load_file(golden / "detok" / "unit.safetensors"),
    )
    times = sorted(int(n[5:-4]) for n in recorded if n[:5] == "dit.t" and n[-4:] == ".out")
    positions = recorded["dit.position_ids"]
    conditioning = dit.condition(recorded["dit.tokens"], torch.tensor(times))
    rotary = dit.rotary(positions)
    assert times
    for step, time in enumerate(times):
        attend = FrameCache.behind(Past.nothing(dit), len(positions)).attend
        out = dit(recorded["dit.x"], conditioning.at(step), rotary, attend)
        close(out, recorded[f"dit.t{time}.out"])
