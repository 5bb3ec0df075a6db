"""Writing a slim checkpoint: interrupted, continued, refused, and from the command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from kimia_infer.models.kimi_audio.checkpoint import LAYOUT, resolve_weights
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import CheckpointError, WeightsError
from kimia_infer.utils.files import locked
from kimia_infer.weights.manifest import read_checkpoint_manifest
from kimia_infer.weights.writing import SmallFile, TensorFile
from tests.command_line import run_here
from tests.paths import ROOT
from tests.weights.bloated import write_bloated

MINI = ROOT / "weights" / "mini"
SHARD = 10**6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed call writes."""
    target = tmp_path_factory.mktemp("whole") / "slim"
    prepare_weights(MINI, target, shard_bytes=SHARD)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def states(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file, which change when it is written again."""
    found = {path: path.stat() for path in directory.rglob("*") if path.is_file()}
    return {
        path.relative_to(directory).as_posix(): (stat.st_ino, stat.st_mtime_ns)
        for path, stat in found.items()
    }


def written(before: dict[str, tuple[int, int]], directory: Path) -> set[str]:
    """The files of ``directory`` that have been written since ``before``."""
    return {name for name, state in states(directory).items() if before.get(name) != state}


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Raise ``error`` when the tensor file number ``count`` is half written."""
    write = TensorFile.write
    seen: list[Path] = []

    def fail(self: TensorFile, path: Path, reader: object, report) -> object:
        seen.append(path)
        done = 0

        def stop(size: int) -> None:
            nonlocal done
            done += size
            if len(seen) == count and done > self.size / 2:
                raise error
            report(size)

        return write(self, path, reader, stop)

    monkeypatch.setattr(TensorFile, "write", fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_interrupted_call_is_continued(
    tmp_path: Path, whole: Path, count: int, error: BaseException
) -> None:
    target = tmp_path / "slim"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, count, error)
        with pytest.raises((KeyboardInterrupt, WeightsError)):
            prepare_weights(MINI, target, shard_bytes=SHARD)
    before, expected = contents(target), contents(whole)
    done = {name for name in before if not name.startswith(".preparing/")}
    assert done and all(before[name] == expected[name] for name in done)
    assert not any(name.endswith(".part") for name in before) and "manifest.json" not in done
    with pytest.raises(WeightsError, match="unfinished; run scripts/prepare_weights again"):
        resolve_weights(target)
    start = states(target)
    prepare_weights(MINI, target, shard_bytes=SHARD)
    assert contents(target) == expected
    assert written(start, target) == expected.keys() - done
    assert LAYOUT.missing_files(target) == []


def test_a_killed_call_is_continued(tmp_path: Path, whole: Path, monkeypatch) -> None:
    """Nobody tidied up: a half file lies around, and one is named but not noted."""
    target = Path(shutil.copytree(whole, tmp_path / "slim"))
    folder = target / ".preparing"
    folder.mkdir()
    (folder / "vocoder--model.safetensors.part").write_bytes(b"half")
    (folder / "lock").write_bytes(b"")
    manifest = read_checkpoint_manifest(target / "manifest.json")
    del manifest.files["tiktoken.model"]
    manifest.write(folder / "manifest.json")
    (target / "manifest.json").unlink()
    (target / "vocoder" / "model.safetensors").unlink()
    prepare_weights(MINI, target, shard_bytes=SHARD)
    result, expected = contents(target), contents(whole)
    assert result.keys() == expected.keys()
    assert all(result[name] == expected[name] for name in result if name != "manifest.json")


def test_a_finished_target_is_verified_and_repaired(tmp_path: Path, whole: Path) -> None:
    target = Path(shutil.copytree(whole, tmp_path / "slim"))
    start = states(target)
    prepare_weights(MINI, target, shard_bytes=SHARD)
    assert written(start, target) == set()
    damaged = ["config.json", "vocoder/model.safetensors"]
    for name in damaged:
        content = bytearray((target / name).read_bytes())
        content[-2] ^= 4
        (target / name).write_bytes(content)
    (target / "tiktoken.model").unlink()
    start = states(target)
    prepare_weights(MINI, target, shard_bytes=SHARD)
    assert written(start, target) == {*damaged, "tiktoken.model", "manifest.json"}
    assert contents(target) == contents(whole)


def test_another_source_or_dtype_is_not_mixed_in(tmp_path: Path, whole: Path) -> None:
    target = Path(shutil.copytree(whole, tmp_path / "slim"))
    before = contents(target)
    with pytest.raises(WeightsError, match="begun with --dtype served"):
        prepare_weights(MINI, target, "source", SHARD)
    source = Path(shutil.copytree(MINI, tmp_path / "source"))
    os.utime(source / "vocoder" / "model.safetensors", ns=(1, 1))
    with pytest.raises(WeightsError, match="begun with another state of the source"):
        prepare_weights(source, target, shard_bytes=SHARD)
    assert {n: c for n, c in contents(target).items() if not n.startswith(".")} == before


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch) -> None:
    source, target = Path(shutil.copytree(MINI, tmp_path / "source")), tmp_path / "slim"
    write = SmallFile.write

    def change(self: SmallFile, *rest: object) -> object:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return write(self, *rest)

    monkeypatch.setattr(SmallFile, "write", change)
    with pytest.raises(WeightsError, match="changed while it was read"):
        prepare_weights(source, target)
    assert not (target / "manifest.json").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("source", "lies in the source"),
        ("source/slim", "lies in the source"),
        ("source/vocoder/deep/slim", "lies in the source"),
        ("link/slim", "lies in the source"),
        (".", "holds file and no prepared checkpoint"),
        ("file", "not a directory"),
        ("file/slim", "cannot be written"),
    ],
)
def test_targets_that_are_refused(tmp_path: Path, target: str, message: str) -> None:
    source = Path(shutil.copytree(MINI, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        prepare_weights(source, tmp_path / target)
    assert str(tmp_path / target) in str(error.value)
    assert contents(tmp_path) == before


def test_a_foreign_download_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".incomplete").mkdir()
    with pytest.raises(WeightsError, match=r"holds \.incomplete"):
        prepare_weights(MINI, tmp_path)


def test_too_little_space_is_told_with_numbers(tmp_path: Path, whole: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    sizes = [len(content) for name, content in contents(whole).items() if name != "manifest.json"]
    with pytest.raises(WeightsError) as error:
        prepare_weights(MINI, tmp_path / "slim", shard_bytes=SHARD)
    assert f"{sum(sizes):,} bytes are still to be written and 1,000 are free" in str(error.value)
    assert f"free {sum(sizes) - 1000:,} bytes" in str(error.value)
    monkeypatch.undo()
    prepare_weights(MINI, tmp_path / "slim", "source")  # nothing was written: nothing to mix


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "slim" / ".preparing" / "lock"),
        pytest.raises(WeightsError, match="another process is writing"),
    ):
        prepare_weights(MINI, tmp_path / "slim")


def test_a_damaged_slim_source_is_refused(tmp_path: Path, whole: Path) -> None:
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    path = source / "vocoder" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: tensor .* is damaged"):
        prepare_weights(source, tmp_path / "again")
    assert not (tmp_path / "again" / "vocoder" / "model.safetensors").exists()


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "prepare_weights"), *map(str, arguments)]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_bloated(MINI, tmp_path / "bloated"), tmp_path / "slim"
    assert run_here("prepare", source, target) == 0
    shown = capsys.readouterr().out
    files = [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    read = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert f"{len(files) - 1} files, {size:,} bytes instead of {read:,}" in shown
    assert run_here("prepare", source, target, "--dtype", "source") == 1
    other = capsys.readouterr()
    assert other.out == ""
    assert other.err.splitlines()[-1].startswith(f"prepare: {target}: was begun with")
    assert resolve_weights(target) == target


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("prepare", "--help") == 0
    assert "--dtype {served,source}" in capsys.readouterr().out
    assert run_here("prepare", MINI) == 2
    for source, message in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "config.json is missing"),
    ):
        capsys.readouterr()
        assert run_here("prepare", source, tmp_path / "slim") == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("prepare: ")
    done = run("someone/model", tmp_path / "slim")
    assert done.returncode == 1
    assert "someone/model@main: HF_HUB_OFFLINE is set, and the hub's cache in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "slim").exists()


def test_an_interrupt_from_the_keyboard(tmp_path: Path) -> None:
    target = tmp_path / "slim"
    process = subprocess.Popen(
        command(MINI, target), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not target.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    if process.returncode:  # it may have been done by then
        assert process.returncode == 130
        assert "the same command continues" in errors
    prepare_weights(MINI, target)
    assert LAYOUT.missing_files(target) == []
