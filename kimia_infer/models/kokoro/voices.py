"""Voices of a checkpoint directory by name, and mixtures of them."""

from __future__ import annotations

import difflib
import pickle
import re
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kimia_infer.models.kokoro.layout import FETCH, VOICES_FOLDER, VOICES_NAME
from kimia_infer.utils.errors import CheckpointError, RequestError

LANGUAGES = {
    "a": "en-us",
    "b": "en-gb",
    "e": "es",
    "f": "fr-fr",
    "h": "hi",
    "i": "it",
    "j": "ja",
    "p": "pt-br",
    "z": "zh",
}
"""The language of a voice, by the first letter of its name."""

MOST_PARTS = 8

_PART = re.compile(r"\s*([A-Za-z0-9_]+)\s*(?::\s*([0-9.]+)\s*)?")


class Voices:
    """The voices of a directory, each a float32 tensor [rows, 2 * style] that is read when used.

    A sentence of n phonemes is spoken with row n - 1.
    """

    def __init__(self, directory: Path, width: int):
        """``width`` is that of the rows. Raises CheckpointError where there is no voice."""
        self._directory, self._width = directory, width
        path, folder = directory / VOICES_NAME, directory / VOICES_FOLDER
        try:
            self._packs = load_file(path) if path.is_file() else {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        names = {file.stem for file in folder.glob("*.pt")} | self._packs.keys()
        if not names:
            raise CheckpointError(f"{directory}: no voices/NAME.pt and no {VOICES_NAME}; {FETCH}")
        self.names = sorted(names)
        self._pack = lru_cache(maxsize=64)(self._read)

    def style(self, voice: str, phonemes: int) -> Tensor:
        """The row [2 * style] of a voice, or of a mixture, for a number of phonemes.

        A mixture is written ``af_heart:0.7+am_michael:0.3``; weights are divided by their sum.

        Raises:
            RequestError: naming ``voice``: unknown, or not such a mixture.
        """
        parts = parse_voice(voice, self.names)
        total = sum(weight for _, weight in parts)
        rows = [self._row(name, phonemes) * (weight / total) for name, weight in parts]
        return torch.stack(rows).sum(0)

    def _row(self, name: str, phonemes: int) -> Tensor:
        pack = self._pack(name)
        return pack[min(max(phonemes, 1), len(pack)) - 1]

    def _read(self, name: str) -> Tensor:
        pack: object = self._packs.get(name)
        path = self._directory / VOICES_NAME
        if pack is None:
            path = self._directory / VOICES_FOLDER / f"{name}.pt"
            try:
                pack = torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise CheckpointError(f"{path}: not a voice ({reason})") from error
        if not isinstance(pack, Tensor) or pack.numel() == 0 or pack.shape[-1:] != (self._width,):
            raise CheckpointError(f"{path}: voice {name}: expected rows of {self._width} numbers")
        return pack.detach().float().reshape(-1, self._width)


def parse_voice(voice: str, known: list[str]) -> list[tuple[str, float]]:
    """Names and weights of ``voice``; raises RequestError."""
    parts = []
    for text in voice.split("+"):
        found = _PART.fullmatch(text)
        if found is None:
            raise RequestError(
                f"voice: expected a name or NAME:WEIGHT+NAME:WEIGHT, found {voice[:100]!r}"
            )
        name, weight = found[1], found[2] or "1"
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known[:8])}, ..."
            raise RequestError(f"voice: unknown voice {name[:100]!r}; {hint}")
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or float(weight) == 0:
            raise RequestError(f"voice: expected a weight above 0, found {weight!r}")
        parts.append((name, float(weight)))
    if len(parts) > MOST_PARTS:
        raise RequestError(f"voice: at most {MOST_PARTS} voices are mixed, found {len(parts)}")
    return parts


def language_of(voice: str) -> str:
    """The language that a voice was trained on, that of the first one in a mixture."""
    return LANGUAGES.get(voice.strip()[:1], "en-us")
