"""What `pip install .` takes along is all that the app runs on. CI installs it and runs it."""

from __future__ import annotations

import glob
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mochi_app import files
from mochi_app.files import PACKAGE_DIR, PROJECT_DIR

PROJECT: dict[str, Any] = tomllib.loads((PROJECT_DIR / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where the checkout has a package of the wheel."""
    folders: dict[str, str] = SETUPTOOLS["package-dir"]
    return PROJECT_DIR / folders.get(package, package.replace(".", "/"))


def installed_data() -> set[Path]:
    """The files of the checkout that the wheel has beside its modules."""
    return {
        folder_of(package) / name
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for name in glob.glob(pattern, root_dir=folder_of(package), recursive=True)
        if (folder_of(package) / name).is_file()
    }


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    folders = {path.parent for path in PACKAGE_DIR.rglob("*.py")}
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == {
        *folders,
        PROJECT_DIR / "assets",
    }


def test_every_other_file_is_data_of_a_package() -> None:
    there = {
        path
        for folder in (PACKAGE_DIR, PROJECT_DIR / "assets")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert there - installed_data() == set()


@pytest.mark.parametrize("installed", [True, False])
def test_the_embedded_model_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    package = tmp_path / "mochi_app"
    model = (package if installed else tmp_path) / "assets" / "tiny-mochi"
    model.mkdir(parents=True)
    monkeypatch.setattr(files, "PACKAGE_DIR", package)
    monkeypatch.setattr(files, "PROJECT_DIR", tmp_path)
    assert files.embedded_model() == model
