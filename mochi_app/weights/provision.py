"""The model's folder for all slots of this server: there and whole before a rank starts.

Slots that start ask for the folder and share one attempt. A failed attempt is the asker's to retry,
so backing off stays the pool's. The download itself is a process of its own (`fetch.py`).
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
    """The types that the model is loaded in: one set, or two where CPUs and GPUs have slots."""
    devices = {device if device == "cpu" else "cuda" for slot in settings.slots
               for device in slot.devices}  # fmt: skip
    chosen = [
        PartTypes.choose(device, settings.dtype, settings.text_dtype, settings.vae_dtype)
        for device in sorted(devices, reverse=True)
    ]
    return list(dict.fromkeys(chosen))


class Provision:
    """Where the model lies, as soon as it is there. `detail` says what is being done until then."""

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
        """The model's folder; all who ask at a time share one attempt.

        Raises:
            WeightsError: there is none that would load; asking again makes another attempt.
        """
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._provide(), name="weights")
        return await asyncio.shield(self._attempt)

    def forget(self) -> None:
        """Look at the files again when next asked: a slot died, and they may be gone."""
        if self._attempt is not None and self._attempt.done():
            self._attempt = None

    async def stop(self) -> None:
        """End a download that is under way; what has come of it is kept for the next start."""
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
                    self._say("looking for the model")
                    folder = await fetch_weights(
                        self._settings.model, types, self._hear, self._command
                    )
            return folder
        finally:
            self.detail = ""

    def _hear(self, progress: Progress) -> None:
        self._say(progress_text(progress))

    def _say(self, detail: str) -> None:
        self.detail = detail
        self._on_change()
