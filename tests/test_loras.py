"""Which files in a folder are LoRAs, by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mochi_app.loras import LoraError, lora_file, lora_names


def test_names_are_those_of_safe_files_in_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "loras"
    root.mkdir()
    kept = ["Film look_v1.2", "a", "b-2", "linked"]
    for name in (*kept[:3], "ümlaut", ".hidden", "-x", "a;b", "new\nline", ""):
        (root / f"{name}.safetensors").touch()
    (root / "other.bin").touch()
    (root / "UPPER.SAFETENSORS").touch()
    (root / "folder.safetensors").mkdir()
    (root / "sub").mkdir()
    (root / "sub" / "inner.safetensors").touch()
    (tmp_path / "outside.safetensors").touch()
    (root / "linked.safetensors").symlink_to(root / "a.safetensors")
    (root / "out.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (root / "nowhere.safetensors").symlink_to(root / "missing.safetensors")
    (tmp_path / "link").symlink_to(root)
    assert lora_names(root) == lora_names(tmp_path / "link") == kept
    assert lora_names(None) == lora_names(tmp_path / "missing") == []
    assert lora_file(root, "a") == root / "a.safetensors"
    for name in ("../outside", "sub/inner", "out", "", str(tmp_path / "outside")):
        with pytest.raises(LoraError, match=r"expected one of: Film look_v1\.2, a, b-2, linked$"):
            lora_file(root, name)
