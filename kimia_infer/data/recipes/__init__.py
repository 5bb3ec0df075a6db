"""Recipes: a manifest from a data set in the layout in which it is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from kimia_infer.data.conversations import DataError
from kimia_infer.data.recipes import sound, speech
from kimia_infer.data.recipes.layout import Row
from kimia_infer.utils.files import write_json_lines

RECIPES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "librispeech": speech.librispeech,
    "aishell-1": speech.aishell1,
    "aishell-2": speech.aishell2,
    "wenetspeech": speech.wenetspeech,
    "fleurs": speech.fleurs,
    "mmau": sound.mmau,
    "clotho-aqa": sound.clotho_aqa,
    "vocalsound": sound.vocalsound,
    "nonspeech7k": sound.nonspeech7k,
    "meld": sound.meld,
    "tut2017": sound.tut2017,
    "cochlscene": sound.cochlscene,
}
"""Each reads the directory of a data set; its docstring names the files there."""


def write_manifest(name: str, data: Path, folder: Path) -> Path:
    """Write the manifest of the data set in ``data`` into ``folder``, by recipe ``name``; its path.

    Raises:
        DataError: there is no such recipe, or ``data`` does not have its layout.
    """
    if name not in RECIPES:
        raise DataError(f"recipe: expected one of {', '.join(RECIPES)}, found {name!r}")
    if not data.is_dir():
        raise DataError(f"{data}: not a directory")
    rows = list(RECIPES[name](data))
    if not rows:
        layout = (RECIPES[name].__doc__ or "").partition("\n")[0].replace("``", "")
        raise DataError(f"{data}: no items; recipe {name} reads {layout}")
    path = folder / f"{name}.jsonl"
    write_json_lines(path, rows)
    return path
