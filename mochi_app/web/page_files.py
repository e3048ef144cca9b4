"""The page's scripts, the modules of `page/`, at `/page/<hash>/<name>`.

The hash is that of all of them: what a browser has under one address never changes, so it may keep
it for good, and no page mixes the modules of two versions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
MAIN = "main.js"
FOREVER = {"cache-control": "public, max-age=31536000, immutable"}


class PageFiles:
    """The modules, read once; no path ever comes from a caller."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.js"))}
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(b"%s %d\n%s" % (name.encode(), len(content), content))
        self.version = digest.hexdigest()[:16]

    @property
    def head(self) -> str:
        """What the page's head says to run them. The addresses are relative to the page: it may
        live under a prefix. All are named, so that none waits for another to be read."""
        links = "".join(
            f'<link rel="modulepreload" href="{self._url(name)}">' for name in self._files
        )
        return f'{links}<script type="module" src="{self._url(MAIN)}"></script>'

    def _url(self, name: str) -> str:
        return f"./page/{self.version}/{name}"

    def answer(self, version: str, name: str) -> Response | None:
        """A module; None when there is none of that name, or not in that version."""
        if version != self.version or name not in self._files:
            return None
        return Response(self._files[name], media_type="text/javascript", headers=FOREVER)


PAGE_FILES = PageFiles()
