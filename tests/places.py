"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-mochi"  # the embedded model
