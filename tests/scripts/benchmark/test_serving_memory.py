"""The memory figures of the documentation, computed again."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from kimia_infer.api.memory import GB, LONGEST
from scripts.benchmark.serving_memory import (
    FIRST,
    SECOND,
    free_bytes,
    published_plan,
    requests_at_a_time,
    table,
)
from tests.paths import ROOT

MEMORY = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_requests_at_a_time_are_those_of_the_documentation() -> None:
    assert "\n".join(table()) in MEMORY


def test_the_command_prints_them() -> None:
    command = [sys.executable, ROOT / "scripts" / "memory", "--serving"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in MEMORY


@pytest.mark.parametrize(
    ("row", "scheme", "speech", "offload", "apart"),
    [
        (r"48.* \| (`none`|bfloat16)", "none", True, False, False),
        (r"24 GB and 16 GB \|", "none", True, False, True),
        (r"24 GB \| .*int8`", "int8", True, False, False),
        (r"16 GB \| .*int4` (with|and) `KIMI_AUDIO_OFFLOAD", "int4", True, True, False),
        (r"16 GB.* \| .*int4` (with|and) `KIMI_AUDIO_OUTPUT", "int4", False, False, False),
    ],
)
def test_what_variants_need(
    row: str, scheme: str, speech: bool, offload: bool, apart: bool
) -> None:
    plan = replace(published_plan(), offload=offload, speech_device=SECOND if apart else FIRST)
    sizes = plan.needed(scheme, speech).values()
    needed = re.escape(" and ".join(f"{size / GB:.1f} GB" for size in sizes))
    for page in (README, MEMORY):
        assert re.search(rf"^\| {row}.* \| {needed} \|", page, re.MULTILINE), page


def test_the_figures_of_the_text() -> None:
    plan = published_plan()
    two = published_plan(speech_device=SECOND).needed("none", True)
    for figure in (
        f"{plan.position_bytes(True):,} bytes per position",
        f"{plan.position_bytes(False):,} without speech",
        f"{2 * plan.sizes.past / 1e6:.0f} MB of past frames",
        f"{plan.choosing_bytes(32) / 32e6:.0f} MB to choose the ids",
        f"{(4 * plan.sizes.row + plan.sizes.speaking(4)[1]) / GB:.1f} GB to make four chunks",
        f"{plan.needed('int8', True, 32)[FIRST] / GB:.1f} GB on cuda:0, where 24.9 GB are free",
        f"{sum(plan.sizes.encoders) / GB:.1f} GB of encoders",
        f"instead of {plan.needed('int4', True)[FIRST] / GB:.1f}.",
        "{:.1f} GB and {:.1f} GB".format(*(size / GB for size in two.values())),
    ):
        assert figure in MEMORY.replace("\n", " "), figure


def test_both_numbers_are_the_most_that_fit() -> None:
    """Against the sum itself."""
    plan, free = published_plan(), free_bytes(24)
    talking, long = requests_at_a_time(plan, "int8", (24,))

    def needed(slots: int, positions: int) -> int:
        at_least = plan.needed("int8", True, slots)[FIRST]
        counted = max(LONGEST, 1500 * slots)
        return at_least + (positions - counted) * plan.position_bytes(True)

    assert needed(talking, 1500 * talking) <= free < needed(talking + 1, 1500 * (talking + 1))
    assert needed(long, LONGEST * long) <= free < needed(long + 1, LONGEST * (long + 1))
    assert requests_at_a_time(plan, "none", (24,)) == (0, 0)
