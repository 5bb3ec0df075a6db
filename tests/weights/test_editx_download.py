"""Step-Audio-EditX from the hub: which files of both repositories, and where they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimia_infer.models.step_audio_editx.layout import (
    EDITX,
    EDITX_LAYOUT,
    EDITX_TOKENIZER,
    find_editx,
)
from kimia_infer.utils.errors import WeightsError
from tests.command_line import run_here
from tests.weights.fake_hub import Hub, pickle_archive, tensors

UNNEEDED = b"not needed"
INDEX = b'{"weight_map": {"model.norm.weight": "model-00001.safetensors"}}'
SOUND = "CosyVoice-300M-25Hz"
RECOGNIZER = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
MODEL_FILES = {
    "README.md": UNNEEDED,
    "config.json": b"{}",
    "configuration_step1.py": UNNEEDED,
    "modeling_step1.py": UNNEEDED,
    "model-00001.safetensors": tensors(1),
    "model.safetensors.index.json": INDEX,
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": UNNEEDED,
    f"{SOUND}/FLOW_VERSION": UNNEEDED,
    f"{SOUND}/campplus.onnx": b"campplus",
    f"{SOUND}/cosyvoice.yaml": b"flow: {}",
    f"{SOUND}/flow.pt": pickle_archive("flow"),
    f"{SOUND}/hift.pt": pickle_archive("hift"),
    f"{SOUND}/speech_tokenizer_v1.onnx": UNNEEDED,
}
TOKENIZER_FILES = {
    "README.md": UNNEEDED,
    "linguistic_tokenizer.npy": b"centres",
    "speech_tokenizer_v1.onnx": b"vq06",
    f"{RECOGNIZER}/am.mvn": b"mean",
    f"{RECOGNIZER}/config.yaml": b"encoder_conf: {}",
    f"{RECOGNIZER}/model.pt": pickle_archive("recognizer"),
    f"{RECOGNIZER}/tokens.json": UNNEEDED,
}


@pytest.fixture
def published(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    for repository, files in ((EDITX, MODEL_FILES), (EDITX_TOKENIZER, TOKENIZER_FILES)):
        hub.files[repository.name] = files
        hub.revisions[repository.name] = repository.revision
    monkeypatch.setenv("KIMI_AUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KIMI_AUDIO_EDITX", raising=False)
    return hub


def test_the_needed_files_of_both_repositories(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("download", "--model", "editx") == 0
    said = capsys.readouterr().out
    directory = tmp_path / "cache" / "Step-Audio-EditX"
    assert f"{directory} is complete" in said and "FunASR's model licence" in said
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    expected = {
        f"{repository.folder}/{name}"
        for repository, files in ((EDITX, MODEL_FILES), (EDITX_TOKENIZER, TOKENIZER_FILES))
        for name, content in files.items()
        if content != UNNEEDED
    }
    assert found - {".download.lock", "download.json"} == expected
    assert find_editx(None) == find_editx("auto") == find_editx(directory) == directory
    asked = len(published.requests)
    assert run_here("download", "--model", "editx") == 0
    assert len(published.requests) == asked


def test_missing_weights_say_what_to_fetch(published: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="scripts/download_weights --model editx") as error:
        find_editx(None)
    assert "KIMI_AUDIO_EDITX" in str(error.value)
    (tmp_path / "some").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json is missing .*--model editx --to"):
        find_editx(tmp_path / "some")
    assert not published.requests


def test_a_shard_that_is_cut_short_is_not_complete(published: Hub, tmp_path: Path) -> None:
    assert run_here("download", "--model", "editx", "--to", tmp_path / "here") == 0
    shard = tmp_path / "here" / "Step-Audio-EditX" / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    [fault] = EDITX_LAYOUT.incomplete_files(tmp_path / "here")
    assert fault.startswith("Step-Audio-EditX/model-00001.safetensors (100 bytes instead of")
