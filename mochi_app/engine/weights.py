"""The weights of a model, on this box before any rank starts: found, downloaded, checked.

A command of its own, so that it can be killed and a hang holds nobody up:

    python -m mochi_app.engine.weights --model genmo/mochi-1-preview --dtype bfloat16

It prints events as JSON lines, the last of them `done` (exit status 0) or `error` (1); the parent's
side of it is `fetch_weights`. Neither side imports torch; huggingface_hub is the child's alone.

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

import argparse
import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mochi_app.engine.rank import die_with_parent, leave, one_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

PROJECT_DIR = Path(__file__).resolve().parents[2]
WEIGHTS_COMMAND: tuple[str, ...] = (sys.executable, "-m", "mochi_app.engine.weights")
WEIGHT_STEMS = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
EXTRA_FILES = ("latent_rgb.json", "mochi_defaults.json")
REPORT_SECONDS = 0.5
LOCK_SECONDS = 0.5
WORKERS = 8  # files at a time, as huggingface_hub does by default
CHUNK_BYTES = 1 << 18  # as much of a file may be lost with a connection
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
PATIENCE_SECONDS = 60.0  # how long a file may bring no byte, retries included
PAUSE_SECONDS = (0.5, 8.0)  # first and longest pause between retries


class WeightsError(RuntimeError):
    """There are no weights to load. The message says why and what to do.

    `retry` says whether the same attempt may succeed later, without a change of the settings.
    """

    def __init__(self, message: str, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


# Events


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes on this box, of all that are needed; `file` is one that is coming in, or empty."""

    done: int
    total: int
    file: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that people should know, and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The weights lie in this folder, which `from_pretrained` loads."""

    folder: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The end without weights; see `WeightsError`."""

    error: str
    retry: bool


Event = Progress | Notice | Done | Failure
Emit = Callable[[Event], None]
EVENTS: Mapping[str, type[Event]] = {
    "progress": Progress,
    "notice": Notice,
    "done": Done,
    "error": Failure,
}
_output = threading.Lock()


def encode(event: Event) -> str:
    """The event as one line of JSON, newline included."""
    name = next(name for name, kind in EVENTS.items() if isinstance(event, kind))
    return json.dumps({"event": name} | asdict(event)) + "\n"


def decode(line: str | bytes) -> Event | None:
    """The event in a line; None when a library printed something else."""
    try:
        record = json.loads(line)
        return EVENTS[record.pop("event")](**record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def emit_line(event: Event) -> None:
    """Write the event to stdout; may be called from any thread."""
    with _output:
        sys.stdout.write(encode(event))
        sys.stdout.flush()


def size_text(size: float, like: float | None = None) -> str:
    """Bytes for people, decimal: `31.0 GB`, `25.3 MB` below one GB; the unit is that of `like`."""
    unit, name = (1e9, "GB") if (size if like is None else like) >= 1e9 else (1e6, "MB")
    return f"{size / unit:.1f} {name}"


def progress_text(progress: Progress) -> str:
    """`downloading 12.3 of 31.0 GB`."""
    done = size_text(progress.done, like=progress.total).split()[0]
    return f"downloading {done} of {size_text(progress.total)}"


# Which files


def weight_files(part: str, names: Collection[str], dtype: str) -> list[str]:
    """The weight files of one component among the names in its folder; empty when there are none.

    The files of the bf16 variant for `bfloat16` if there are any, else the plain ones: one file,
    or shards and their index (which may be missing from `names`). Where a folder has both, the
    choice is that of the library which loads it: diffusers takes the index, transformers the file.
    """
    stem = WEIGHT_STEMS[part]
    for variant in (".bf16", "") if dtype == "bfloat16" else ("",):
        whole = f"{stem}{variant}.safetensors"
        index = f"{stem}.safetensors.index{variant}.json"
        pattern = re.compile(re.escape(stem + variant) + r"-\d{5}-of-\d{5}\.safetensors")
        shards = sorted(name for name in names if pattern.fullmatch(name))
        if whole in names and (part == "text_encoder" or index not in names):
            return [whole]
        if shards:
            return [*shards, index]
    return []


def needed_files(paths: Iterable[str], dtype: str) -> list[str]:
    """Those of a repository's files that a pipeline of that dtype loads, sorted.

    `dtype` is `float32` or `bfloat16`. Never both variants of a component, and no checkpoint that
    is not part of a diffusers pipeline.

    Raises:
        WeightsError: a file that every pipeline has is not among `paths`.
    """
    present = set(paths)
    wanted = {"model_index.json", "scheduler/scheduler_config.json"}
    for part in WEIGHT_STEMS:
        names = {path.removeprefix(f"{part}/") for path in present if path.startswith(f"{part}/")}
        weights = weight_files(part, names, dtype)
        wanted.add(f"{part}/config.json")
        wanted.update(f"{part}/{name}" for name in weights or [f"{WEIGHT_STEMS[part]}.safetensors"])
    if missing := sorted(wanted - present):
        raise WeightsError(
            f"no Mochi pipeline of diffusers for {dtype}: it has no {', '.join(missing)}; "
            "expected a model such as genmo/mochi-1-preview",
            retry=False,
        )
    tokenizer = re.compile(r"tokenizer/[^/]+\.(json|model|txt)")
    wanted.update(path for path in present if path in EXTRA_FILES or tokenizer.fullmatch(path))
    return sorted(wanted)


# A folder's health, without reading its weights


def safetensors_problem(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size; empty when nothing is.

    Format: 8 bytes with the header's length, little endian; a JSON header; the tensors' bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            return "its header is damaged"
        try:
            header = json.loads(file.read(length))
            ends = [item["data_offsets"][1] for key, item in header.items() if key[:2] != "__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header is damaged"
    return "" if size == expected else f"it has {size} bytes, its header says {expected}"


def file_problem(path: Path) -> str:
    """What is wrong with a JSON or safetensors file; empty when nothing seems to be."""
    if not path.is_file():
        return "it is missing"
    try:
        if path.suffix == ".safetensors":
            return safetensors_problem(path)
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError:
        return "it is no JSON"
    return ""


def shards_of(index: Path) -> list[str]:
    """The shards that a sound index names; none of an index that is not sound."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def folder_problems(folder: Path, dtype: str) -> Iterator[str]:
    """All that keeps a pipeline of that dtype from loading out of `folder`, one sentence each."""
    wanted = ["model_index.json", "scheduler/scheduler_config.json"]
    wanted.append("tokenizer/tokenizer_config.json")
    for part, stem in WEIGHT_STEMS.items():
        wanted.append(f"{part}/config.json")
        inside = folder / part
        names = {path.name for path in inside.iterdir()} if inside.is_dir() else set()
        chosen = weight_files(part, names, dtype) or [f"{stem}.safetensors"]
        if chosen[-1].endswith(".json"):
            chosen = sorted({*chosen, *shards_of(inside / chosen[-1])})
        wanted += [f"{part}/{name}" for name in chosen]
    for name in wanted:
        if problem := file_problem(folder / name):
            yield f"{name}: {problem}"
    if not any(
        (folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")
    ):
        yield "tokenizer: neither tokenizer.json nor spiece.model"


def check_folder(folder: Path, dtype: str, advice: str) -> None:
    """Make sure that a pipeline is there and whole, as far as that shows without reading it all.

    Raises:
        WeightsError: naming files that are missing or damaged, and what to do: `advice`.
    """
    problems = list(folder_problems(folder, dtype))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise WeightsError(
            f"{folder} is no complete Mochi pipeline for {dtype}: {'; '.join(problems[:3])}{more}. "
            f"{advice}",
            retry=False,
        )


# The cache


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
    """The digest of a file, of the kind that `like` is."""
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
        """The folder that looks like the repository."""
        return self.storage / "snapshots" / self.commit

    @property
    def contents(self) -> list[RemoteFile]:
        """The files, each content once."""
        return list({file.digest: file for file in self.files}.values())

    @property
    def total(self) -> int:
        """Bytes of all contents."""
        return sum(file.size for file in self.contents)

    def blob(self, file: RemoteFile) -> Path:
        """Where the content lies once it is whole."""
        return self.storage / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Where it grows until then."""
        return self.storage / "blobs" / f"{file.digest}.incomplete"

    def has(self, file: RemoteFile) -> bool:
        """Whether the whole file is in the cache."""
        places = (self.folder / file.path, self.blob(file))
        return any(place.is_file() and size_of(place) == file.size for place in places)

    def held(self, file: RemoteFile) -> int:
        """How many of its bytes are in the cache."""
        return file.size if self.has(file) else min(size_of(self.partial(file)), file.size)

    def progress(self) -> Progress:
        """How much is in the cache, and a file that is coming in."""
        held = {file.path: self.held(file) for file in self.contents}
        growing = [f.path for f in self.contents if held[f.path] > 0 and not self.has(f)]
        return Progress(sum(held.values()), self.total, growing[0] if growing else "")

    def discard_damaged(self, emit: Emit) -> None:
        """Remove what is in the cache and cannot be right, by its size or its header."""
        for file in self.files:
            for place in (self.folder / file.path, self.blob(file)):
                if not place.is_file():
                    continue
                weights = file.path.endswith(".safetensors")
                if size_of(place) != file.size or (weights and safetensors_problem(place)):
                    emit(Notice(f"{file.path} is damaged in {self.root}: downloading it again"))
                    place.resolve().unlink()
                    place.unlink(missing_ok=True)


def cached_snapshot(root: Path, repo: str, dtype: str, advice: str) -> Path:
    """The snapshot of `repo` that the cache holds, without asking the Hub.

    Raises:
        WeightsError: there is none, or it is not complete; `advice` says what to do.
    """
    reference = Snapshot(root, repo, "").storage / "refs" / "main"
    if not reference.is_file():
        raise WeightsError(f"{repo} is not in {root}. {advice}", retry=False)
    folder = Snapshot(root, repo, reference.read_text().strip()).folder
    check_folder(folder, dtype, advice)
    return folder


@contextlib.contextmanager
def only_one(snapshot: Snapshot, emit: Emit) -> Iterator[None]:
    """Hold the repository's download lock, which ends with the process; wait for another's end.

    A cache that cannot be written to, or has no locks, is used without one.
    """
    path = snapshot.root / ".locks" / snapshot.storage.name / "mochi-app.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError:
        yield
        return
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    emit(Notice(f"another process downloads {snapshot.repo}: waiting for it"))
                    told = True
                time.sleep(LOCK_SECONDS)
            except OSError:
                break
        yield


class Reporter:
    """Emits the progress while it is entered, on change, and the total when all went well."""

    def __init__(self, snapshot: Snapshot, emit: Emit) -> None:
        self._snapshot = snapshot
        self._emit = emit
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def _run(self) -> None:
        last = None
        while not self._end.is_set():
            progress = self._snapshot.progress()
            if progress != last:
                self._emit(progress)
            last = progress
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

    dtype: str
    margin: int = 2 << 30
    patience: float = PATIENCE_SECONDS


def provide(model: str, options: Options, emit: Emit) -> Path:
    """The folder with the weights of `model`: a folder that is whole, or the Hub's snapshot.

    Raises:
        WeightsError: there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or folder.is_absolute() or model.startswith("."):
        check_folder(folder, options.dtype, "Copy these files there again, whole")
        return folder.resolve()
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE).resolve()
    if constants.is_offline_mode():
        advice = (
            "HF_HUB_OFFLINE forbids the download: unset it once, or set HF_HOME to a full cache"
        )
        return cached_snapshot(root, model, options.dtype, advice)
    try:
        snapshot = ask_hub(root, model, options.dtype)
    except WeightsError as unasked:
        try:
            folder = cached_snapshot(root, model, options.dtype, "")
        except WeightsError:
            raise unasked from None
        emit(Notice(f"{unasked}. Going on with {model} as it is in {root}"))
        return folder
    with explained(model, root):
        return download(snapshot, options, emit)


def ask_hub(root: Path, repo: str, dtype: str) -> Snapshot:
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
                f"{constants.ENDPOINT} does not answer as the Hub does ({one_line(error)}): check "
                "HF_ENDPOINT and the proxy",
                retry=True,
            ) from error
    listed = {item.rfilename: item for item in info.siblings or ()}
    files = []
    try:
        needed = needed_files(listed, dtype)
    except WeightsError as error:
        raise WeightsError(f"{repo} is {error}", error.retry) from None
    for path in needed:
        item = listed[path]
        size, digest = item.size, item.blob_id
        if item.lfs:
            size, digest = item.lfs.size, item.lfs.sha256
        if size is None or digest is None or info.sha is None:
            raise WeightsError(
                f"{constants.ENDPOINT} lists no size or digest of {path}: is HF_ENDPOINT right?",
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
    check_folder(snapshot.folder, options.dtype, advice)
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
            with partial.open("rb") as written:
                os.fsync(written)
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


def transient(error: Exception) -> bool:
    """Whether the same request may work in a moment."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.ProxyError)


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


# What went wrong, and what to do


def wrong_size(file: RemoteFile, size: int) -> WeightsError:
    """The Hub contradicts itself."""
    from huggingface_hub import constants

    return WeightsError(
        f"{constants.ENDPOINT} sends {size} bytes of {file.path}, where its listing says "
        f"{file.size}: try again later, or with another HF_ENDPOINT",
        retry=True,
    )


@contextlib.contextmanager
def explained(repo: str, root: Path) -> Iterator[None]:
    """Turn what huggingface_hub, the network and the disk raise into `WeightsError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError:
        raise WeightsError(
            f"{repo!r} is neither a folder nor a model of the Hub such as genmo/mochi-1-preview: "
            "check MOCHI_MODEL",
            retry=False,
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        refusals = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
        raise (
            explain_refusal(refusals[0], repo) if refusals else explain_failure(causes, root)
        ) from error


def explain_refusal(error: HfHubHTTPError, repo: str) -> WeightsError:
    """What an answer of the Hub that is no file means."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hub, status = constants.ENDPOINT, error.response.status_code
    if isinstance(error, GatedRepoError):
        what = f"{repo} is gated: accept its terms at {hub}/{repo}, then set HF_TOKEN to a token "
        return WeightsError(f"{what}of that account", retry=False)
    if isinstance(error, RepositoryNotFoundError):
        what = f"{hub} has no model {repo}, or it is private: check MOCHI_MODEL; a private one "
        return WeightsError(f"{what}needs HF_TOKEN", retry=False)
    if status in (401, 403):
        what = f"{hub} refuses the token (status {status}): set HF_TOKEN to a valid one that may "
        return WeightsError(f"{what}read {repo}, or unset it", retry=False)
    if status in (404, 416):
        what = f"{hub} has another {repo} than it listed a moment ago (status {status})"
        return WeightsError(f"{what}: start again", retry=True)
    later = transient(error)
    advice = "try again later" if later else "check HF_ENDPOINT and the proxy"
    return WeightsError(f"{hub} answers {repo} with status {status}: {advice}", retry=later)


def explain_failure(causes: Sequence[BaseException], root: Path) -> WeightsError:
    """What an error of the network or of the disk means, given with its causes."""
    import httpx2
    from huggingface_hub import constants

    number = next((cause.errno for cause in causes if isinstance(cause, OSError)), None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = f"the disk of {root} is full: free some or set HF_HOME to a folder on another disk; "
        return WeightsError(f"{what}what has come so far is kept", retry=True)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"{root} cannot be written ({one_line(causes[0], paths=True)})"
        return WeightsError(f"{what}: set HF_HOME to a folder of this user", retry=False)
    if any(isinstance(cause, httpx2.HTTPError) for cause in causes):
        what = f"{constants.ENDPOINT} cannot be reached ({one_line(causes[-1])})"
        return WeightsError(f"{what}: check the network, the proxy and HF_ENDPOINT", retry=True)
    what = f"the download stopped: {one_line(causes[0], paths=True)}"
    return WeightsError(f"{what}; look at the disk of {root}", retry=True)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="mochi_app.engine.weights", description="Bring a model's weights onto this box."
    )
    parser.add_argument("--model", required=True, help="id on the Hub, or a folder")
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"))
    parser.add_argument(
        "--free-margin-gib", type=float, default=2, help="GiB that must stay free on the disk"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        help="seconds that a file may bring no byte, retries included",
    )
    given = parser.parse_args(argv)
    # Xet has no partial files to go on with, bars would fill the log. Read when hub is imported.
    for name in ("XET", "PROGRESS_BARS", "TELEMETRY"):
        os.environ[f"HF_HUB_DISABLE_{name}"] = "1"
    options = Options(given.dtype, int(given.free_margin_gib * (1 << 30)), given.patience)
    try:
        folder = provide(given.model, options, emit_line)
    except WeightsError as error:
        emit_line(Failure(str(error), error.retry))
        leave(1)  # other files' threads may wait for the network
    emit_line(Done(str(folder)))
    return 0


# The parent's side


async def fetch_weights(
    model: str,
    dtype: str,
    on_progress: Callable[[Progress], None],
    command: Sequence[str] = WEIGHTS_COMMAND,
) -> Path:
    """Run the command as a child and return the folder; a cancel kills the child.

    `dtype` is float32 or bfloat16. `on_progress` is called on the loop; notices go to the log. Must
    run on the loop's own thread: the death signal that the child asks for follows the thread.

    Raises:
        WeightsError: as the child says, or because it died.
        OSError: it could not be started.
    """
    process = await _spawn(*command, "--model", _absolute(model), "--dtype", dtype)
    assert process.stdout is not None
    assert process.stderr is not None
    tail: deque[str] = deque(maxlen=1)
    listening = asyncio.create_task(_keep_stderr(process.stderr, tail))
    outcome: Event | None = None
    try:
        while line := await process.stdout.readline():
            outcome = _take(line, on_progress) or outcome
        await process.wait()
        await listening
    finally:
        listening.cancel()
        await _end(process)
    if isinstance(outcome, Done) and process.returncode == 0:
        return Path(outcome.folder)
    if isinstance(outcome, Failure):
        raise WeightsError(outcome.error, outcome.retry)
    raise WeightsError(_ending(process, tail), retry=True)


def _absolute(model: str) -> str:
    """A folder by its full path, since the child has a working directory of its own."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _take(line: bytes, on_progress: Callable[[Progress], None]) -> Event | None:
    """Hand on what a line says; the event if it is the last one."""
    event = decode(line)
    if isinstance(event, Progress):
        on_progress(event)
    elif isinstance(event, Notice):
        log.warning("%s", event.text)
    elif event is None:
        log.info("weights: %s", line.decode("utf-8", "backslashreplace").rstrip())
    return event if isinstance(event, Done | Failure) else None


async def _spawn(*command: str) -> asyncio.subprocess.Process:
    """Start the child; a cancel meanwhile waits for it and kills it."""
    start = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            cwd=PROJECT_DIR,
        )
    )
    try:
        return await asyncio.shield(start)
    except asyncio.CancelledError:
        await asyncio.wait([start])
        if not start.cancelled() and start.exception() is None:
            await _end(start.result())
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the child if it lives, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    transport: Any = process._transport  # type: ignore[attr-defined]
    transport.close()  # else it closes itself later, when the loop may have ended


async def _keep_stderr(stream: asyncio.StreamReader, tail: deque[str]) -> None:
    """Log the child's stderr and keep its last line."""
    while line := await stream.readline():
        if text := line.decode("utf-8", "backslashreplace").strip():
            tail.append(text)
            log.info("weights: %s", text)


def _ending(process: asyncio.subprocess.Process, tail: Sequence[str]) -> str:
    """How a child ended that did not say so itself."""
    who, code = f"the download process (pid {process.pid})", process.returncode or 0
    if code < 0:
        return f"{who} was killed by {signal.Signals(-code).name}: it goes on at the next start"
    words = f": {tail[-1]}" if tail else ""
    return f"{who} ended with code {code} and no result{words}"


if __name__ == "__main__":
    sys.exit(main())
