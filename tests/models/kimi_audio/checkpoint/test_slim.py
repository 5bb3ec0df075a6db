"""The slim checkpoint: what it holds, that it serves the same, and that damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.audio.files import load_audio
from kimia_infer.models.kimi_audio.checkpoint import LAYOUT, resolve_weights
from kimia_infer.models.kimi_audio.components import checkpoint_components
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import CheckpointError, WeightsError
from kimia_infer.weights.component import expected_tensors
from tests.paths import ROOT
from tests.weights.bloated import CARD, write_bloated

MINI = ROOT / "weights" / "mini"
SHARD = 10**6
SOURCES = ("mini", "recorded", "bloated")
DTYPES = {"served": torch.bfloat16, "source": torch.float32}
WIDTHS = {"audio_detokenizer": 2, "vocoder": 2, "whisper-large-v3": 2, "": 2}
WIDTHS["glm-4-voice-tokenizer"] = 4


@pytest.fixture(scope="module")
def sources(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bloated = write_bloated(MINI, tmp_path_factory.mktemp("bloated") / "checkpoint")
    return {"mini": MINI, "recorded": golden / "e2e" / "checkpoint", "bloated": bloated}


@pytest.fixture(scope="module")
def slim(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Slim copies by source and dtype, each written once; the language model in shards."""
    known: dict[tuple[str, str], Path] = {}

    def get(name: str, dtype: str) -> Path:
        if (name, dtype) not in known:
            target = tmp_path_factory.mktemp("slim") / f"{name}-{dtype}"
            prepare_weights(sources[name], target, dtype, SHARD)
            known[name, dtype] = target
        return known[name, dtype]

    return get


@pytest.fixture
def copy(slim, tmp_path: Path) -> Path:
    """A slim checkpoint to damage."""
    return Path(shutil.copytree(slim("bloated", "served"), tmp_path / "copy"))


def state(directory: Path) -> dict[str, tuple[str, int]]:
    """Content and modification time of every file."""
    return {
        path.relative_to(directory).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in directory.rglob("*")
        if path.is_file()
    }


def weight_files(directory: Path, folder: str) -> list[Path]:
    return sorted((directory / folder).glob("model*.safetensors"))


def stored(directory: Path, folder: str) -> dict[str, torch.Tensor]:
    return {n: t for path in weight_files(directory, folder) for n, t in load_file(path).items()}


def entries(path: Path) -> dict[str, dict]:
    """Header entries of a safetensors file, with "start" where its data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {n: e | {"start": 8 + length} for n, e in header.items() if n != "__metadata__"}


def data_bytes(path: Path) -> int:
    (start,) = {entry["start"] for entry in entries(path).values()}
    return path.stat().st_size - start


@pytest.mark.parametrize("name", SOURCES)
def test_bytes_as_served_follow_from_the_parameters(name: str, sources, slim) -> None:
    target = slim(name, "served")
    for _, entry in checkpoint_components(sources[name]).items():
        with torch.device("meta"):
            values = sum(parameter.numel() for parameter in entry.component.build().parameters())
        files = weight_files(target, entry.folder)
        assert sum(data_bytes(path) for path in files) == values * WIDTHS[entry.folder]
    assert not list(target.rglob("*.pt"))


@pytest.mark.parametrize("name", SOURCES)
def test_the_dtype_source_keeps_every_tensor_that_is_read(name: str, sources, slim) -> None:
    target = slim(name, "source")
    originals = {
        entry.folder: entry.component for _, entry in checkpoint_components(sources[name]).items()
    }
    for _, entry in checkpoint_components(target).items():
        tensors, original = entry.component.store.tensors, originals[entry.folder].store.tensors
        assert tensors.keys() == expected_tensors(originals[entry.folder].slots).keys()
        for tensor in tensors:
            assert tensors[tensor].dtype == original[tensor].dtype
            assert tensors[tensor].shape == original[tensor].shape
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert sum(data_bytes(path) for path in weight_files(target, entry.folder)) == total
        assert all(name.startswith(entry.prefix) for name in stored(target, entry.folder))


def test_nothing_superfluous_is_kept_and_no_value_changes(slim) -> None:
    target = slim("bloated", "source")
    for folder in WIDTHS:
        mini, kept = stored(MINI, folder), stored(target, folder)
        assert kept.keys() == mini.keys()
        for name, value in mini.items():
            assert torch.equal(kept[name], value.to(kept[name].dtype))
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    shards = {path.name for path in weight_files(target, "")}
    added = {"model.safetensors.index.json", "manifest.json", *shards}
    assert names - added == state(MINI).keys() - {"model.safetensors", *CARD}


def test_shards_are_bounded_and_indexed(slim, sources, tmp_path: Path) -> None:
    files = weight_files(slim("bloated", "served"), "")
    assert len(files) > 2
    for path in files:
        assert data_bytes(path) <= SHARD or len(entries(path)) == 1
    prepare_weights(sources["bloated"], tmp_path / "one")
    assert [path.name for path in weight_files(tmp_path / "one", "")] == ["model.safetensors"]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOURCES)
def test_the_slim_checkpoint_answers_as_its_source(
    name: str, dtype: str, sources, slim, golden: Path
) -> None:
    models = [
        KimiAudio(str(path), device="cpu", dtype=DTYPES[dtype])
        for path in (sources[name], slim(name, dtype))
    ]
    sound = ROOT / "scripts" / "question.wav"
    if name == "recorded":
        sound = min((golden / "e2e" / "audio").glob("*.wav"), key=lambda path: path.stat().st_size)
    chat = [{"role": "user", "message_type": "audio", "content": str(sound)}]
    options = parse_parameters(output_type="both", audio_temperature=0.8, max_new_tokens=45, seed=3)
    ours, slims = (model.complete(chat, options) for model in models)
    assert ours.text_ids == slims.text_ids and ours.audio_ids == slims.audio_ids
    assert ours.codes == slims.codes
    assert len(ours.codes) > 0 or name == "recorded"
    if ours.codes:
        assert torch.equal(ours.wav, slims.wav)
    wave = load_audio(sound)
    features = [model.whisper_features.encode(wave) for model in models]
    assert torch.equal(*features)


@pytest.mark.parametrize("name", SOURCES)
def test_speech_codes_never_change(name: str, sources, slim) -> None:
    wave = load_audio(ROOT / "scripts" / "question.wav")
    directories = [sources[name], slim(name, "served"), slim(name, "source")]
    codes = []
    for directory in directories:
        for dtype in DTYPES.values():
            model = KimiAudio(str(directory), device="cpu", dtype=dtype, load_detokenizer=False)
            codes.append(torch.as_tensor(model.speech_codes.encode(wave)))
    assert len(codes[0]) > 10 and all(torch.equal(other, codes[0]) for other in codes)


def test_a_slim_checkpoint_can_be_made_of_another(sources, slim, tmp_path: Path) -> None:
    prepare_weights(slim("bloated", "source"), tmp_path / "again", "served", SHARD)
    files, others = (
        {name: content for name, (content, _) in state(path).items() if name != "manifest.json"}
        for path in (tmp_path / "again", slim("bloated", "served"))
    )
    assert files == others


def test_the_source_is_not_touched(sources, tmp_path: Path) -> None:
    before = state(sources["bloated"])
    prepare_weights(sources["bloated"], tmp_path / "slim")
    assert state(sources["bloated"]) == before


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def refusal(directory: Path) -> str:
    with pytest.raises((CheckpointError, WeightsError)) as error:
        KimiAudio(str(directory), device="cpu")
    return str(error.value)


def test_a_flipped_byte_of_a_tensor_is_named(copy: Path, long: bool) -> None:
    """The first of the first tensor of a file, and the last of its last; or both of both."""
    for path in sorted(copy.rglob("*.safetensors")):
        listed = entries(path)
        for tensor in {min(listed), max(listed)}:
            begin, end = listed[tensor]["data_offsets"]
            some = [begin] if tensor == min(listed) else [end - 1]
            for position in (begin, end - 1) if long else some:
                flip(path, listed[tensor]["start"] + position)
                message = refusal(copy)
                assert message.startswith(f"{path}: tensor {tensor} is damaged")
                flip(path, listed[tensor]["start"] + position)
    KimiAudio(str(copy), device="cpu")


def test_a_flipped_byte_anywhere_else_is_named(copy: Path, long: bool) -> None:
    """At six places of every file, or at two that change from file to file."""
    names = sorted(path for path in copy.rglob("*") if path.is_file())
    for index, path in enumerate(path for path in names if path.name != "manifest.json"):
        header = path.suffix == ".safetensors"
        last = min(e["start"] for e in entries(path).values()) if header else path.stat().st_size
        places = [0, 6, 7, 9, last // 2, last - 1]
        for position in places if long else (places[index % 6], places[(index + 3) % 6]):
            flip(path, position)
            assert path.relative_to(copy).as_posix() in refusal(copy)
            flip(path, position)
    KimiAudio(str(copy), device="cpu")


def test_a_missing_or_cut_file_is_named(copy: Path) -> None:
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        if path.name == "manifest.json":
            continue
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert path.relative_to(copy).as_posix() in refusal(copy)
        if path.suffix == ".safetensors":
            (found,) = LAYOUT.incomplete_files(copy)
            assert found.startswith(path.relative_to(copy).as_posix())
        path.unlink()
        message = refusal(copy)
        assert path.relative_to(copy).as_posix() in message and "missing" in message
        path.write_bytes(content)


def test_files_that_are_not_listed_are_not_loaded(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    shard = copy / "model-1-of-99.safetensors"
    names = json.loads(index.read_text())
    shutil.copy(weight_files(copy, "")[0], shard)
    listed = json.loads((copy / "manifest.json").read_text())
    first = weight_files(copy, "")[0].name
    names["weight_map"] = {
        n: shard.name if s == first else s for n, s in names["weight_map"].items()
    }
    index.write_text(json.dumps(names))
    del listed["files"][index.name]
    (copy / "manifest.json").write_text(json.dumps(listed))
    assert f"{shard}: tensor " in refusal(copy) and "not listed" in refusal(copy)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "files": {"a": {}}}']
)
def test_another_manifest_is_refused(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    assert f"{copy / 'manifest.json'}: not a manifest of prepare_weights" in refusal(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_names_files_of_its_directory_only(copy: Path, name: str) -> None:
    listed = json.loads((copy / "manifest.json").read_text())
    listed["files"][name] = {"size": 1, "sha256": ""}
    (copy / "manifest.json").write_text(json.dumps(listed))
    assert "lies outside" in refusal(copy)


def test_text_alone_needs_no_detokenizer(copy: Path) -> None:
    for folder in ("audio_detokenizer", "vocoder"):
        shutil.rmtree(copy / folder)
    assert KimiAudio(str(copy), device="cpu", load_detokenizer=False).detokenizer is None
    assert "missing" in refusal(copy)


def test_it_answers_for_the_hub_where_its_source_came_from(sources, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["bloated"], tmp_path / "source"))
    made = {"someone/model": {"asked": "v1", "commit": "c0ffee"}}
    (source / "download.json").write_text(json.dumps({"files": {}, "sources": made}))
    local = tmp_path / "someone--model@v1"
    prepare_weights(source, local)
    assert resolve_weights("someone/model@v1", root=tmp_path) == local
    local.rename(tmp_path / "someone--model@v2")
    with pytest.raises(WeightsError, match="holds someone/model@v1"):
        resolve_weights("someone/model@v2", root=tmp_path)
