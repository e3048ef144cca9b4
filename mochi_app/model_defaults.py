"""A model's defaults for what a request leaves out: size, length, frame rate; and its limits."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mochi_app.settings import ENV_PREFIX, Settings, SettingsError

PACKAGED_DEFAULTS = Path(__file__).resolve().parent / "defaults" / "genmo--mochi-1-preview.json"


class ModelDefaults(BaseModel):
    """A model's default parameters, sizes in pixels and length in frames, and its limits."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    height: int = Field(ge=64, multiple_of=16)
    width: int = Field(ge=64, multiple_of=16)
    num_frames: int = Field(ge=7)
    fps: int = Field(ge=1, le=120)
    guidance_scale: float = Field(ge=0, le=20, allow_inf_nan=False)
    max_height: int = Field(ge=64, multiple_of=16)
    max_width: int = Field(ge=64, multiple_of=16)
    max_num_frames: int = Field(ge=7)
    notice: str | None = None
    examples: tuple[str, ...] = ()


def load_model_defaults(settings: Settings) -> ModelDefaults:
    """Defaults of the model: the environment, else the model's folder, else the packaged file.

    Raises:
        SettingsError: a file is not valid, or a default is outside the model's limits.
    """
    path = PACKAGED_DEFAULTS
    if settings.model_dir is not None and (settings.model_dir / "mochi_defaults.json").is_file():
        path = settings.model_dir / "mochi_defaults.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        names = ("height", "width", "num_frames", "fps", "guidance_scale")
        chosen = {name: value for name in names if (value := getattr(settings, name)) is not None}
        defaults = ModelDefaults.model_validate(values | chosen)
    except (OSError, ValueError) as error:
        raise SettingsError(f"model defaults in {path}: {error}") from error
    for name in ("height", "width", "num_frames"):
        value, most = getattr(defaults, name), getattr(defaults, f"max_{name}")
        if value > most or (name == "num_frames" and value % 6 != 1):
            what = "6k+1, " if name == "num_frames" else ""
            raise SettingsError(
                f"{ENV_PREFIX}{name.upper()}={value}: expected {what}at most {most}"
            )
    return defaults
