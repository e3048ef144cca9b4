"""The LoRA files of a folder, by name. Owns which files count; `engine/lora.py` reads them.

Does not import torch, so the web process can list what the engine will find.
"""

from __future__ import annotations

import re
from pathlib import Path

SUFFIX = ".safetensors"
# A name starts with neither a dot (hidden files, and the `._` files that macOS leaves) nor "-"
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]*")


class LoraError(ValueError):
    """A LoRA that cannot be used. The message is one line with its name and the reason.

    All ranks of a slot raise it together (`engine/pipeline.py`): `settled` means that none of them
    waits for another.
    """

    settled = True


def lora_names(folder: Path | None) -> list[str]:
    """Sorted names of the folder's LoRAs: its `*.safetensors` files, without the suffix.

    Not listed: files in subfolders, links that lead out of the folder, and names with characters
    other than ASCII letters, digits, dot, underscore, hyphen and space. Empty for None and for a
    folder that does not exist.
    """
    if folder is None or not folder.is_dir():
        return []
    root = folder.resolve()
    return sorted(
        path.stem
        for path in root.glob(f"*{SUFFIX}")
        if SAFE_NAME.fullmatch(path.stem) and path.is_file() and path.resolve().parent == root
    )


def lora_file(folder: Path | None, name: str) -> Path:
    """The file of a LoRA.

    Raises:
        LoraError: `lora_names(folder)` does not have this name.
    """
    names = lora_names(folder)
    if folder is None or name not in names:
        raise LoraError(f"LoRA {name!r}: expected one of: {', '.join(names) or '(there are none)'}")
    return folder / f"{name}{SUFFIX}"
