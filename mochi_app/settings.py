"""Every setting, declared once: name, default, help.

Values come from the environment (`MOCHI_<NAME>`). `load_settings()` returns one frozen `Settings`
or raises `SettingsError`, which names each bad variable, the value given and what was expected.
Nothing else in the project reads the environment, except Gradio for its own variables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from mochi_app.files import embedded_model
from mochi_app.setting_types import (
    Dtype,
    Hosts,
    Origins,
    Seconds,
    Slots,
    SlotSpec,
    Steps,
    Timeouts,
    addresses,
    existing_folder,
)

ENV_PREFIX = "MOCHI_"


class SettingsError(ValueError):
    """A setting, or a file that a setting names, cannot be used. The message says which and why."""


class Settings(BaseSettings):
    """The whole configuration, read once at start."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore")

    model: str = Field(
        default=str(embedded_model()),
        min_length=1,
        description="Folder of a MochiPipeline, or a Hub id such as `genmo/mochi-1-preview`. "
        "Default: the embedded tiny model.",
    )
    slots: Slots = Field(
        default=(SlotSpec(("cpu",)),),
        description="Engine slots, separated by `;`, with one entry per rank. `0,1,2,3;4,5,6,7` is "
        "two slots of four GPUs, each making one video at a time; `cpu*2` is one slot of two CPU "
        "ranks.",
    )
    data_dir: Path = Field(
        default=Path("data"),
        description="Folder for history, videos and posters. One server per folder.",
    )
    preview_steps: Steps = Field(default=8, description="Steps of a preview.")
    enhance_steps: Steps = Field(default=64, description="Steps of an enhance.")
    checkpoint_steps: int = Field(
        default=8,
        ge=0,
        description="Steps between checkpoints of a running job. If its slot or the server dies, "
        "the job resumes from the last one and repeats at most this many steps. 0 turns "
        "checkpoints off, as does `MOCHI_CACHE_THRESHOLD`.",
    )
    height: int | None = Field(
        default=None, ge=64, multiple_of=16, description="Default height in pixels."
    )
    width: int | None = Field(
        default=None, ge=64, multiple_of=16, description="Default width in pixels."
    )
    num_frames: int | None = Field(
        default=None, ge=7, description="Default number of frames, 6k+1."
    )
    fps: int | None = Field(
        default=None, ge=1, le=120, description="Frames per second of the video."
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, le=20, allow_inf_nan=False, description="Default guidance scale."
    )
    max_pending: int = Field(
        default=1000, ge=1, description="Jobs that may wait; further ones are refused."
    )
    max_watchers: int = Field(
        default=256, ge=1, le=448, description="`/generate` calls that may wait at the same time."
    )
    max_unread: int = Field(
        default=250,
        ge=1,
        le=700,
        description="API posts from one address whose event stream has not been opened. Further "
        "posts get 429 until some are read or a minute old. Clients that read their answers are "
        "not limited.",
    )
    trusted_proxies: Annotated[str, AfterValidator(addresses)] = Field(
        default="",
        description="Comma-separated addresses or networks of proxies whose `X-Forwarded-…` "
        "headers are trusted; `*` trusts everybody's. Without it, all clients behind a proxy count "
        "as one address.",
    )
    quota_gib: float = Field(
        default=200,
        gt=0,
        allow_inf_nan=False,
        description="Space for videos, in GiB. Beyond it, the oldest unstarred ones are evicted; "
        "their records stay.",
    )
    trash_hours: float = Field(
        default=24,
        ge=0,
        allow_inf_nan=False,
        description="Hours for which a deleted job can be restored, counted only while a server "
        "runs; then its files are removed for good.",
    )
    backup_hours: float = Field(
        default=24,
        ge=0,
        allow_inf_nan=False,
        description="Hours between backups of the history while the server runs; 0 turns them off.",
    )
    backups_kept: int = Field(
        default=7, ge=1, description="Backups of the history to keep; older ones are removed."
    )
    dtype: Dtype = Field(
        default="auto",
        description="Type of weights and arithmetic: `float32`, `bfloat16` or `auto`, which is "
        "bfloat16 on a GPU and float32 on a CPU.",
    )
    text_dtype: Dtype = Field(
        default="auto",
        description="Type of the text encoder: `auto` is float32, as the model's authors run it; "
        "`bfloat16` halves its memory on the first rank.",
    )
    vae_dtype: Dtype = Field(
        default="auto",
        description="Type of the decoder: `auto` is that of `MOCHI_DTYPE`.",
    )
    attention: str = Field(
        default="native",
        min_length=1,
        description="Attention backend, by its name in diffusers: `native`, `flash`, `sage`, "
        "`_native_cudnn`, …",
    )
    cache_threshold: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="First-block cache: skips the remaining blocks of a step whose first block "
        "changes by less than this share. Faster, but no longer exact. 0 is off; start with 0.05.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the transformer's blocks: adds minutes to the first job.",
    )
    quantization: Literal["none", "fp8", "int8"] = Field(
        default="none",
        description="Keep the transformer's weights in 8 bits: `fp8` (cast at each layer) or "
        "`int8` (needs the package torchao): about 64 % and 51 % of their size in bfloat16. "
        "Frames differ slightly.",
    )
    offload: Literal["none", "model", "group"] = Field(
        default="none",
        description="For one small GPU: keep idle parts of the model in host memory, as whole "
        "components (`model`) or block by block (`group`).",
    )
    lora_dir: Annotated[Path | None, AfterValidator(existing_folder)] = Field(
        default=None,
        description="Folder of LoRA files (`NAME.safetensors`) that a request may name.",
    )
    threads: int = Field(
        default=0, ge=0, description="CPU threads per rank; 0 shares the cores among the CPU ranks."
    )
    start_timeout: Seconds = Field(
        default=120, description="Seconds a rank process may take until it first reports."
    )
    load_timeout: Seconds = Field(
        default=1800, description="Seconds the model may take to load once the rank is up."
    )
    step_timeout: Seconds = Field(
        default=300,
        description="Seconds without progress (a step, or a text, decode or encode stage) after "
        "which a running slot counts as hung, for a video of the default size. Once this machine's "
        "speed has been measured: ten times the expected time, but at least a third of this.",
    )
    heartbeat_timeout: Seconds = Field(
        default=30, description="Seconds without a heartbeat after which a rank counts as frozen."
    )
    cancel_timeout: Seconds = Field(
        default=30,
        description="Seconds a cancelled job may take to reach the end of its step before the slot "
        "is killed; three steps if those take longer.",
    )
    restart_backoff: Seconds = Field(
        default=1, description="Seconds before a dead slot is restarted; doubles with each death."
    )
    restart_backoff_max: Seconds = Field(
        default=300, description="Longest delay between restarts, in seconds."
    )
    broken_after: int = Field(
        default=5, ge=1, description="Deaths in a row before a slot counts as broken."
    )
    drain_seconds: Seconds = Field(
        default=3, le=4, description="Seconds that running jobs get to finish at shutdown."
    )

    log_format: Literal["text", "json"] = Field(
        default="text",
        description="Log format: `text`, or `json` for one object per line.",
    )

    log_level: Literal["debug", "info", "warning"] = Field(
        default="info",
        description="Log level: `debug` includes warnings from libraries; `warning` shows only "
        "what may need attention.",
    )

    auth_file: Path | None = Field(
        default=None,
        description="Accounts file, written by `python -m mochi_app.accounts add NAME`. With it, "
        "everybody has to log in; without it, the server is open.",
    )
    api_token: SecretStr | None = Field(
        default=None,
        min_length=20,
        description="Token that a machine sends as `Authorization: Bearer …`, with the rights of "
        "an admin. `openssl rand -hex 32` makes one.",
    )
    allowed_hosts: Hosts = Field(
        default=(),
        description="Further names under which a server without a login answers, besides "
        "localhost, IP addresses, names without a dot, `.local`, `.lan`, `.internal`, the "
        "machine's own names, a Space's and that of `GRADIO_ROOT_PATH`. `*.lab.example` covers all "
        "names below it, `*` all.",
    )
    allowed_origins: Origins = Field(
        default=(),
        description="Other sites whose pages may call this server, such as `https://app.example`.",
    )
    frame_ancestors: Origins = Field(
        default=("https://huggingface.co",),
        description="Other sites whose pages may show this one in a frame; "
        "`https://huggingface.co` shows Spaces in one.",
    )

    @property
    def timeouts(self) -> Timeouts:
        """That with a video of the usual size, as long as nothing is measured."""
        return Timeouts(self.step_timeout, self.cancel_timeout)

    @property
    def model_dir(self) -> Path | None:
        """The model's folder, or None when `model` is a Hub id."""
        folder = Path(self.model).expanduser()
        return folder.resolve() if folder.is_dir() else None

    @property
    def model_name(self) -> str:
        """What records and metadata call the model: the Hub id, or the folder's own name."""
        return self.model if self.model_dir is None else self.model_dir.name


def load_settings(**overrides: Any) -> Settings:
    """Read the environment once; keyword arguments win over it.

    Raises:
        SettingsError: naming every bad variable, its value and what was expected.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ENV_PREFIX + str(item["loc"][0]).upper() if item["loc"] else ENV_PREFIX
            expected = item["msg"].removeprefix("Value error, ")
            given = "…" if item["loc"][:1] == ("api_token",) else repr(item["input"])
            lines.append(f"{name}={given}: {expected}")
        raise SettingsError("; ".join(lines)) from None
