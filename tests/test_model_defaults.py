"""Defaults of a model: the environment, else the folder, else the packaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mochi_app.model_defaults import PACKAGED_DEFAULTS, ModelDefaults, load_model_defaults
from mochi_app.settings import SettingsError, load_settings

GOOD_DEFAULTS = {
    "height": 128,
    "width": 192,
    "num_frames": 25,
    "fps": 12,
    "guidance_scale": 3.0,
    "max_height": 256,
    "max_width": 320,
    "max_num_frames": 49,
}


class TestModelDefaults:
    @pytest.fixture
    def model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("MOCHI_MODEL", str(tmp_path))
        return tmp_path

    @staticmethod
    def describe(model: Path, **changes: Any) -> None:
        text = json.dumps(GOOD_DEFAULTS | changes)
        (model / "mochi_defaults.json").write_text(text, encoding="utf-8")

    def test_the_packaged_ones_are_those_of_genmo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOCHI_MODEL", "genmo/mochi-1-preview")
        settings = load_settings()
        assert settings.model_dir is None
        found = load_model_defaults(settings)
        assert (found.height, found.width, found.num_frames, found.fps) == (480, 848, 163, 30)
        assert found.guidance_scale == 4.5
        assert found.notice is None

    def test_a_folder_without_a_file_takes_the_packaged_ones(self, model: Path) -> None:
        assert load_settings().model_dir == model.resolve()
        assert load_model_defaults(load_settings()).height == 480

    def test_the_folders_file_comes_before_the_packaged_one(self, model: Path) -> None:
        self.describe(model, notice="tiny", examples=["a", "b"])
        found = load_model_defaults(load_settings())
        assert (found.height, found.max_height, found.fps) == (128, 256, 12)
        assert (found.notice, found.examples) == ("tiny", ("a", "b"))

    def test_the_environment_comes_first(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.describe(model)
        for name, value in {"HEIGHT": "64", "NUM_FRAMES": "7", "GUIDANCE_SCALE": "0"}.items():
            monkeypatch.setenv(f"MOCHI_{name}", value)
        found = load_model_defaults(load_settings())
        assert (found.height, found.num_frames, found.guidance_scale) == (64, 7, 0)
        assert (found.width, found.fps) == (192, 12)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("HEIGHT", "272", "at most 256"),
            ("WIDTH", "336", "at most 320"),
            ("NUM_FRAMES", "55", "6k+1, at most 49"),
            ("NUM_FRAMES", "24", "6k+1, at most 49"),
        ],
    )
    def test_a_default_beyond_the_model(
        self, model: Path, name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.describe(model)
        monkeypatch.setenv(f"MOCHI_{name}", value)
        with pytest.raises(SettingsError) as caught:
            load_model_defaults(load_settings())
        assert str(caught.value) == f"MOCHI_{name}={value}: expected {expected}"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("", "Expecting value"),
            ("{", "Expecting property name"),
            ("[]", "mochi_defaults.json"),
            ("{}", "height"),
            (json.dumps(GOOD_DEFAULTS | {"height": 100}), "multiple of 16"),
            (json.dumps(GOOD_DEFAULTS | {"guidance_scale": float("nan")}), "finite number"),
            (b"\xff\xfe", "decode"),
        ],
    )
    def test_a_bad_file_is_named(self, model: Path, content: Any, expected: str) -> None:
        path = model / "mochi_defaults.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SettingsError) as caught:
            load_model_defaults(load_settings())
        assert str(caught.value).startswith(f"model defaults in {path.resolve()}: ")
        assert expected in str(caught.value)

    def test_the_packaged_file_says_everything_itself(self) -> None:
        said = json.loads(PACKAGED_DEFAULTS.read_text(encoding="utf-8"))
        limits = {"max_height", "max_width", "max_num_frames"}
        assert {"height", "width", "num_frames", "fps", "guidance_scale"} | limits <= said.keys()
        assert ModelDefaults.model_validate_json(PACKAGED_DEFAULTS.read_bytes()).height == 480
