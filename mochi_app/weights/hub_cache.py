"""Bring a model from the Hub into huggingface_hub's cache, going on where a killed attempt ended.

huggingface_hub owns tokens, addresses and the layout of its cache, which is kept, so that
`from_pretrained` and `hf cache` find what this module leaves there:

    blobs/<digest>             whole files, named by SHA-256 (Git LFS) or Git's SHA-1
    blobs/<digest>.incomplete  what has come of one; the next start goes on from there
    snapshots/<commit>/<path>  links to blobs
    refs/main                  the commit, written last: what it names is complete

The bytes are fetched here, because huggingface_hub 2.4 writes to a file of a random name that it
removes on failure: a killed download of 10 GB would begin anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from mochi_app.errors import one_line
from mochi_app.files import fsync
from mochi_app.weights.events import Emit, Notice, Progress, WeightsError, size_text
from mochi_app.weights.explain import explained, hub_name, transient
from mochi_app.weights.files import PartTypes, check_folder, needed_files
from mochi_app.weights.snapshot import RemoteFile, Snapshot, cached_snapshot, digest_of, size_of

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5
BEAT_SECONDS = 15.0  # how often progress is told while there is none
LOCK_SECONDS = 0.5
WORKERS = 8  # files at a time, as huggingface_hub does by default
CHUNK_BYTES = 1 << 18  # as much of a file may be lost with a connection
PATIENCE_SECONDS = 60.0  # how long a file may bring no byte, retries included
PAUSE_SECONDS = (0.5, 8.0)  # first and longest pause between retries


@contextlib.contextmanager
def only_one(snapshot: Snapshot, emit: Emit) -> Iterator[None]:
    """Hold the repository's download lock, which ends with the process; wait for another's end.

    A cache that cannot be written to, or has no locks, is used without one.
    """
    path = snapshot.root / ".locks" / snapshot.storage.name / "mochi-app.lock"
    # No soft lock, which outlives a killed process: where there are no locks, do without.
    lock = FileLock(path, poll_interval=LOCK_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        emit(Notice(f"another process downloads {snapshot.repo}: waiting for it"))
        with contextlib.suppress(OSError):
            lock.acquire()
    except OSError:
        pass  # nobody can hold one here
    try:
        yield
    finally:
        lock.release()


class Reporter:
    """Emits the progress while it is entered, on change and now and then, which says that this
    process lives; and the total when all went well."""

    def __init__(self, snapshot: Snapshot, emit: Emit) -> None:
        self._snapshot = snapshot
        self._emit = emit
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def _run(self) -> None:
        last, said_at = None, 0.0
        while not self._end.is_set():
            progress = self._snapshot.progress()
            if progress != last or time.monotonic() - said_at > BEAT_SECONDS:
                self._emit(progress)
                last, said_at = progress, time.monotonic()
            self._end.wait(REPORT_SECONDS)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        if error is None:
            self._emit(Progress(self._snapshot.total, self._snapshot.total, ""))


# The download


@dataclass(frozen=True)
class Options:
    """`margin` in bytes stays free on the disk; `patience` in seconds, see PATIENCE_SECONDS."""

    types: PartTypes
    margin: int = 2 << 30
    patience: float = PATIENCE_SECONDS


def provide(model: str, options: Options, emit: Emit) -> Path:
    """The folder with the weights of `model`: a folder that is whole, or the Hub's snapshot.

    Raises:
        WeightsError: there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or folder.is_absolute() or model.startswith("."):
        check_folder(folder, options.types, "Copy these files there again, whole")
        return folder.resolve()
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE).resolve()
    if constants.is_offline_mode():
        advice = (
            "HF_HUB_OFFLINE forbids the download: unset it once, or set HF_HOME to a full cache"
        )
        return cached_snapshot(root, model, options.types, advice)
    try:
        snapshot = ask_hub(root, model, options.types)
    except WeightsError as unasked:
        try:
            folder = cached_snapshot(root, model, options.types, "")
        except WeightsError:
            raise unasked from None
        emit(Notice(f"{unasked}. Going on with {model} as it is in {root}"))
        return folder
    with explained(model, root):
        return download(snapshot, options, emit)


def ask_hub(root: Path, repo: str, types: PartTypes) -> Snapshot:
    """What the Hub has of `repo` now, and of that what is needed.

    Raises:
        WeightsError: it cannot be reached, does not know the repository, or refuses it.
    """
    from huggingface_hub import HfApi, constants

    with explained(repo, root):
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = HfApi().model_info(repo, files_metadata=True, timeout=timeout)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{hub_name()} does not answer as the Hub does ({one_line(error)}): check "
                "HF_ENDPOINT and the proxy",
                retry=True,
            ) from error
    listed = {item.rfilename: item for item in info.siblings or ()}
    files = []
    try:
        needed = needed_files(listed, types)
    except WeightsError as error:
        raise WeightsError(f"{repo} is {error}", error.retry) from None
    for path in needed:
        item = listed[path]
        size, digest = item.size, item.blob_id
        if item.lfs:
            size, digest = item.lfs.size, item.lfs.sha256
        if size is None or digest is None or info.sha is None:
            raise WeightsError(
                f"{hub_name()} lists no size or digest of {path}: is HF_ENDPOINT right?",
                retry=False,
            )
        files.append(RemoteFile(path, size, digest))
    return Snapshot(root, repo, str(info.sha), files)


def download(snapshot: Snapshot, options: Options, emit: Emit) -> Path:
    """Complete the snapshot and return its folder.

    Raises:
        WeightsError: no room, or a file that is not what the Hub's own listing says.
        OSError: the disk or the Hub fails.
    """
    with Reporter(snapshot, emit), only_one(snapshot, emit):
        snapshot.discard_damaged(emit)
        check_room(snapshot, options.margin)
        missing = [file for file in snapshot.contents if not snapshot.has(file)]
        in_parallel(lambda file: fetch(snapshot, file, options.patience, emit), missing)
        unlinked = [f for f in snapshot.files if not (snapshot.folder / f.path).is_file()]
        in_parallel(lambda file: link(snapshot, file), unlinked)
    advice = f"The digests are right, so {snapshot.repo} itself is damaged: use another MOCHI_MODEL"
    check_folder(snapshot.folder, options.types, advice)
    write_reference(snapshot)
    return snapshot.folder


def check_room(snapshot: Snapshot, margin: int) -> None:
    """Make sure that what is missing fits on the cache's disk and leaves `margin` bytes free.

    Raises:
        WeightsError: it does not.
    """
    missing = snapshot.total - sum(snapshot.held(file) for file in snapshot.contents)
    existing = next(path for path in (snapshot.root, *snapshot.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if missing and missing + margin > free:
        raise WeightsError(
            f"needs {size_text(missing + margin)} for {snapshot.repo} in {snapshot.root}, "
            f"{size_text(free)} are free: free some or set HF_HOME to a folder on another disk",
            retry=True,
        )


def in_parallel(work: Callable[[RemoteFile], None], files: Sequence[RemoteFile]) -> None:
    """Do the work for each file; the first error ends the wait, not the other threads."""
    if not files:
        return
    executor = ThreadPoolExecutor(WORKERS)
    try:
        for future in as_completed([executor.submit(work, file) for file in files]):
            future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def fetch(snapshot: Snapshot, file: RemoteFile, patience: float, emit: Emit) -> None:
    """Bring one blob into the cache, going on where an earlier attempt ended.

    Raises:
        WeightsError: the content is not what the listing says, twice.
    """
    partial, blob = snapshot.partial(file), snapshot.blob(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        fill(snapshot, file, patience)
        if digest_of(partial, file.digest) == file.digest:
            fsync(partial)
            partial.replace(blob)
            return
        partial.unlink()
        emit(Notice(f"{file.path} came damaged"))
    raise WeightsError(
        f"{file.path} of {snapshot.repo} came damaged twice: its digest is wrong. Check the disk "
        "of the cache, and the proxy or mirror (HF_ENDPOINT) in between, then start again",
        retry=True,
    )


def fill(snapshot: Snapshot, file: RemoteFile, patience: float) -> None:
    """Stream until the partial file has its size; pause and go on when the connection is lost.

    Raises:
        httpx2.HTTPError: for `patience` seconds no byte came, or the Hub refuses.
    """
    import httpx2

    partial = snapshot.partial(file)
    if size_of(partial) > file.size:
        partial.unlink()
    pause, deadline = PAUSE_SECONDS[0], time.monotonic() + patience
    while (held := size_of(partial)) < file.size or not partial.exists():
        try:
            stream(snapshot, file)
        except httpx2.HTTPError as error:
            if size_of(partial) > held:
                pause, deadline = PAUSE_SECONDS[0], time.monotonic() + patience
            if not transient(error) or time.monotonic() + pause > deadline:
                raise
            log.warning("%s: %s; going on in %.1f s", file.path, one_line(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS[1])


def stream(snapshot: Snapshot, file: RemoteFile) -> None:
    """One request for what is missing of a file, appended to its partial file.

    Raises:
        WeightsError: the Hub's file has another size than its listing says.
        httpx2.HTTPError: the connection fails, or the Hub refuses.
    """
    import httpx2
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    partial = snapshot.partial(file)
    held = size_of(partial)
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={held}-"}
    if not held:
        del headers["Range"]
    url = hf_hub_url(snapshot.repo, file.path, revision=snapshot.commit)
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        resumed = response.status_code == 206
        coming = int(response.headers.get("Content-Length", file.size - held * resumed))
        if held * resumed + coming != file.size:
            raise wrong_size(file, held * resumed + coming)
        with partial.open("ab" if resumed else "wb") as output:
            for chunk in response.iter_bytes(CHUNK_BYTES):
                output.write(chunk)
    if size_of(partial) < file.size:
        raise httpx2.RemoteProtocolError("the answer ended early")


def link(snapshot: Snapshot, file: RemoteFile) -> None:
    """Let huggingface_hub place the file in its snapshot; the blob is there already."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(snapshot.repo, file.path, revision=snapshot.commit, cache_dir=snapshot.root)
    if (size := size_of(snapshot.folder / file.path)) != file.size:
        raise wrong_size(file, size)


def write_reference(snapshot: Snapshot) -> None:
    """Name the commit in refs/main, whole or not at all; a read-only cache keeps its own."""
    reference = snapshot.storage / "refs" / "main"
    draft = reference.with_name(f"main.{os.getpid()}.tmp")
    if reference.is_file() and reference.read_text() == snapshot.commit:
        return
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(snapshot.commit)
        draft.replace(reference)
    except OSError as error:
        log.warning("%s was not written: %s", reference, error)


def wrong_size(file: RemoteFile, size: int) -> WeightsError:
    """The Hub contradicts itself."""

    return WeightsError(
        f"{hub_name()} sends {size} bytes of {file.path}, where its listing says "
        f"{file.size}: try again later, or with another HF_ENDPOINT",
        retry=True,
    )
