"""Progress bars, which look the same everywhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(description: str, total: float | None = None, unit: str = "", **options: Any) -> tqdm:
    """A progress bar on stderr: live on a terminal, a line every 30 seconds elsewhere.

    ``unit`` is what is counted, in the plural; ``options`` go to tqdm.
    """
    return tqdm(
        desc=description,
        total=total,
        unit=f" {unit}",
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
        **options,
    )
