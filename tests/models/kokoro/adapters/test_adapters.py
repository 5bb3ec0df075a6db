"""Adapters in the predictor, as directories, and merged."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimia_infer.api.kokoro import Kokoro, load_kokoro
from kimia_infer.models.kokoro.adapters.config import SEAMS, AdapterConfig
from kimia_infer.models.kokoro.adapters.merge import merge
from kimia_infer.models.kokoro.adapters.seams import adapter_parameters, attach, fingerprint
from kimia_infer.models.kokoro.adapters.store import apply_adapter, find_adapter, save_adapter
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.network import KokoroNetwork, Prosody, batch_of
from kimia_infer.utils.errors import CheckpointError, ConfigurationError
from tests.models.kokoro.recorded import CPU, write_pickle

KINDS = (
    AdapterConfig(method="lora", rank=2),
    AdapterConfig(method="residual", cell="cfc", width=4),
    AdapterConfig(method="residual", cell="ltc", width=4),
    AdapterConfig(method="residual", cell="mamba", width=16),
    AdapterConfig(method="replace", cell="cfc", width=4),
)


def named(config: AdapterConfig) -> str:
    return f"{config.method}-{config.cell}"


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Instead of inference mode, in which parameters cannot be trained."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> KokoroNetwork:
    return load_network(tiny, CPU)


@pytest.fixture
def network(loaded: KokoroNetwork) -> KokoroNetwork:
    return copy.deepcopy(loaded)


def prosody(network: KokoroNetwork) -> Prosody:
    ids, rows = batch_of([[1, 2, 3, 4, 5, 6], [7, 8, 9]], CPU)
    style = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    return network.prosody(ids, style, torch.full((2,), 0.5), rows)


def assert_same(found: Prosody, expected: Prosody) -> None:
    for name in ("durations", "pitch", "energy"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def trained(network: KokoroNetwork, config: AdapterConfig) -> None:
    """An adapter of random values, as training might leave it."""
    attach(network.predictor, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(network.predictor).values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def stored(network: KokoroNetwork, config: AdapterConfig, folder: Path) -> Path:
    """The trained adapter that ``network`` gets, as a directory."""
    base = fingerprint(network.predictor)
    trained(network, config)
    save_adapter(folder, network.predictor, config, base, "tiny")
    return folder


@pytest.mark.parametrize("config", KINDS[:4], ids=named)
def test_an_untrained_adapter_changes_nothing(network: KokoroNetwork, config: AdapterConfig):
    before = prosody(network)
    attach(network.predictor, config)
    assert_same(prosody(network), before)
    assert all(p.requires_grad for p in adapter_parameters(network.predictor).values())
    frozen = sum(not p.requires_grad for p in network.predictor.parameters())
    assert frozen == len(list(load_names(network)))


def load_names(network: KokoroNetwork) -> Iterator[str]:
    """Parameters of the predictor that are not of an adapter."""
    own = adapter_parameters(network.predictor)
    yield from (name for name, _ in network.predictor.named_parameters() if name not in own)


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_loaded_by_name_it_speaks_as_before(
    network: KokoroNetwork, config: AdapterConfig, tiny: Path, tmp_path: Path
):
    plain = prosody(network)
    directory = shutil.copytree(tiny, tmp_path / "model")
    stored(network, config, directory / "adapters" / "slow")
    expected = prosody(network)
    assert not torch.equal(plain.pitch[:, :8], expected.pitch[:, :8])
    loaded = load_network(directory, CPU, adapter="slow")
    assert_same(prosody(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_same(prosody(Kokoro(directory, "cpu", adapter="slow").network), expected)


def test_the_voices_of_answers_have_it(network: KokoroNetwork, tiny: Path, tmp_path: Path):
    path = stored(network, KINDS[0], tmp_path / "slow")
    kokoro = load_kokoro(tiny, CPU, str(path))
    assert kokoro is not None
    assert_same(prosody(kokoro.network), prosody(network))
    assert load_kokoro(kokoro, CPU, None) is kokoro and load_kokoro(None, CPU, None) is None
    for none, message in ((None, "needs kokoro"), (kokoro, "this Kokoro is loaded already")):
        with pytest.raises(ConfigurationError, match=f"^kokoro_adapter: {message}"):
            load_kokoro(none, CPU, "slow")


@pytest.mark.parametrize("seam", SEAMS)
def test_one_seam_changes_what_it_feeds(network: KokoroNetwork, seam: str):
    config = AdapterConfig.model_validate({"rank": 2, "seams": [seam]})
    before = prosody(network)
    trained(network, config)
    after = prosody(network)
    same_durations = torch.equal(after.durations, before.durations)
    assert same_durations == (seam == "shared")
    if seam == "shared":
        assert not torch.equal(after.pitch, before.pitch)
        assert torch.equal(after.text, before.text)


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_merged_it_is_a_checkpoint_that_speaks_the_same(
    network: KokoroNetwork, tiny: Path, tmp_path: Path, form: str
):
    tensors = load_file(tiny / "model.safetensors")
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "voices").mkdir()
    (base / "voices" / "af_heart.pt").write_bytes(b"a voice")
    if form == "pickle":
        (base / "model.safetensors").unlink()
        write_pickle(base, tensors, "module.")
    adapter = stored(network, KINDS[0], base / "adapters" / "slow")
    merge(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "voices" / "af_heart.pt").read_bytes() == b"a voice"
    assert not (tmp_path / "merged" / "adapters").exists()
    merged = load_network(tmp_path / "merged", CPU)
    assert_same(prosody(merged), prosody(network))
    changed = {n for n, t in named_tensors(tmp_path / "merged").items() if not same(t, tensors[n])}
    assert {name.rpartition(".")[0].removeprefix("predictor.") for name in changed} == set(SEAMS)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def named_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / "model.safetensors"
    if path.is_file():
        return load_file(path)
    sections = torch.load(directory / "kokoro-v1_0.pth", weights_only=True)
    return {
        f"{section}.{name.removeprefix('module.')}": tensor
        for section, tensors in sections.items()
        for name, tensor in tensors.items()
    }


def test_cells_cannot_be_merged(network: KokoroNetwork, tiny: Path, tmp_path: Path):
    adapter = stored(network, KINDS[1], tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="method: cells cannot be merged"):
        merge(tiny, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(network: KokoroNetwork, tiny: Path, tmp_path: Path):
    directory = shutil.copytree(tiny, tmp_path / "model")
    stored(network, KINDS[0], directory / "adapters" / "slow")
    tensors = load_file(directory / "model.safetensors")
    tensors["predictor.lstm.bias_hh_l0"] = tensors["predictor.lstm.bias_hh_l0"] + 1e-3
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: base: .*another model"):
        load_network(directory, CPU, adapter="slow")


def test_only_adapters_that_are_there(network: KokoroNetwork, tmp_path: Path, monkeypatch):
    path = stored(network, KINDS[0], tmp_path / "adapters" / "slow")
    assert find_adapter(tmp_path, "slow") == find_adapter(tmp_path / "other", str(path)) == path
    # An adapter in the current directory needs a path.
    monkeypatch.chdir(shutil.copytree(path, tmp_path / "fast"))
    for name in ("fast", "../adapters/fast", "", ".", "/tmp", ".hidden"):
        with pytest.raises(CheckpointError, match=r"adapter: .* there is slow; a directory else"):
            find_adapter(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="'fast' is not known"):
        find_adapter(tmp_path, "fast")
    assert find_adapter(tmp_path, "./fast").samefile(tmp_path / "fast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lstm.shift.bias_ih_l0": None}, "lstm.shift.bias_ih_l0 is missing"),
        ({"lstm.extra": torch.zeros(2)}, "lstm.extra has no place"),
        ({"lstm.shift.bias_ih_l0": torch.zeros(2)}, r"\[2\], expected floating point \[32\]"),
        ({"lstm.shift.bias_ih_l0": torch.full((32,), torch.nan)}, "not finite"),
    ],
)
def test_damaged_adapters_are_refused(
    network: KokoroNetwork,
    loaded: KokoroNetwork,
    tmp_path: Path,
    change: dict[str, Tensor | None],
    message: str,
):
    path = stored(network, KINDS[0], tmp_path / "slow") / "adapter_model.safetensors"
    changed = {n: t for n, t in (load_file(path) | change).items() if t is not None}
    save_file(changed, path)
    with pytest.raises(CheckpointError, match=message):
        apply_adapter(copy.deepcopy(loaded.predictor), path.parent)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cell", "gru", "cell: expected 'cfc', 'ltc' or 'mamba', found 'gru'"),
        ("cell", "cfc", "cell: lora takes no cell"),
        ("seams", ["lstm", "decoder"], r"seams\[1\]: "),
        ("seams", ["lstm", "lstm"], "seams: one of them is named twice"),
        ("base", "1234", "base: "),
        ("width", 8, "width: lora has a rank"),
        ("adapter_type", "LORA", "adapter_type: "),
        ("strength", 1, "strength: unknown field"),
    ],
)
def test_wrong_fields_are_named(
    network: KokoroNetwork, loaded: KokoroNetwork, tmp_path: Path,
    field: str, value: object, message: str,
):  # fmt: skip
    path = stored(network, KINDS[0], tmp_path / "slow") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        apply_adapter(loaded.predictor, path.parent)


def test_a_second_adapter_is_refused(network: KokoroNetwork):
    attach(network.predictor, KINDS[1])
    with pytest.raises(CheckpointError, match="has an adapter already"):
        attach(network.predictor, KINDS[0])


@pytest.mark.parametrize("cell", ["cfc", "ltc", "mamba"])
def test_first_values_depend_on_the_seed(loaded: KokoroNetwork, cell: str):
    config = AdapterConfig.model_validate({"method": "residual", "cell": cell, "width": 16})
    found = []
    for seed in (0, 0, 1):
        predictor = copy.deepcopy(loaded.predictor)
        attach(predictor, config, seed)
        found.append({n: p for n, p in adapter_parameters(predictor).items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not all(torch.equal(found[0][n], found[2][n]) for n in found[0])
