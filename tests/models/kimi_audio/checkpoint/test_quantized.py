"""Quantized weights: at load, and prepared; the same model, and never a larger one in memory."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.layers.quantization import (
    SCHEMES,
    QuantizedLinear,
    quantize_model,
    quantized_component,
)
from kimia_infer.models.kimi_audio.components import checkpoint_components
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import CheckpointError, ConfigurationError, WeightsError
from kimia_infer.weights.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.parallel import load_modules
from tests.command_line import run_here
from tests.paths import ROOT

MINI, QUESTION = ROOT / "weights" / "mini", ROOT / "scripts" / "question.wav"
CPU = torch.device("cpu")
SHARD = 10**6
QUANTIZED = [scheme for scheme in SCHEMES if scheme != "none"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    """Quantized copies of the miniature by scheme and dtype, each written once."""
    known: dict[tuple[str, str], Path] = {}

    def get(scheme: str, dtype: str = "served") -> Path:
        if (scheme, dtype) not in known:
            target = tmp_path_factory.mktemp("prepared") / f"{scheme}-{dtype}"
            prepare_weights(MINI, target, dtype, SHARD, scheme)
            known[scheme, dtype] = target
        return known[scheme, dtype]

    return get


def serve(directory: Path, dtype: str = "bfloat16", **options) -> KimiAudio:
    return KimiAudio(str(directory), device="cpu", dtype=dtype, head_rows="track", **options)


def loaded(directory: Path, dtype: torch.dtype, **options: Any) -> LanguageModel:
    """The language model as it is loaded, before a CPU's kernels take its matrices."""
    return load_components(directory, False, CPU, dtype, **options).language_model


def answer(model: KimiAudio) -> tuple[list[int], list[int]]:
    chat = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
    options = parse_parameters(output_type="both", audio_temperature=0.8, max_new_tokens=20, seed=3)
    completion = model.complete(chat, options)
    assert completion.metrics["quantization"] == model.quantization
    return completion.text_ids, completion.audio_ids


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, and of the same dtypes."""
    values = dict(found.named_parameters())
    assert values.keys() == dict(expected.named_parameters()).keys()
    for name, value in expected.named_parameters():
        assert values[name].dtype is value.dtype
        assert torch.equal(values[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("scheme", "stored", "dtype"),
    [*((scheme, "served", "bfloat16") for scheme in QUANTIZED), ("int4", "source", "float32")],
)
def test_prepared_weights_are_those_quantized_at_load(
    scheme: str, stored: str, dtype: str, prepared
) -> None:
    ready, at_load = serve(prepared(scheme, stored), dtype), serve(MINI, dtype, quantization=scheme)
    assert ready.quantization == at_load.quantization == scheme
    kind = getattr(torch, dtype)
    assert_equal(loaded(prepared(scheme, stored), kind), loaded(MINI, kind, quantization=scheme))
    assert answer(ready) == answer(at_load)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_quantizing_at_load_and_in_memory_agree(scheme: str) -> None:
    """Queries, keys and values are stored apart; the matrix in memory is quantized whole."""
    part = language_model_component(MINI)
    expected = quantize_model(part.load(CPU, torch.float32), scheme)
    assert_equal(quantized_component(part, scheme).load(CPU, torch.float32), expected)
    assert not any(p.requires_grad for p in expected.parameters())


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_files_hold_what_memory_does(scheme: str, prepared) -> None:
    target = prepared(scheme)
    manifest = json.loads((target / "manifest.json").read_text())
    details = {"int4": {"group_size": 32}, "fp8": {"first_layers_int8": 4}}.get(scheme, {})
    assert manifest["quantization"] == {"scheme": scheme, "format": 1, **details}
    stored = {
        n: t for path in target.glob("model*.safetensors") for n, t in load_file(path).items()
    }
    model = language_model_component(target, quantized=True).load(CPU, torch.bfloat16)
    assert sum(t.nbytes for t in stored.values()) == sum(p.nbytes for p in model.parameters())
    query = stored["model.layers.0.self_attn.q_proj.weight"]
    scale = stored["model.layers.0.self_attn.q_proj.weight_scale"]
    assert query.dtype is torch.int8 and scale.dtype is torch.bfloat16
    rows = len(query)
    assert torch.equal(query, model.layers[0].attention.qkv.weight[:rows])
    assert torch.equal(scale, model.layers[0].attention.qkv.scale[:rows])


def test_a_plain_manifest_says_nothing_of_it(tmp_path: Path) -> None:
    prepare_weights(MINI, tmp_path / "slim")
    assert "quantization" not in json.loads((tmp_path / "slim" / "manifest.json").read_text())
    int8 = serve(tmp_path / "slim", load_detokenizer=False, quantization="int8")
    assert int8.quantization == "int8"
    assert serve(tmp_path / "slim", load_detokenizer=False).quantization == "none"


@pytest.mark.parametrize("asked", ["none", "int4"])
def test_another_scheme_than_stored_is_refused(asked: str, prepared) -> None:
    with pytest.raises(CheckpointError, match=rf"quantized \(int8\), but '{asked}' is asked for"):
        serve(prepared("int8"), quantization=asked)
    assert serve(prepared("int8"), quantization="int8", load_detokenizer=False)


def test_an_unknown_scheme_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigurationError, match="expected none, fp8, int8, int4, found 'int2'"):
        serve(Path("nowhere/model"), quantization="int2")


def test_rows_that_are_not_whole_groups_are_refused(golden: Path, tmp_path: Path) -> None:
    recorded = golden / "e2e" / "checkpoint"
    with pytest.raises(ConfigurationError, match=r"int4 .* rows of \d+; use 'int8' or 'fp8'"):
        prepare_weights(recorded, tmp_path / "slim", quantization="int4")
    assert not (tmp_path / "slim").exists()
    with pytest.raises(ConfigurationError, match=r"int4 .* rows of \d+; use 'int8' or 'fp8'"):
        serve(recorded, quantization="int4")
    assert serve(recorded, quantization="fp8").quantization == "fp8"


@pytest.mark.parametrize(
    "found",
    [
        {"scheme": "int8", "format": 2},
        {"scheme": "int3", "format": 1},
        {"scheme": "fp8", "format": 1},
        "int8",
        {},
    ],
)
def test_other_formats_are_refused(found: object, tmp_path: Path, prepared) -> None:
    for path in prepared("int8").iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((prepared("int8") / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"quantization": found}))
    with pytest.raises(CheckpointError, match=r"manifest.json: .*format 1.*prepare them again"):
        serve(tmp_path)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_without_its_manifest_it_is_refused(scheme: str, tmp_path: Path, prepared) -> None:
    for path in prepared(scheme).iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match=r"quantized weights need the manifest\.json"):
        serve(tmp_path)


def test_only_serving_takes_quantized_weights(prepared, tmp_path: Path) -> None:
    for use in (checkpoint_components, language_model_component):
        with pytest.raises(CheckpointError, match="can only be served"):
            use(prepared("int8"))
    with pytest.raises(CheckpointError, match="can only be served"):
        prepare_weights(prepared("int8"), tmp_path / "again", quantization="int4")


def test_damage_is_named(prepared, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    prepare_weights(MINI, target, quantization="int8")
    path = target / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # narrow elements are stored last
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensor model\.\S+_proj.weight is damaged"):
        serve(target)


class Watch:
    """How many of the tensors that ``Slot.value`` has given are still in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[weakref.ref] = []
        self.most = 0
        value = Slot.value

        def watched(slot: Slot, *arguments) -> Tensor:
            found = value(slot, *arguments)
            self.seen.append(weakref.ref(found))
            self.most = max(self.most, sum(tensor() is not None for tensor in list(self.seen)))
            return found

        monkeypatch.setattr(Slot, "value", watched)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_reader_holds_one_matrix_at_most(readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    part = quantized_component(language_model_component(MINI), "int8")
    allocated: list[int] = []
    allocate = Component.allocate

    def watched(self: Component, *arguments) -> nn.Module:
        module = allocate(self, *arguments)
        allocated.append(sum(p.nbytes for p in module.parameters()))
        return module

    monkeypatch.setattr(Component, "allocate", watched)
    model = load_modules({"rows": (part, torch.bfloat16)}, CPU, readers=readers)["rows"]
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(watch.seen) == 7 * len(layers) // 4  # q, k, v, o, gate, up, down
    assert 1 <= watch.most <= readers
    plain = language_model_component(MINI).load(CPU, torch.bfloat16)
    saved = sum(m.out_features * (m.in_features - 2) for m in layers)  # scales take 2 bytes
    assert allocated[0] == sum(p.nbytes for p in plain.parameters()) - saved


def test_prepared_weights_need_no_larger_tensors(monkeypatch: pytest.MonkeyPatch, prepared) -> None:
    watch = Watch(monkeypatch)
    part = language_model_component(prepared("int4"), quantized=True)
    load_modules({"rows": (part, torch.bfloat16)}, CPU)
    assert not watch.seen


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Changes one layer's queries, keys and values, and one feed-forward matrix."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    model = language_model_component(MINI).build()
    for name in ("layers.1.attention.qkv", "layers.2.feed_forward.down"):
        layer, where = model.get_submodule(name), f"{PREFIX}language_model.{name}"
        a = torch.randn(2, layer.in_features, generator=generator)
        b = torch.randn(layer.out_features, 2, generator=generator)
        tensors |= {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": 0.05 * b}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    targets = r"language_model\.layers\.(1\.attention\.qkv|2\.feed_forward\.down)"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_an_adapter_is_added_before_weights_are_quantized(scheme: str, adapter: Path) -> None:
    expected = quantize_model(loaded(MINI, torch.float32, adapter=adapter), scheme)
    both = loaded(MINI, torch.float32, adapter=adapter, quantization=scheme)
    assert_equal(both, expected)
    without = loaded(MINI, torch.float32, quantization=scheme)
    changed = both.layers[1].attention.qkv, without.layers[1].attention.qkv
    assert not torch.equal(changed[0].weight, changed[1].weight)


def test_no_adapter_is_added_to_quantized_weights(adapter: Path, prepared) -> None:
    with pytest.raises(CheckpointError, match=r"an adapter cannot be added .* \(int8\)"):
        serve(prepared("int8"), adapter=adapter)


def test_the_command_prepares_and_does_not_mix(tmp_path: Path) -> None:
    assert run_here("prepare", MINI, tmp_path / "new", "--quantization", "int4") == 0
    assert serve(tmp_path / "new", load_detokenizer=False).quantization == "int4"
    with pytest.raises(WeightsError, match="begun with --quantization int4"):
        prepare_weights(MINI, tmp_path / "new")
