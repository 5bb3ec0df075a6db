"""Where tests find what is not code."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("KIMI_AUDIO_GOLDEN", ROOT / "tests" / "golden"))
MINI = ROOT / "weights" / "mini"
