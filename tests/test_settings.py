"""Settings: each bad value stops the start by name, and defaults are looked up in order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mochi_app.setting_types import SlotSpec, parse_slots
from mochi_app.settings import Settings, SettingsError, load_settings
from tests.people import TOKEN


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("MOCHI_"):
            monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.preview_steps, settings.enhance_steps, settings.quota_gib) == (8, 64, 200)
    assert settings.slots == (SlotSpec(("cpu",)),)
    assert settings.model.endswith("assets/tiny-mochi")


def test_the_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCHI_PREVIEW_STEPS", "16")
    monkeypatch.setenv("MOCHI_DATA_DIR", "/srv/mochi")
    monkeypatch.setenv("MOCHI_HEIGHT", "128")
    assert load_settings().preview_steps == 16
    assert load_settings().data_dir == Path("/srv/mochi")
    assert load_settings().height == 128
    assert load_settings(preview_steps=4).preview_steps == 4


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().preview_steps = 9  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


BAD = [
    ("MODEL", "", "at least 1 character"),
    ("PREVIEW_STEPS", "1", "greater than or equal to 2"),
    ("PREVIEW_STEPS", "eight", "valid integer"),
    ("ENHANCE_STEPS", "513", "less than or equal to 512"),
    ("ENHANCE_STEPS", "8.5", "valid integer"),
    ("HEIGHT", "100", "multiple of 16"),
    ("HEIGHT", "48", "greater than or equal to 64"),
    ("WIDTH", "tall", "valid integer"),
    ("NUM_FRAMES", "6", "greater than or equal to 7"),
    ("FPS", "0", "greater than or equal to 1"),
    ("FPS", "121", "less than or equal to 120"),
    ("GUIDANCE_SCALE", "nan", "finite number"),
    ("GUIDANCE_SCALE", "-1", "greater than or equal to 0"),
    ("MAX_PENDING", "0", "greater than or equal to 1"),
    ("MAX_WATCHERS", "449", "less than or equal to 448"),
    ("QUOTA_GIB", "0", "greater than 0"),
    ("QUOTA_GIB", "inf", "finite number"),
    ("TRASH_HOURS", "-1", "greater than or equal to 0"),
    ("DTYPE", "float16", "'auto', 'float32' or 'bfloat16'"),
    ("TEXT_DTYPE", "float16", "'auto', 'float32' or 'bfloat16'"),
    ("VAE_DTYPE", "Float32", "'auto', 'float32' or 'bfloat16'"),
    ("QUANTIZATION", "int4", "'none', 'fp8' or 'int8'"),
    ("OFFLOAD", "", "'none', 'model' or 'group'"),
    ("LOG_FORMAT", "xml", "'text' or 'json'"),
    ("LOG_LEVEL", "error", "'debug', 'info' or 'warning'"),
    ("THREADS", "-1", "greater than or equal to 0"),
    ("START_TIMEOUT", "0", "greater than 0"),
    ("LOAD_TIMEOUT", "soon", "valid number"),
    ("STEP_TIMEOUT", "inf", "finite number"),
    ("HEARTBEAT_TIMEOUT", "nan", "finite number"),
    ("CANCEL_TIMEOUT", "-5", "greater than 0"),
    ("RESTART_BACKOFF", "0", "greater than 0"),
    ("RESTART_BACKOFF_MAX", "x", "valid number"),
    ("BROKEN_AFTER", "0", "greater than or equal to 1"),
    ("DRAIN_SECONDS", "9", "less than or equal to 4"),
    ("SLOTS", "", "slots separated by ';'"),
    ("SLOTS", "gpu", "slots separated by ';'"),
    ("SLOTS", "0;;1", "slots separated by ';'"),
    ("SLOTS", "0,", "slots separated by ';'"),
    ("SLOTS", "0,cpu", "slots separated by ';'"),
    ("SLOTS", "cpu,cpu", "slots separated by ';'"),
    ("LORA_DIR", "/nowhere/loras", "expected a folder that exists"),
    ("SLOTS", "cpu*0", "slots separated by ';'"),
    ("SLOTS", "cpu*", "slots separated by ';'"),
    ("SLOTS", "cpu*two", "slots separated by ';'"),
    ("SLOTS", "cpu*²", "slots separated by ';'"),
    ("SLOTS", "0*2", "slots separated by ';'"),
    ("SLOTS", "-1", "slots separated by ';'"),
    ("SLOTS", "0;0", "every GPU in one place only"),
    ("SLOTS", "0,1;1,2", "every GPU in one place only"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_a_bad_value_names_variable_value_and_expectation(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MOCHI_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(f"MOCHI_{name}={value!r}: ")
    assert expected in message
    assert message.count("MOCHI_") == 1


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCHI_FPS", "0")
    monkeypatch.setenv("MOCHI_SLOTS", "gpu")
    with pytest.raises(SettingsError, match=r"MOCHI_SLOTS='gpu': .*; MOCHI_FPS='0': "):
        load_settings()


@pytest.mark.parametrize(
    ("text", "slots", "shown"),
    [
        ("cpu", [("cpu",)], "cpu"),
        ("cpu;cpu", [("cpu",), ("cpu",)], "cpu;cpu"),
        ("cpu*2", [("cpu", "cpu")], "cpu*2"),
        ("0", [("0",)], "0"),
        ("0;1", [("0",), ("1",)], "0;1"),
        (" 0, 1 ; 2,3 ", [("0", "1"), ("2", "3")], "0,1;2,3"),
        ("0,1,2,3;4,5,6,7", [tuple("0123"), tuple("4567")], "0,1,2,3;4,5,6,7"),
        ("0;cpu*2", [("0",), ("cpu", "cpu")], "0;cpu*2"),
    ],
)
def test_slots(text: str, slots: list[tuple[str, ...]], shown: str) -> None:
    parsed = parse_slots(text)
    assert [slot.devices for slot in parsed] == slots
    assert [slot.world_size for slot in parsed] == [len(devices) for devices in slots]
    assert ";".join(map(str, parsed)) == shown


def test_slots_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCHI_SLOTS", "0,1;2")
    assert [slot.devices for slot in load_settings().slots] == [("0", "1"), ("2",)]


def test_a_short_token_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"MOCHI_API_TOKEN=…: .*20") as error:
        load_settings(api_token="hunter2")
    assert "hunter2" not in str(error.value)
    assert TOKEN not in repr(load_settings(api_token=TOKEN))


@pytest.mark.parametrize("value", ["example.org", "https://a/b", "*", "https://", "ftp://a"])
def test_an_origin_is_scheme_and_host(value: str) -> None:
    with pytest.raises(SettingsError, match="expected origins such as"):
        load_settings(allowed_origins=value)
    assert load_settings(allowed_origins="HTTPS://A.b:8443, http://[::1]").allowed_origins == (
        "https://a.b:8443",
        "http://[::1]",
    )
