"""Logins that were ended by a logout: a cookie copied before it is useless afterwards.

A cookie carries its login's id and series. The ids of ended logins are kept in the data folder, so
that a restart revives none. At most `MOST_ENDED` are kept per person: when more than that could
still be used, the person's next series begins, which ends all logins of the previous one. So the
file stays small, and dropping an entry ends logins rather than reviving them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from mochi_app.files import replace_file
from mochi_app.settings import SettingsError

log = logging.getLogger(__name__)

FILE = "ended-logins.json"  # in the data folder
MOST_ENDED = 1000  # logins of one person; some 40 KB of the file


class Ended(BaseModel):
    """One person's ended logins: all of earlier series, and those in `until` of this one, by id,
    with the time (seconds since 1970) after which their cookies are too old anyway."""

    series: int = 0
    until: dict[str, float] = Field(default_factory=dict)


PEOPLE = TypeAdapter(dict[str, Ended])


class EndedLogins:
    """The ended logins of everybody, in memory and in the data folder.

    Raises:
        SettingsError: the file is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._writing = asyncio.Lock()
        try:
            self._people = PEOPLE.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            self._people = {}
        except ValidationError:
            raise SettingsError(
                f"{self._path}: expected the ended logins as JSON, and it is damaged. Remove it"
                " together with secret.key: everybody logs in anew, so that no ended login revives"
            ) from None

    def series(self, name: str) -> int:
        """The series that a new login of this person belongs to."""
        return self._people[name].series if name in self._people else 0

    def has(self, name: str, series: int, login: str) -> bool:
        """Whether this login of this person ended."""
        return series != self.series(name) or (
            name in self._people and login in self._people[name].until
        )

    async def add(self, name: str, login: str, until: float) -> None:
        """End a login at once, and permanently when this returns. If the file cannot be written,
        that is logged: the login stays ended until a restart, or for good after the next write."""
        ended = self._people.setdefault(name, Ended())
        ended.until[login] = until
        if len(ended.until) > MOST_ENDED:
            now = time.time()
            kept = {login: until for login, until in ended.until.items() if until >= now}
            full = len(kept) > MOST_ENDED
            self._people[name] = Ended(series=ended.series + full, until={} if full else kept)
        async with self._writing:
            content = PEOPLE.dump_json(self._people)
            try:
                await asyncio.to_thread(replace_file, self._path, content)
            except OSError as error:
                log.error("a logout of %s could not be kept beyond a restart: %s", name, error)
