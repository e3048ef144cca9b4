"""Random harms at random moments to a busy server, then an audit of what it promised.

    python -m tests.soak --minutes 20 --every 10

Clients ask for videos of the embedded model, and ask again with the same request_id when an answer
is lost; they watch, cancel a few and delete a few, while ranks and the server itself are killed,
stopped and frozen, checkpoints torn and the disk filled. In the end every accepted request must be
one job, every job be asked for and in exactly one terminal state, every video play with the frames
of a calm run, and no process, file or memory be left over. Exit status 1 if not. A job that two
harms met before its next checkpoint may end as poison; those are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import imageio_ffmpeg

from tests.conftest import alive
from tests.serving import Refusal, Served, poll

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
REQUESTS: list[dict[str, Any]] = [
    {"prompt": f"a {colour} {shape} moves right", "seed": seed, "num_inference_steps": steps,
     "num_frames": 7}
    for seed, (colour, shape, steps) in enumerate([
        ("red", "ring", 4), ("blue", "square", 8), ("green", "star", 16), ("yellow", "disc", 48),
    ])
]  # fmt: skip
# A server that ends, one that knows nothing of what another was asked, one that cannot write.
NO_ANSWER = ("stopping", "Server stopped", "404: Not Found", "history")
MOST_WAITING = 8
BALLAST_ROOM = 256 << 10  # bytes left on the disk while it is full
DRAIN_SECONDS = 300.0
GROWTH = 1.1  # of memory by 300 requests that are read as they should be


@dataclass
class Ledger:
    """What the clients know: what they asked for, accepted jobs, and what they did to them."""

    asked: dict[str, dict[str, Any]] = field(default_factory=dict)  # by request_id
    answers: dict[str, str | None] = field(default_factory=dict)  # job id, None when refused
    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)  # request by job id
    cancelled: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    pids: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asks(self, key: str, request: dict[str, Any]) -> None:
        """A request is sent under this request_id; until it is answered there may be a job."""
        with self.lock:
            self.asked[key] = request

    def answered(self, key: str, job_id: str | None) -> None:
        """The request was accepted as this job, or refused."""
        with self.lock:
            self.answers[key] = job_id
            if job_id is not None:
                self.accepted[job_id] = self.asked[key]


def frames_hash(content: bytes) -> str:
    """SHA-256 of a video's decoded frames; raises if it does not play."""
    decoded = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", "pipe:0",
         "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"],
        input=content, capture_output=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    if not decoded:
        raise ValueError("no frames")
    return hashlib.sha256(decoded).hexdigest()


class Crowd:
    """Clients in threads, which go on through every harm: what fails is asked again."""

    def __init__(self, served: Served, ledger: Ledger, seed: int) -> None:
        self._served = served
        self._ledger = ledger
        self._random = random.Random(seed)
        self._end = threading.Event()
        loops = (self._ask, self._ask, self._meddle, self._watch, self._count_processes)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def _again(self, name: str, **parameters: Any) -> Any:
        """Call until the server answers; None when it refuses or the crowd goes home."""
        while not self._end.is_set():
            try:
                return self._served.call(name, **parameters)
            except Refusal as refusal:
                if not any(sign in str(refusal) for sign in NO_ANSWER):
                    self._ledger.refused[str(refusal)[:60]] += 1
                    return None
            except (httpx.HTTPError, ValueError, IndexError):
                pass
            self._end.wait(0.3)
        return None

    def _ask(self) -> None:
        while not self._end.wait(self._random.uniform(0.2, 1.5)):
            listed = self._again("list_jobs", status="PENDING", page_size=1)
            if listed is None or listed["total"] >= MOST_WAITING:
                continue
            request = self._random.choice(REQUESTS)
            key = f"{self._random.getrandbits(64):x}"
            self._ledger.asks(key, request)
            job = self._again("submit_job", request_id=key, **request)
            if job is not None:
                self._ledger.answered(key, job["id"])
            elif not self._end.is_set():
                self._ledger.answered(key, None)

    def _meddle(self) -> None:
        """Cancel, delete and star, now and then."""
        while not self._end.wait(self._random.uniform(2, 6)):
            with self._ledger.lock:
                ids = list(self._ledger.accepted)[-30:]
            if not ids:
                continue
            job_id = self._random.choice(ids)
            if self._random.random() < 0.5:
                self._ledger.cancelled.add(job_id)
                self._again("cancel_job", job_id=job_id)
                continue
            view = self._again("get_job_status", job_id=job_id)
            if view and view["status"] in TERMINAL and self._random.random() < 0.3:
                self._ledger.deleted.add(job_id)
                self._again("delete_job", job_id=job_id)

    def _watch(self) -> None:
        """A tab that stays open and comes back."""
        while not self._end.is_set():
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("GET", f"{self._served.url}/events", timeout=30) as stream,
            ):
                for _ in stream.iter_bytes():
                    if self._end.is_set():
                        return
            self._end.wait(0.5)

    def _count_processes(self) -> None:
        """Remember every rank there ever was."""
        while not self._end.wait(0.5):
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                self._ledger.pids.update(self._served.pids())


class Harms:
    """What is done to the server, one at a time; each leaves it able to go on."""

    def __init__(self, served: Served, ledger: Ledger, chance: random.Random) -> None:
        self._served = served
        self._ledger = ledger
        self._random = chance
        self.done: Counter[str] = Counter()

    def one(self) -> None:
        """A random one; another one where there is nothing to harm in that way."""
        while True:
            harm: Callable[[], None] = self._random.choices(
                [self.kill_rank, self.crash_rank, self.freeze_rank, self.kill_server,
                 self.stop_server, self.pause_server, self.tear_checkpoint, self.fill_disk],
                weights=[6, 2, 2, 2, 2, 2, 2, 1],
            )[0]  # fmt: skip
            with contextlib.suppress(
                httpx.HTTPError, ProcessLookupError, IndexError, FileNotFoundError
            ):
                harm()
                self.done[harm.__name__] += 1
                return

    def _rank(self) -> int:
        return self._random.choice(self._served.pids())

    def kill_rank(self) -> None:
        os.kill(self._rank(), signal.SIGKILL)

    def crash_rank(self) -> None:
        os.kill(self._rank(), self._random.choice((signal.SIGSEGV, signal.SIGABRT)))

    def freeze_rank(self) -> None:
        os.kill(self._rank(), signal.SIGSTOP)

    def kill_server(self) -> None:
        self._served.kill()
        self._served.start()

    def stop_server(self) -> None:
        self._served.terminate(30)
        self._served.start()

    def pause_server(self) -> None:
        self._served.process.send_signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(1, 8))
        self._served.process.send_signal(signal.SIGCONT)

    def tear_checkpoint(self) -> None:
        files = [path for path in (self._served.data_dir / "checkpoints").rglob("*")
                 if path.is_file()]  # fmt: skip
        path = self._random.choice(files)
        os.truncate(path, path.stat().st_size // 2)

    def fill_disk(self) -> None:
        """Take all room but a little for a while; needs a small disk of its own."""
        if not self._served.data_dir.is_mount():
            raise FileNotFoundError
        ballast = self._served.data_dir / "ballast"
        disk = os.statvfs(self._served.data_dir)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - BALLAST_ROOM)
        time.sleep(self._random.uniform(1, 6))
        ballast.unlink()


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A data folder on a tmpfs of its own if this user may mount one, else a plain folder."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "soak", str(data)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield data
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(data)], check=False)


def all_jobs(served: Served) -> Iterator[dict[str, Any]]:
    """Every job that the server lists."""
    page = 1
    while jobs := served.call("list_jobs", page=page, page_size=100)["jobs"]:
        yield from jobs
        page += 1


def drained(served: Served) -> bool:
    """Whether nothing waits or runs; what is held is tried again."""
    for job in served.call("list_jobs", status="PENDING", page_size=100)["jobs"]:
        if job["held"]:
            served.call("retry_job", job_id=job["id"])
    return all(
        served.call("list_jobs", status=status, page_size=1)["total"] == 0
        for status in ("PENDING", "PROCESSING", "CREATED")
    )


def calm_hashes(served: Served) -> dict[int, str]:
    """Frames of each request, by its seed, on a server that nobody harms."""
    hashes = {}
    for request in REQUESTS:
        job = served.ended(served.call("submit_job", **request)["id"])
        if job["status"] != "COMPLETED":
            raise RuntimeError(f"the calm run failed: {job['error']}")
        content = httpx.get(f"{served.url}{job['video_url']}").content
        hashes[request["seed"]] = frames_hash(content)
        served.call("delete_job", job_id=job["id"])
    return hashes


def audit(served: Served, ledger: Ledger, calm: dict[int, str]) -> list[str]:
    """Everything that is not as promised."""
    listed = list(all_jobs(served))
    jobs = {job["id"]: job for job in listed}
    wrong = [f"{len(listed) - len(jobs)} jobs are listed twice"] if len(jobs) < len(listed) else []
    lost = ledger.accepted.keys() - jobs.keys() - ledger.deleted
    wrong += [f"{job_id} is lost" for job_id in sorted(lost)]
    wrong += made_twice(listed)
    for job in jobs.values():
        wrong += [f"{job['id']}: {what}" for what in strangeness_of(ledger, job)]
        if (request := ledger.asked.get(job["request_id"])) is not None:
            found = faults_of(served, ledger, job, request, calm)
            wrong += [f"{job['id']}: {what}" for what in found]
    return [*wrong, *leftovers(served, ledger, listed)]


def made_twice(listed: list[dict[str, Any]]) -> Iterator[str]:
    """Requests that are more than one job."""
    ids: dict[str, set[str]] = {}
    for job in listed:
        if job["request_id"] is not None:
            ids.setdefault(job["request_id"], set()).add(job["id"])
    for key, made in ids.items():
        if len(made) > 1:
            yield f"request {key} is {len(made)} jobs: {', '.join(sorted(made))}"


def strangeness_of(ledger: Ledger, job: dict[str, Any]) -> Iterator[str]:
    """Whether somebody asked for the job, and was not told otherwise."""
    key = job["request_id"]
    if key not in ledger.asked:
        yield "nobody asked for it"
    elif key in ledger.answers and (answer := ledger.answers[key]) != job["id"]:
        yield f"its request {key} was {f'answered with {answer}' if answer else 'refused'}"


def faults_of(
    served: Served,
    ledger: Ledger,
    job: dict[str, Any],
    request: dict[str, Any],
    calm: dict[int, str],
) -> Iterator[str]:
    """What is wrong with one job."""
    if job["status"] not in TERMINAL:
        yield f"is {job['status']}"
    if job["status"] == "CANCELLED" and job["id"] not in ledger.cancelled:
        yield "was cancelled by nobody"
    if job["status"] == "FAILED" and not job["error"].startswith("poison"):
        yield f"failed: {job['error']}"
    if any(job[name] != value for name, value in request.items()):
        yield "is not what was asked for"
    if job["status"] == "COMPLETED":
        answer = httpx.get(f"{served.url}{job['video_url']}")
        try:
            if frames_hash(answer.content) != calm[request["seed"]]:
                yield "has other frames than the calm run"
        except (subprocess.CalledProcessError, ValueError) as error:
            yield f"does not play ({answer.status_code}): {error}"


def leftovers(served: Served, ledger: Ledger, listed: list[dict[str, Any]]) -> Iterator[str]:
    """Processes and files that nothing stands for. The trash was emptied before."""
    ranks = set(served.pids())
    for pid in ledger.pids - ranks:
        if alive(pid):
            yield f"process {pid} is left over"
    videos = {job["id"] for job in listed if job["status"] == "COMPLETED"}
    for folder in ("videos", "posters"):
        found = {path.stem for path in (served.data_dir / folder).iterdir()}
        if found != videos:
            yield f"{folder}: {len(found - videos)} too many, {len(videos - found)} missing"
    for folder in ("withheld", "checkpoints", "scratch"):
        files = [path for path in (served.data_dir / folder).rglob("*") if path.is_file()]
        if extra := [path.name for path in files if not path.name.startswith("rendezvous")]:
            yield f"{folder}: {len(extra)} files left over, such as {extra[0]}"


def soak(minutes: float, every: float, seed: int) -> dict[str, Any]:
    """The whole run; its figures and what the audit found."""
    chance = random.Random(seed)
    settings = {
        "MOCHI_SLOTS": "cpu;cpu*2",
        "MOCHI_HEARTBEAT_TIMEOUT": "8",
        "MOCHI_RESTART_BACKOFF_MAX": "5",
        "MOCHI_TRASH_HOURS": "0",
        "MOCHI_BROKEN_AFTER": "20",
    }
    with small_disk(800) as data:
        served = Served(data, **settings).start().ready()
        ledger = Ledger()
        try:
            calm = calm_hashes(served)
            harms = Harms(served, ledger, chance)
            at = time.monotonic()
            end = at + minutes * 60
            with Crowd(served, ledger, seed):
                # Moments are drawn beforehand: a harm that takes its time makes none rarer.
                while (at := at + chance.expovariate(1 / every)) < end:
                    time.sleep(max(0.0, at - time.monotonic()))
                    harms.one()
            memory = settle(served)
            found = audit(served, ledger, calm)
            if memory[1] > GROWTH * memory[0]:
                found.append(f"memory grew from {memory[0]:.0f} to {memory[1]:.0f} MiB")
            ends = Counter(
                "poison" if job["status"] == "FAILED" else job["status"] for job in all_jobs(served)
            )
            restarts = sum(slot["restarts"] for slot in served.slots())
        finally:
            served.end()
        for pid in ledger.pids:
            if alive(pid):
                found.append(f"process {pid} outlived the server")
        if found:
            print(served.log.read_text()[-4000:], file=sys.stderr)
    return {
        "minutes": minutes,
        "seed": seed,
        "harms": dict(harms.done),
        "accepted": len(ledger.accepted),
        "unanswered": len(ledger.asked) - len(ledger.answers),
        "deleted": len(ledger.deleted),
        "ends": dict(ends),
        "refused": dict(ledger.refused),
        "restarts_of_last_server": restarts,
        "memory_mib": [round(size) for size in memory],
        "found": found,
    }


def settle(served: Served) -> tuple[float, float]:
    """Let the queue run empty and the trash be emptied; MiB of the server's memory before and
    after 300 requests."""
    poll(lambda: drained(served), "an empty queue", DRAIN_SECONDS)
    poll(lambda: all(slot["state"] == "ready" for slot in served.slots()), "ready slots", 120)
    for _ in range(100):
        served.call("list_jobs")
    before = served.memory_mib
    for _ in range(300):
        served.call("list_jobs")
    # The janitor looks once a minute.
    withheld = served.data_dir / "withheld"
    poll(lambda: not list(withheld.iterdir()), "an empty trash", 150)
    return before, served.memory_mib


def main() -> int:
    """Run the soak, print its summary, write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="tests.soak")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=10, help="mean seconds between harms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = soak(given.minutes, given.every, given.seed)
    for name, value in result.items():
        print(f"{name}: {value}")
    print("clean" if not result["found"] else f"{len(result['found'])} promises broken")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 1 if result["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
