"""Who asks: a person, the holder of the API token, a browser, or the server itself."""

from __future__ import annotations

from dataclasses import dataclass

MACHINE = "api"  # who comes with the API token
ANONYMOUS = "anon-"  # begins the name of a browser that nobody logged in from


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a person, the holder of the API token, a browser, or nobody known (no name)."""

    name: str = ""
    admin: bool = False

    @property
    def anonymous(self) -> bool:
        """Whether nobody logged in."""
        return not self.name or self.name.startswith(ANONYMOUS)

    @property
    def may_empty_trash(self) -> bool:
        """With a login that is an admin's; without, anybody's as there are no admins."""
        return self.admin or self.anonymous

    def owns(self, owner: str) -> bool:
        """Whether what has this owner is the caller's to stop and to delete."""
        return self.admin or owner in ("", self.name)


SYSTEM = Caller(name="", admin=True)  # the server's own work
