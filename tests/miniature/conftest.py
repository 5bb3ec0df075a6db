"""The trained miniature, and held-out speech of its small world."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.utils.files import locked
from scripts.miniature.recognizer import SpeechRecognizer
from scripts.miniature.scoring import Answer, Case, answer_all, load_model, read_cases
from scripts.miniature.spoken_world import WorldSize, write_world
from scripts.miniature.world import core
from tests.encoded import encode_like, encode_once
from tests.paths import MINI
from tests.spoken import answer_texts, speak_answers

SEED = 20
"""Of conversations that were not drawn in training; their texts are held out, too."""


@pytest.fixture(scope="session")
def spoken_world(tmp_path_factory: pytest.TempPathFactory, long: bool) -> Path:
    """A small world with held-out texts, in known and in held-out voices; written once."""
    count = 600 if long else 120
    size = WorldSize(1, 1, held_out=count, held_out_voices=count, seed=SEED)
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which all processes of a run have in common
    folder = root / "world"
    with locked(root / "world.lock", wait=True):
        if not folder.exists():
            partial = root / "partial_world"
            partial.mkdir(exist_ok=True)
            write_world(partial, size, core)
            speak_answers(answer_texts(partial.glob("held_out*.jsonl")))
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def trained() -> KimiAudio:
    """The miniature; it encodes each sound once, as tests ask about the same ones again."""
    model = load_model(MINI)
    encode_once(model)
    return model


@pytest.fixture(scope="session")
def changed(trained: KimiAudio) -> Callable[..., KimiAudio]:
    """The miniature loaded with other arguments of ``load_model``, and with the same encoders."""

    def load(**arguments: Any) -> KimiAudio:
        model = load_model(MINI, **arguments)
        encode_like(model, trained)
        return model

    return load


@pytest.fixture(scope="session")
def answered(trained: KimiAudio, cases: Callable[..., list[Case]]) -> Callable[..., list[Answer]]:
    """What the miniature answers to held-out conversations of a kind, computed once."""

    @functools.cache
    def given(kind: str, set_name: str = "held_out") -> list[Answer]:
        return answer_all(trained, cases(kind, set_name))

    return given


@pytest.fixture(scope="session")
def recognizer() -> SpeechRecognizer:
    return SpeechRecognizer()


@pytest.fixture(scope="session")
def cases(spoken_world: Path):
    """Held-out conversations of a kind, in the voices of training or, held out, in others."""

    def read(kind: str, set_name: str = "held_out") -> list[Case]:
        return read_cases(spoken_world / f"{set_name}.jsonl", (kind,), limit=1000)

    return read
