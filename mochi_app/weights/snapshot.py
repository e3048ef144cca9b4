"""The files of a repository on the Hub at one commit, and which of them are in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mochi_app.weights.events import Emit, Notice, Progress, WeightsError
from mochi_app.weights.files import PartTypes, check_folder, safetensors_problem


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository. `size` in bytes; `digest` is SHA-256 (LFS) or Git's SHA-1."""

    path: str
    size: int
    digest: str


def size_of(path: Path) -> int:
    """Bytes of a file, 0 when there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def digest_of(path: Path, like: str) -> str:
    """The digest of a file, of the same kind as `like`."""
    hasher = hashlib.sha256()
    if len(like) == 40:
        hasher = hashlib.sha1(f"blob {size_of(path)}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hasher).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the cache: where its files are, or would be."""

    root: Path
    repo: str
    commit: str
    files: Sequence[RemoteFile] = ()

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache."""
        return self.root / f"models--{self.repo.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """The folder that is laid out like the repository."""
        return self.storage / "snapshots" / self.commit

    @property
    def contents(self) -> list[RemoteFile]:
        """The files, one for each distinct content."""
        return list({file.digest: file for file in self.files}.values())

    @property
    def total(self) -> int:
        """Bytes of all contents."""
        return sum(file.size for file in self.contents)

    def blob(self, file: RemoteFile) -> Path:
        """Where the content is once it is complete."""
        return self.storage / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Where it is downloaded to until then."""
        return self.storage / "blobs" / f"{file.digest}.incomplete"

    def has(self, file: RemoteFile) -> bool:
        """Whether the whole file is in the cache."""
        places = (self.folder / file.path, self.blob(file))
        return any(place.is_file() and size_of(place) == file.size for place in places)

    def held(self, file: RemoteFile) -> int:
        """How many of its bytes are in the cache."""
        return file.size if self.has(file) else min(size_of(self.partial(file)), file.size)

    def progress(self) -> Progress:
        """How much is in the cache, and a file that is being downloaded."""
        held = {file.path: self.held(file) for file in self.contents}
        growing = [f.path for f in self.contents if held[f.path] > 0 and not self.has(f)]
        return Progress(sum(held.values()), self.total, growing[0] if growing else "")

    def discard_damaged(self, emit: Emit) -> None:
        """Remove files from the cache whose size or header is wrong."""
        for file in self.files:
            for place in (self.folder / file.path, self.blob(file)):
                if not place.is_file():
                    continue
                weights = file.path.endswith(".safetensors")
                if size_of(place) != file.size or (weights and safetensors_problem(place)):
                    emit(Notice(f"{file.path} is damaged in {self.root}: downloading it again"))
                    place.resolve().unlink()
                    place.unlink(missing_ok=True)


def cached_snapshot(root: Path, repo: str, types: PartTypes, advice: str) -> Path:
    """The snapshot of `repo` that the cache holds, without asking the Hub.

    Raises:
        WeightsError: there is none, or it is incomplete; `advice` says what to do.
    """
    reference = Snapshot(root, repo, "").storage / "refs" / "main"
    if not reference.is_file():
        raise WeightsError(f"{repo} is not in {root}. {advice}", retry=False)
    folder = Snapshot(root, repo, reference.read_text().strip()).folder
    check_folder(folder, types, advice)
    return folder
