"""Downloads against a hub on 127.0.0.1 that can be told to misbehave."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.checkpoint import (
    LAYOUT,
    MODEL,
    SPEECH_TOKENIZER,
    TEXT_LAYOUT,
    resolve_weights,
)
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import CheckpointError, WeightsError
from kimia_infer.weights.download import download
from tests.paths import ROOT
from tests.weights.fake_hub import Hub, published_files, tensors


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch):
    """Blocks the network from the call on; the attempts are listed."""
    attempts: list[object] = []

    def refuse(*arguments: object) -> None:
        attempts.append(arguments)
        raise OSError("the network is blocked")

    def block() -> list[object]:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        return attempts

    return block


def test_only_the_needed_files_of_both_repositories(hub: Hub, tmp_path: Path):
    target = tmp_path / "model"
    download(target, LAYOUT)
    expected = {n: c for n, c in hub.files[MODEL.name].items() if c not in (b"not needed",)}
    del expected["modeling_moonshot_kimia.py"]
    for name in SPEECH_TOKENIZER.files:
        expected[f"glm-4-voice-tokenizer/{name}"] = hub.files[SPEECH_TOKENIZER.name][name]
    found = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
    record = json.loads(found.pop("download.json").read_text())
    found = {name: path for name, path in found.items() if not re.search(r"(^|/)\.", name)}
    assert {name: path.read_bytes() for name, path in found.items()} == expected
    assert record["files"] == {name: len(content) for name, content in expected.items()}
    assert {n: s["commit"] for n, s in record["sources"].items()} == hub.revisions
    assert LAYOUT.incomplete_files(target) == []


def test_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(tmp_path, LAYOUT)
    assert hub.keys == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}


def test_a_complete_directory_needs_no_network(hub: Hub, tmp_path: Path, no_network):
    target = tmp_path / MODEL.name.partition("/")[2]
    download(target, LAYOUT)
    attempts = no_network()
    with pytest.raises(OSError, match="blocked"):  # the block works
        socket.create_connection(("127.0.0.1", hub.server_port))
    attempts.clear()
    download(target, LAYOUT)
    assert resolve_weights(MODEL.name, root=tmp_path) == target
    assert resolve_weights(f"{MODEL.name}@{MODEL.revision}", root=tmp_path) == target
    assert resolve_weights(target) == target
    assert attempts == []


def test_a_copy_without_a_record_needs_no_network(hub: Hub, tmp_path: Path, no_network):
    download(tmp_path, LAYOUT)
    (tmp_path / "download.json").unlink()
    attempts = no_network()
    download(tmp_path, LAYOUT)
    assert attempts == []


def test_a_hub_id_is_downloaded_under_the_root(hub: Hub, tmp_path: Path):
    assert resolve_weights(MODEL.name, root=tmp_path) == tmp_path / "Kimi-Audio-7B-Instruct"
    hub.revisions[MODEL.name] = "f00d"
    other = resolve_weights(f"{MODEL.name}@main", root=tmp_path)
    assert other == tmp_path / "Kimi-Audio-7B-Instruct@main"
    with pytest.raises(WeightsError, match=r"holds .*@main"):
        download(other, LAYOUT)


def test_a_lost_connection_is_continued(hub: Hub, tmp_path: Path):
    name = "model-1-of-35.safetensors"
    hub.cut[name] = [70_000, 20_000]
    download(tmp_path, LAYOUT)
    assert hub.ranges(name) == [None, "bytes=70000-", "bytes=90000-"]
    assert (tmp_path / name).read_bytes() == hub.files[MODEL.name][name]


def test_a_file_is_continued_by_the_next_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = "model-1-of-35.safetensors"
    hub.cut[name] = [70_000, *[0] * 20]
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", lambda seconds: None)  # between attempts
        with pytest.raises(WeightsError, match="cannot be reached"):
            download(tmp_path, LAYOUT)
    assert not (tmp_path / name).exists()
    hub.cut.clear()
    hub.served.clear()
    download(tmp_path, LAYOUT)
    assert hub.ranges(name) == ["bytes=70000-"]
    assert (tmp_path / name).read_bytes() == hub.files[MODEL.name][name]
    assert not list(tmp_path.rglob("*.part"))


def test_a_killed_download_is_continued(hub: Hub, tmp_path: Path):
    """What was complete is kept, and nothing else has its final name."""
    name = "audio_detokenizer/model.pt"
    hub.stall[name] = 10
    command = [sys.executable, ROOT / "scripts" / "download_weights", "--to", tmp_path]
    process = subprocess.Popen(
        command, env={**os.environ, "HF_ENDPOINT": hub.url}, stderr=subprocess.DEVNULL
    )
    finished = set(hub.files[MODEL.name]) & set(MODEL.files) - {name}
    while not all((tmp_path / other).is_file() for other in finished):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    hub.stall.clear()
    hub.released.set()
    assert not (tmp_path / name).exists()
    hub.served.clear()
    download(tmp_path, LAYOUT)
    asked = {served for served, _ in hub.served}
    assert name in asked and not asked & finished
    assert LAYOUT.incomplete_files(tmp_path) == []


@pytest.mark.parametrize("name", ["model-36-of-36.safetensors", "tiktoken.model"])
def test_a_file_that_stays_short_is_named(hub: Hub, tmp_path: Path, name: str):
    content = hub.files[MODEL.name][name]
    hub.changed[name] = content[:-3]
    with pytest.raises(WeightsError, match=rf"of size {len(content)} but .*{name}"):
        download(tmp_path, LAYOUT)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["audio_detokenizer/model.pt", "tiktoken.model"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda c: c[::-1], "{}: damaged on the way"), (lambda c: c + b"more", r"of size .*{}")],
)
def test_damaged_content_is_refused(hub: Hub, tmp_path: Path, name: str, change, message: str):
    hub.changed[name] = change(hub.files[MODEL.name][name])
    with pytest.raises(WeightsError, match=message.format(name)):
        download(tmp_path, LAYOUT)
    assert not (tmp_path / name).exists()
    hub.changed.clear()
    download(tmp_path, LAYOUT)
    assert (tmp_path / name).read_bytes() == hub.files[MODEL.name][name]


def test_a_file_that_was_cut_afterwards_is_replaced(hub: Hub, tmp_path: Path):
    download(tmp_path, LAYOUT)
    path = tmp_path / "vocoder/model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    hub.served.clear()
    download(tmp_path, LAYOUT)
    assert path.read_bytes() == whole
    assert hub.served == [("vocoder/model.pt", None)]


def test_too_little_disk_space_is_found_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1234, 1234))
    with pytest.raises(WeightsError, match=r"([\d,]+) bytes are still .* 1,234 are free") as error:
        download(tmp_path / "model", LAYOUT)
    wanted = published_files()
    large = sum(len(c) for files in wanted.values() for c in files.values() if len(c) > 1000)
    assert large < int(str(error.value).split(" bytes")[0].split()[-1].replace(",", ""))
    assert hub.served == []


def test_what_is_there_counts_for_the_disk_space(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    download(tmp_path, TEXT_LAYOUT)
    missing = hub.files[MODEL.name]
    missing = [content for name, content in missing.items() if "detok" in name or "voc" in name]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, sum(map(len, missing))))
    download(tmp_path, LAYOUT)
    assert LAYOUT.incomplete_files(tmp_path) == []


def test_a_full_disk_is_reported(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kimia_infer.weights.download.http_get", fail)
    with pytest.raises(WeightsError, match="disk is full: make room and run the download again"):
        download(tmp_path, LAYOUT)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "GatedRepo"), "restricted.*HF_TOKEN"),
        ((401, "RepoNotFound"), "unknown to the hub, or private"),
        ((404, "RevisionNotFound"), f"no revision {MODEL.revision}"),
        ((503, ""), "503"),
    ],
)
def test_refusals_are_explained(hub: Hub, tmp_path: Path, refusal: tuple[int, str], message: str):
    hub.refusal = refusal
    with pytest.raises(WeightsError, match=message):
        download(tmp_path, LAYOUT)


def test_an_unknown_revision_is_named(hub: Hub, tmp_path: Path):
    with pytest.raises(WeightsError, match="no revision feedface"):
        resolve_weights(f"{MODEL.name}@feedface", root=tmp_path)


def test_a_hub_out_of_reach_is_explained(hub: Hub, tmp_path: Path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(WeightsError, match=f"{MODEL.name} cannot be reached.*check the network"):
        download(tmp_path, LAYOUT)


def test_offline_mode_is_respected(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        download(tmp_path, LAYOUT)
    assert hub.requests == []


def test_text_only_leaves_the_detokenizer_out_and_adds_it_later(hub: Hub, tmp_path: Path):
    download(tmp_path, TEXT_LAYOUT)
    assert not (tmp_path / "audio_detokenizer").exists()
    assert TEXT_LAYOUT.incomplete_files(tmp_path) == []
    assert "audio_detokenizer/model.pt" in LAYOUT.incomplete_files(tmp_path)
    hub.served.clear()
    download(tmp_path, LAYOUT)
    assert LAYOUT.incomplete_files(tmp_path) == []
    assert len(hub.served) == 4


def test_a_slim_repository_is_taken_alone(hub: Hub, tmp_path: Path):
    files = dict(hub.files[MODEL.name])
    for folder in ("audio_detokenizer", "vocoder"):
        files[f"{folder}/model.safetensors"] = tensors(5)
    for name, content in hub.files[SPEECH_TOKENIZER.name].items():
        files[f"glm-4-voice-tokenizer/{name}"] = content
    hub.files, hub.revisions = {"someone/slim": files}, {"someone/slim": "c0ffee"}
    target = resolve_weights("someone/slim", root=tmp_path)
    assert target == tmp_path / "someone--slim"
    assert not list(target.rglob("model.pt"))
    assert all("/someone/slim/" in path for path in hub.requests)


def test_a_prepared_checkpoint_comes_with_its_manifest(hub: Hub, tmp_path: Path):
    prepare_weights(ROOT / "weights" / "mini", tmp_path / "slim")
    paths = [path for path in (tmp_path / "slim").rglob("*") if path.is_file()]
    files = {path.relative_to(tmp_path / "slim").as_posix(): path.read_bytes() for path in paths}
    hub.files, hub.revisions = {"someone/slim": files}, {"someone/slim": "c0ffee"}
    target = resolve_weights("someone/slim", detokenizer=False, root=tmp_path)
    assert not (target / "vocoder").exists()
    assert KimiAudio(str(target), device="cpu", load_detokenizer=False).detokenizer is None
    assert resolve_weights("someone/slim", root=tmp_path) == target
    assert all((target / name).read_bytes() == content for name, content in files.items())
    (target / "config.json").write_bytes(files["config.json"].replace(b"1", b"2", 1))
    with pytest.raises(CheckpointError, match=r"config\.json: damaged"):
        KimiAudio(str(target), device="cpu")


def test_another_model_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path):
    del hub.files[MODEL.name]["tiktoken.model"]
    with pytest.raises(WeightsError, match=r"has no tiktoken\.model"):
        download(tmp_path, LAYOUT)
    assert hub.served == []


def run_script(hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "download_weights", *arguments],
        env={**os.environ, "HF_ENDPOINT": hub.url},
        capture_output=True,
        text=True,
    )


def test_the_script(hub: Hub, tmp_path: Path):
    target = tmp_path / "model"
    done = run_script(hub, "--to", str(target))
    assert done.returncode == 0, done.stderr
    assert LAYOUT.incomplete_files(target) == []
    hub.requests.clear()
    again = run_script(hub, "--to", str(target))
    assert (again.returncode, str(target) in again.stdout) == (0, True)
    other = run_script(hub, "--to", str(target), "--revision", "main")
    assert other.returncode == 1
    assert "holds" in other.stderr and "Traceback" not in other.stderr
    assert hub.requests == []
