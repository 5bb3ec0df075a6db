"""Where weights come from, and what makes a directory complete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kimia_infer.models.kimi_audio.checkpoint import (
    LAYOUT,
    MODEL,
    TEXT_LAYOUT,
    resolve_weights,
    weights_from_environment,
)
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights import download
from kimia_infer.weights.resolve import cache_directory, local_copy
from tests.paths import ROOT

DETOKENIZER = ("audio_detokenizer/config.yaml", "audio_detokenizer/model.pt")
DETOKENIZER += ("vocoder/config.json", "vocoder/model.pt")
OPTIONAL = (
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "glm-4-voice-tokenizer/preprocessor_config.json",
    "whisper-large-v3/preprocessor_config.json",
)


@pytest.fixture
def checkpoint(golden: Path, tmp_path: Path) -> Path:
    """A complete directory whose files may be changed."""
    return Path(shutil.copytree(golden / "e2e" / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where downloads would have gone; none happens."""
    asked: list[Path] = []
    monkeypatch.setattr(download, "download", lambda to, *_: asked.append(to))
    return asked


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch):
    def put(**values: str) -> None:
        for name in ("KIMI_AUDIO_WEIGHTS", "COG_WEIGHTS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_the_environment_is_asked_in_order(environ):
    environ(KIMI_AUDIO_WEIGHTS="a", COG_WEIGHTS="c")
    assert weights_from_environment("b") == "a"
    environ(COG_WEIGHTS="c")
    assert weights_from_environment("b") == "b"
    assert weights_from_environment(Path("b")) == "b"
    assert weights_from_environment() == "c"


def test_nothing_is_guessed(environ):
    environ()
    with pytest.raises(WeightsError, match=r"KIMI_AUDIO_WEIGHTS.*COG_WEIGHTS"):
        weights_from_environment()


@pytest.mark.parametrize("name", ["KIMI_AUDIO_WEIGHTS", "COG_WEIGHTS"])
def test_an_empty_variable_is_named(environ, name: str):
    environ(**{name: " "})
    with pytest.raises(WeightsError, match=f"{name}: empty"):
        weights_from_environment()


def test_a_complete_directory_is_taken_as_it_is(checkpoint: Path, monkeypatch):
    assert LAYOUT.missing_files(checkpoint) == []
    assert resolve_weights(str(checkpoint)) == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert resolve_weights("checkpoint") == Path("checkpoint")
    monkeypatch.chdir(checkpoint / "vocoder")
    assert resolve_weights("../../checkpoint").resolve() == checkpoint


def test_the_miniature_is_complete():
    assert LAYOUT.missing_files(ROOT / "weights" / "mini") == []


def every_file(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_every_file_that_loading_needs_is_required(checkpoint: Path):
    names = [name for name in every_file(checkpoint) if name not in OPTIONAL]
    assert set(DETOKENIZER) < set(names)
    for name in names:
        (checkpoint / name).rename(checkpoint / "away")
        found = LAYOUT.missing_files(checkpoint)
        wanted = ["model.safetensors.index.json"] if name.endswith("index.json") else [name]
        assert found == wanted
        assert TEXT_LAYOUT.missing_files(checkpoint) == [
            entry for entry in wanted if entry not in DETOKENIZER
        ]
        with pytest.raises(WeightsError, match=f"{name}.*scripts/download_weights") as error:
            resolve_weights(checkpoint)
        assert str(checkpoint) in str(error.value)
        (checkpoint / "away").rename(checkpoint / name)
    assert LAYOUT.missing_files(checkpoint) == []


@pytest.mark.parametrize("keep", [0, 6, 1000, -1])
def test_every_weight_file_that_is_cut_short_is_found(checkpoint: Path, keep: int):
    names = [n for n in every_file(checkpoint) if n.endswith((".safetensors", ".pt"))]
    for name in names:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:keep])
        (found,) = LAYOUT.incomplete_files(checkpoint)
        assert found.startswith(f"{name} (")
        (checkpoint / name).write_bytes(content)


def test_recorded_sizes_decide_where_there_are_any(checkpoint: Path):
    size = (checkpoint / "vocoder/model.pt").stat().st_size
    record = {"files": {"vocoder/model.pt": size + 1}, "sources": {}}
    (checkpoint / "download.json").write_text(json.dumps(record))
    (found,) = LAYOUT.incomplete_files(checkpoint)
    assert found == f"vocoder/model.pt ({size} bytes instead of {size + 1})"
    (checkpoint / "download.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"download\.json.*delete it"):
        LAYOUT.incomplete_files(checkpoint)


def test_one_language_model_file_will_do(checkpoint: Path):
    next(checkpoint.glob("model-*.safetensors")).rename(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors.index.json").unlink()
    assert LAYOUT.missing_files(checkpoint) == []


@pytest.mark.parametrize("folder", ["audio_detokenizer", "vocoder"])
def test_safetensors_replace_a_pickle(checkpoint: Path, folder: str):
    (checkpoint / folder / "model.pt").unlink()
    assert LAYOUT.missing_files(checkpoint) == [f"{folder}/model.pt"]
    shard = next(checkpoint.glob("model-*.safetensors"))
    shutil.copy(shard, checkpoint / folder / "model.safetensors")
    assert LAYOUT.missing_files(checkpoint) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(checkpoint: Path, content: str):
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json .not a safetensors"):
        resolve_weights(checkpoint)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("../x", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("model", "no such directory"),
        ("owner/name/more", "no such directory"),
        ("owner/na..me", "no such directory"),
        ("owner/name@", "no such directory"),
        ("owner/name@../../x", "no such directory"),
        ("owner/name@a b", "no such directory"),
        ("-owner/name", "no such directory"),
        ("https://huggingface.co/owner/name", "a URL"),
        ("hf://owner/name", "a URL"),
        ("file", "a file"),
        ("folder/file", "a file"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, monkeypatch, value: str, reason: str):
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/file"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=reason) as error:
        resolve_weights(value, root=tmp_path / "root")
    assert "directory" in str(error.value) and "owner/name" in str(error.value)
    assert not (tmp_path / "root").exists()


def test_a_relative_directory_from_elsewhere_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="weights/minni: no such directory; as a hub repository"):
        resolve_weights("weights/minni", root=tmp_path)


def test_a_local_copy_answers_for_the_hub(checkpoint: Path, tmp_path: Path, downloads: list[Path]):
    local = tmp_path / "Kimi-Audio-7B-Instruct"
    checkpoint.rename(local)
    assert resolve_weights(MODEL.name, root=tmp_path) == local
    assert resolve_weights(f"{MODEL.name}@{MODEL.revision}", root=tmp_path) == local
    assert not downloads
    other = tmp_path / "Kimi-Audio-7B-Instruct@v2"
    assert resolve_weights(f"{MODEL.name}@v2", root=tmp_path) == other
    assert downloads == [other]
    shutil.copytree(local, other)
    resolve_weights(f"{MODEL.name}@v2", root=tmp_path)
    assert downloads == [other]
    (other / "vocoder" / "model.pt").write_bytes(b"half")
    resolve_weights(f"{MODEL.name}@v2", root=tmp_path)
    assert downloads == [other, other]


def test_a_copy_of_another_repository_does_not_answer(checkpoint: Path, tmp_path: Path):
    local = tmp_path / "Kimi-Audio-7B-Instruct"
    checkpoint.rename(local)
    sources = {"someone/Kimi-Audio-7B-Instruct": {"asked": "main", "commit": "0123abc"}}
    (local / "download.json").write_text(json.dumps({"files": {}, "sources": sources}))
    with pytest.raises(WeightsError, match="holds someone/Kimi-Audio-7B-Instruct@main"):
        resolve_weights(MODEL.name, root=tmp_path)


def test_other_repositories_are_kept_by_owner(
    checkpoint: Path, tmp_path: Path, downloads: list[Path]
):
    checkpoint.rename(tmp_path / "mini")
    own = tmp_path / "someone--mini"
    assert resolve_weights("someone/mini", root=tmp_path) == own
    assert downloads == [own]
    (tmp_path / "mini").rename(own)
    assert resolve_weights("someone/mini@main", root=tmp_path) == own
    assert downloads == [own]


def test_default_revisions():
    assert LAYOUT.default_revision(MODEL.name) == MODEL.revision
    assert LAYOUT.default_revision("someone/else") == "main"


def test_weights_are_kept_in_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("KIMI_AUDIO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "kimi-audio"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "kimi-audio"
    monkeypatch.setenv("KIMI_AUDIO_CACHE", "~/models")
    assert cache_directory() == tmp_path / "models"
    assert local_copy("someone/mini", "v2", LAYOUT) == tmp_path / "models" / "someone--mini@v2"
    folder = tmp_path / "models" / "Kimi-Audio-7B-Instruct"
    assert local_copy(MODEL.name, MODEL.revision, LAYOUT) == folder


def test_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch):
    """As in a container that runs under any number."""
    for name in ("KIMI_AUDIO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(WeightsError, match="KIMI_AUDIO_CACHE"):
        cache_directory()
