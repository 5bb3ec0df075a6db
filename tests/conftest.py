"""Shared fixtures: where the recorded references are, and quiet, repeatable arithmetic."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from tests.paths import GOLDEN

# Of the processes that tests start, too: their threads would wait for cores that the tests of the
# other process use, and waiting takes several times the work.
os.environ["OMP_NUM_THREADS"] = "1"

# What tests import stays: looking for garbage in it takes a quarter of the time to import it.
gc.disable()

hypothesis.settings.register_profile(
    "sample", derandomize=True, deadline=None, max_examples=35, database=None
)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run long tests in full")
    parser.addoption(
        "--ray",
        action="store_true",
        help="let the tests of the OpenAI server talk to two replicas on Ray",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell lets what it starts in the background ignore Ctrl-C, and so would what tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    long = config.getoption("--long")
    hypothesis.settings.load_profile("long" if long else "sample")


TOGETHER = {
    "tests/serving": "cog",
    "tests/serving/openai": "front",
    "tests/serving/page": "front",
    "tests/serving/realtime": "front",
    "tests/miniature": "miniature",
    "tests/rehearsal": "rehearsal",
    "tests/layers": "layers",
}
"""Directories whose files share servers, a model or the process that interprets kernels: one
process runs all tests of a name. Those that take longest are first, and begin first, so that no
process has nothing to do at the end."""


def group_of(nodeid: str) -> str:
    """The tests that one process runs one after another: those of a file, or of more."""
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file.rpartition("/")[0], file)


class Scheduling(LoadFileScheduling):
    """Gives out tests by :func:`group_of`."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The groups first, in their order, and then the single files."""
    order = list(dict.fromkeys(TOGETHER.values()))
    places = {group: place for place, group in enumerate(order)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid), len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on garbage is collected, and what is imported is passed over."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether long tests run in full rather than as a sample."""
    return pytestconfig.getoption("--long")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the recorded references; KIMI_AUDIO_GOLDEN names another set."""
    return GOLDEN


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The recorded models are tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an untrained miniature: everything works, and nothing is known."""
    from scripts.miniature.untrained import write_miniature  # slow: imports the training code

    directory = tmp_path_factory.mktemp("untrained")
    write_miniature(directory)
    return directory
