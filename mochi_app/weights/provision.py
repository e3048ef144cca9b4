"""The model's folder for all slots of this server: present and complete before a rank starts.

Slots that start ask for the folder and share one attempt. The caller retries a failed attempt, so
backing off is up to the pool. The download itself is a separate process (`fetch.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from mochi_app.settings import Settings
from mochi_app.weights.events import Progress, progress_text
from mochi_app.weights.fetch import WEIGHTS_COMMAND, fetch_weights
from mochi_app.weights.files import PartTypes, check_folder


def types_of(settings: Settings) -> list[PartTypes]:
    """The dtypes in which the model is loaded: one set, or two with both CPU and GPU slots."""
    devices = {device if device == "cpu" else "cuda" for slot in settings.slots
               for device in slot.devices}  # fmt: skip
    chosen = [
        PartTypes.choose(device, settings.dtype, settings.text_dtype, settings.vae_dtype)
        for device in sorted(devices, reverse=True)
    ]
    return list(dict.fromkeys(chosen))


class Provision:
    """Where the model is, once it is there. `detail` is what is being done until then."""

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[], None],
        command: Sequence[str] = WEIGHTS_COMMAND,
    ) -> None:
        self.detail = ""
        self._settings = settings
        self._on_change = on_change
        self._command = command
        self._attempt: asyncio.Task[Path] | None = None

    async def folder(self) -> Path:
        """The model's folder; concurrent callers share one attempt.

        Raises:
            WeightsError: there is none that would load.
        """
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._provide(), name="weights")
        return await asyncio.shield(self._attempt)

    def forget(self) -> None:
        """Check the files again on the next call: a slot died, and they may be gone."""
        if self._attempt is not None and self._attempt.done():
            self._attempt = None

    async def stop(self) -> None:
        """Stop a running download; what has been downloaded is kept for the next start."""
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)

    async def _provide(self) -> Path:
        local = self._settings.model_dir
        try:
            for types in types_of(self._settings):
                if local is not None:
                    advice = "Copy the missing files there, or name another model in MOCHI_MODEL."
                    await asyncio.to_thread(check_folder, local, types, advice)
                    folder = local
                else:
                    self._show("looking for the model")
                    folder = await fetch_weights(
                        self._settings.model, types, self._on_progress, self._command
                    )
            return folder
        finally:
            self.detail = ""

    def _on_progress(self, progress: Progress) -> None:
        self._show(progress_text(progress))

    def _show(self, detail: str) -> None:
        self.detail = detail
        self._on_change()
