"""What the hub library's own cache holds is used where it lies, and only the rest is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from kimia_infer.models.kimi_audio.checkpoint import (
    LAYOUT,
    MODEL,
    SPEECH_TOKENIZER,
    resolve_weights,
)
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.download import download
from tests.paths import MINI, ROOT
from tests.weights.fake_hub import Hub, checksum, published_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache: Path, name: str, commit: str, files: dict[str, bytes], branch: str = "") -> Path:
    """Write a repository as the hub library does; the folder of its snapshot."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        blob = root / "blobs" / checksum(file, content)
        blob.write_bytes(content)
        link = root / "snapshots" / commit / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if branch:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / branch).write_text(commit)
    return root / "snapshots" / commit


@pytest.fixture
def cache(hub: Hub, tmp_path: Path) -> Path:
    """The hub's cache with both repositories, complete."""
    folder = tmp_path / "hub"
    files = published_files()
    for repository in (MODEL, SPEECH_TOKENIZER):
        put(folder, repository.name, repository.revision, files[repository.name])
    return folder


@pytest.fixture(params=[False, True], ids=["online", "offline"])
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param)
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def test_the_layout_is_that_of_the_hub_library(cache: Path):
    folder = snapshot_download(MODEL.name, revision=MODEL.revision, local_files_only=True)
    assert cache in Path(folder).parents
    assert contents(Path(folder)) == published_files()[MODEL.name]


def test_a_complete_copy_is_used_in_place(hub: Hub, cache: Path, tmp_path: Path, offline: bool):
    before = contents(cache)
    found = resolve_weights(MODEL.name, root=tmp_path / "own")
    assert LAYOUT.incomplete_files(found) == []
    assert not (found / "README.md").exists()
    for name in ("tiktoken.model", "glm-4-voice-tokenizer/model.safetensors", "vocoder/model.pt"):
        assert cache in (found / name).resolve().parents
    assert resolve_weights(f"{MODEL.name}@{MODEL.revision}", root=tmp_path / "own") == found
    assert hub.requests == []
    assert contents(cache) == before


def test_a_directory_of_its_own_does_not_depend_on_the_cache(hub: Hub, cache: Path, tmp_path: Path):
    target = tmp_path / "own"
    download(target, LAYOUT, copies=True)
    shutil.rmtree(cache)
    assert LAYOUT.incomplete_files(target) == []
    assert hub.requests == []


def unlink(link: Path) -> None:
    link.resolve().unlink()
    link.unlink()


LACKS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a shard": ("model-36-of-36.safetensors", unlink),
    "a blob": ("model-36-of-36.safetensors", lambda link: link.resolve().unlink()),
    "half a shard": ("model-1-of-35.safetensors", lambda link: os.truncate(link, 70_000)),
    "half a pickle": ("vocoder/model.pt", lambda link: os.truncate(link, 20)),
    "a setting": ("audio_detokenizer/config.yaml", unlink),
    "half a vocabulary": ("tiktoken.model", lambda link: os.truncate(link, 3)),
    "the index": ("model.safetensors.index.json", unlink),
}


@pytest.mark.parametrize("kind", LACKS)
def test_an_incomplete_copy_is_completed_or_named(
    hub: Hub,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offline: bool,
    kind: str,
):
    monkeypatch.setattr("kimia_infer.weights.download.SMALL_BYTES", 1000)  # shards are large
    name, damage = LACKS[kind]
    snapshot = cache / f"models--{MODEL.name.replace('/', '--')}" / "snapshots" / MODEL.revision
    damage(snapshot / name)
    if offline:
        with pytest.raises(WeightsError, match=f"HF_HUB_OFFLINE is set.*{name}"):
            resolve_weights(MODEL.name, root=tmp_path / "own")
        assert hub.requests == []
        return
    found = resolve_weights(MODEL.name, root=tmp_path / "own")
    assert [served for served, _ in hub.served] == [name]
    assert (found / name).read_bytes() == published_files()[MODEL.name][name]
    assert not (found / name).is_symlink()
    hub.requests.clear()
    assert resolve_weights(MODEL.name, root=tmp_path / "own") == found
    assert hub.requests == []


def test_a_missing_companion_is_downloaded_or_named(
    hub: Hub, cache: Path, tmp_path: Path, offline: bool
):
    shutil.rmtree(cache / f"models--{SPEECH_TOKENIZER.name.replace('/', '--')}")
    if offline:
        with pytest.raises(WeightsError, match=f"does not have {SPEECH_TOKENIZER.name} at"):
            resolve_weights(MODEL.name, root=tmp_path / "own")
        return
    resolve_weights(MODEL.name, root=tmp_path / "own")
    assert {served for served, _ in hub.served} == {
        f"{SPEECH_TOKENIZER.name}/{name}" for name in SPEECH_TOKENIZER.files
    }


def test_another_revision_is_not_taken(hub: Hub, cache: Path, tmp_path: Path, offline: bool):
    folder = cache / f"models--{MODEL.name.replace('/', '--')}" / "snapshots"
    (folder / MODEL.revision).rename(folder / COMMIT)
    if offline:
        with pytest.raises(WeightsError, match=f"at revision {MODEL.revision} but at {COMMIT}"):
            resolve_weights(MODEL.name, root=tmp_path / "own")
        return
    resolve_weights(MODEL.name, root=tmp_path / "own")
    assert "tiktoken.model" in {served for served, _ in hub.served}


def test_a_branch_is_what_the_hub_says_it_is(hub: Hub, cache: Path, tmp_path: Path, offline: bool):
    """Offline, it is what the cache remembers."""
    old = published_files()[MODEL.name] | {"generation_config.json": b"old"}
    put(cache, MODEL.name, COMMIT, old, branch="main")
    found = resolve_weights(f"{MODEL.name}@main", root=tmp_path / "own")
    content = (found / "generation_config.json").read_bytes()
    assert content == (b"old" if offline else hub.files[MODEL.name]["generation_config.json"])
    assert hub.served == []


def test_a_cache_that_was_deleted_is_noticed(hub: Hub, cache: Path, tmp_path: Path):
    found = resolve_weights(MODEL.name, root=tmp_path / "own")
    shutil.rmtree(cache)
    assert resolve_weights(MODEL.name, root=tmp_path / "own") == found
    assert LAYOUT.incomplete_files(found) == []
    assert len(hub.served) == len([p for p in contents(found) if p != "download.json"])


def test_the_environment_names_the_cache(tmp_path: Path):
    """HF_HOME and HF_HUB_OFFLINE, in a new process; a model of another repository is loaded."""
    files = {name: content for name, content in contents(MINI).items() if name != "README.md"}
    put(tmp_path / "home" / "hub", "someone/mini", COMMIT, files, branch="main")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "download_weights", "someone/mini"],
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "KIMI_AUDIO_CACHE": str(tmp_path / "own"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert LAYOUT.incomplete_files(tmp_path / "own" / "someone--mini") == []
