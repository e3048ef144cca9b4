"""Who makes a request: a person, the holder of the API token, a browser, or the server itself."""

from __future__ import annotations

from dataclasses import dataclass

MACHINE = "api"  # the name of callers with the API token
ANONYMOUS = "anon-"  # prefix of the names of browsers without a login


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request: a person, the holder of the API token, a browser, or unknown (no
    name)."""

    name: str = ""
    admin: bool = False

    @property
    def anonymous(self) -> bool:
        """Whether the caller is not logged in."""
        return not self.name or self.name.startswith(ANONYMOUS)

    @property
    def may_empty_trash(self) -> bool:
        """Only admins may, or anybody where there is no login and so no admin."""
        return self.admin or self.anonymous

    def owns(self, owner: str) -> bool:
        """Whether the caller may stop and delete a job of this owner."""
        return self.admin or owner in ("", self.name)


SYSTEM = Caller(name="", admin=True)  # the server's own work
