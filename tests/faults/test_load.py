"""Harms by many clients at once, and to the queue that serves them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from mochi_app.web.events import MOST_NAMED, STREAMS_OF_ADDRESS
from tests.benchmarks import records
from tests.conftest import eventually
from tests.crowds import browser, call, deaf_listener, flood, post
from tests.listening import Heard, address, listening
from tests.serving import Served, poll

Serve = Callable[..., Served]
SMALL = {"height": 64, "width": 64, "num_frames": 7}


def submit(served: Served, prompt: str, steps: int = 8) -> dict[str, Any]:
    """A job of the smallest size."""
    job: dict[str, Any] = served.call(
        "submit_job", prompt=prompt, num_inference_steps=steps, **SMALL
    )
    return job


@contextmanager
def waiting_caller(served: Served) -> Iterator[list[Any]]:
    """A caller of /generate who waits meanwhile, behind a long job; its answer, at the end."""
    answer: list[Any] = []
    before = submit(served, "slowest", 512)
    served.running(before["id"])

    def wait() -> None:
        answer.append(served.call("generate", prompt="watched", **SMALL))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    poll(lambda: served.call("list_jobs")["total"] == 2, "the caller's job")
    yield answer
    assert not answer, "the caller has to wait to the end"
    served.call("cancel_job", job_id=before["id"])
    thread.join(60)
    assert answer
    assert answer[0]["mime_type"] == "video/mp4"


def health(served: Served) -> httpx.Response:
    return httpx.get(f"{served.url}/healthz", timeout=30)


def test_a_flood_of_unread_posts_is_refused_and_costs_nobody_anything(serve: Serve) -> None:
    """One client posts 5,000 calls and reads no answer: it gets 429 until it reads, and the jobs
    and calls of others go on."""
    served = serve("ok", MOCHI_TRUSTED_PROXIES="127.0.0.1").ready()
    with waiting_caller(served):
        answers = asyncio.run(flood(served.url, 5000, forwarded_for=lambda _: "10.9.9.9"))
        assert answers.codes[429] > 4000, answers.codes
        headers, text = answers.refusal
        assert 1 <= int(headers["retry-after"]) <= 60
        assert "open the stream of each post" in text
    assert "ticket was lost" not in served.log.read_text()
    assert health(served).status_code == 200


def all_jobs(served: Served) -> dict[str, Any] | None:
    """What /events shows of all jobs, once none waits or runs."""
    with httpx.stream("GET", f"{served.url}/events", timeout=30) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                snapshot = httpx.Response(200, content=line[6:]).json()
                ended = snapshot["pending"] == snapshot["processing"] == 0
                return {job["id"]: job for job in snapshot["jobs"]} if ended else None
    return None


def test_a_flood_from_thousands_of_addresses_is_kept_small(serve: Serve) -> None:
    """2,500 addresses post one call each and read no answer: the oldest calls are dropped, and the
    jobs and calls of others go on."""
    served = serve("ok", MOCHI_TRUSTED_PROXIES="127.0.0.1").ready()
    with waiting_caller(served):
        answers = asyncio.run(flood(served.url, 2500, forwarded_for=pretended))
        assert answers.codes == {200: 2500}
    assert "ticket was lost" not in served.log.read_text()
    assert health(served).status_code == 200


def pretended(number: int) -> str:
    """An address for each number."""
    return f"10.1.{number // 250}.{number % 250}"


def test_polling_however_often_is_no_harm(serve: Serve) -> None:
    """2,200 calls from one address are read properly: none is refused, nobody who waits for a long
    job loses its answer, and none of them stays in memory."""
    served = serve("ok").ready()
    with waiting_caller(served):
        assert asyncio.run(flood(served.url, 200, read=True)).codes == {200: 200}
        before = served.memory_mib
        answers = asyncio.run(flood(served.url, 2000, read=True))
        assert answers.codes == {200: 2000}
        assert served.memory_mib - before < 40
    assert "ticket was lost" not in served.log.read_text()
    # What is not read is refused, though a header pretends that it comes from elsewhere.
    answers = asyncio.run(flood(served.url, 300, forwarded_for=pretended))
    assert answers.codes == {200: 250, 429: 50}


def test_a_dead_queue_comes_back_by_itself(serve: Serve, tmp_path: Path) -> None:
    """The loop of Gradio's queue dies repeatedly: /healthz is 503 and says so; running jobs go on,
    and as soon as the loop is back everything that waited is done."""
    flag = tmp_path / "harm"
    served = serve("ok", FAULTS_QUEUE=str(flag)).ready()
    with waiting_caller(served):
        flag.write_text("raise")
        posted = httpx.post(
            f"{served.url}/gradio_api/call/v2/submit_job", json={"prompt": "meanwhile"} | SMALL
        )
        assert posted.status_code == 200
        unwell = poll(lambda: (h := health(served)).status_code == 503 and h, "a 503")
        assert "Gradio's queue stopped" in unwell.json()["reasons"][0]
        assert "KeyError" in unwell.json()["reasons"][0]
        flag.unlink()
        poll(lambda: health(served).status_code == 200, "health")
        attempts = {job["attempts"] for job in served.call("list_jobs")["jobs"]}
        assert attempts <= {0, 1}
    path = f"{served.url}/gradio_api/call/submit_job/{posted.json()['event_id']}"
    assert "event: complete" in httpx.get(path, timeout=30).text
    poll(lambda: all_jobs(served), "the end of all jobs")
    assert len(served.call("list_jobs", status="COMPLETED")["jobs"]) == 2
    assert "CRITICAL" in served.log.read_text()


def test_a_lost_ticket_is_noticed(serve: Serve, tmp_path: Path) -> None:
    """Gradio's queue silently loses a ticket, so that a slot and a job wait for each other: this is
    noticed, and the job is made."""
    flag = tmp_path / "harm"
    served = serve("ok", FAULTS_QUEUE=str(flag)).ready()
    first, second = submit(served, "slow", 20), submit(served, "later")
    served.running(first["id"])
    flag.write_text("drop")
    poll(lambda: not flag.exists(), "a ticket that is lost")
    ended = served.ended(second["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
    assert "no ticket was granted" in served.log.read_text()


def test_a_thousand_waiting_jobs_and_200_watchers(serve: Serve, tmp_path: Path) -> None:
    """1,000 jobs wait and 200 clients watch: every client receives every step, and one more job is
    refused with the reason."""
    records.queue_up(tmp_path / "data", 890, "slow")
    served = serve("ok", MOCHI_MAX_PENDING="1000").ready()
    asyncio.run(watch_in_crowds(served))


async def watch_in_crowds(served: Served) -> None:
    """100 pages and 100 callers of /generate; each of them hears of a new step."""
    body = {"prompt": "slow", "num_inference_steps": 64} | SMALL
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:

        async def page() -> int:
            async with client.stream("GET", "/events") as stream:
                seen: set[int] = set()
                async for line in stream.aiter_lines():
                    if line.startswith("data: "):
                        jobs = httpx.Response(200, content=line[6:]).json()["jobs"]
                        seen |= {job["step"] for job in jobs if job["status"] == "PROCESSING"}
                    if len(seen) >= 2:
                        return len(seen)
            raise AssertionError("/events ended early")

        async def caller() -> int:
            posted = await post(client, "generate", body)
            async with client.stream(
                "GET", f"/gradio_api/call/generate/{posted.json()['event_id']}"
            ) as stream:
                lines, said = 0, []
                async for line in stream.aiter_lines():
                    said.append(line[:300])
                    lines += line.startswith("event: generating")
                    if lines >= 2:
                        return lines
            raise AssertionError(f"/generate ended early: {said}")

        heard = await asyncio.gather(*(page() for _ in range(100)), *(caller() for _ in range(100)))
        assert min(heard) >= 2
        async with browser(served.url) as other:
            told = await asyncio.gather(*(call(other, "submit_job", body) for _ in range(20)))
        assert any("jobs are waiting, the most this server takes" in text for text in told)


def test_silent_connections_lock_nobody_out(serve: Serve) -> None:
    """A stranger opens more connections than the server may have open files, and sends nothing or
    half a request: others are answered, running jobs are made, and the silent connections are
    closed."""
    served = serve("ok", FAULTS_FILES="512", FAULTS_PATIENCE="5").ready()
    job = submit(served, "slow", 64)
    served.running(job["id"])
    silent = [socket.create_connection(("127.0.0.1", served.port), 30) for _ in range(600)]
    try:
        for line in silent[::2]:
            with contextlib.suppress(ConnectionError):  # closed already
                line.sendall(b"GET / HTTP/1.1\r\n")
        assert served.get("/livez").status_code == 200
        ended = served.ended(job["id"])
        assert (ended["status"], ended["attempts"]) == ("COMPLETED", 1)
        for line in silent:
            with contextlib.suppress(ConnectionError):
                assert line.recv(1) == b""
    finally:
        for line in silent:
            line.close()
    assert "out of system resource" not in served.log.read_text()
    limits = Path(f"/proc/{served.process.pid}/limits").read_text()
    assert re.search(r"Max open files +512 +512 ", limits)


def test_one_client_takes_the_live_page_from_nobody(serve: Serve) -> None:
    """One client opens /events 600 times: beyond its share it gets 429, and the pages of others
    receive everything."""
    served = serve("ok", MOCHI_TRUSTED_PROXIES="127.0.0.1").ready()
    submit(served, "slow", 64)
    lines = [opened_page(served, "10.9.9.9") for _ in range(600)]
    try:
        statuses = Counter(line.recv(12)[-3:] for line in lines)
        assert statuses == {b"200": STREAMS_OF_ADDRESS, b"429": 600 - STREAMS_OF_ADDRESS}
        poll(lambda: all_jobs(served), "the end of the job, on another page")
    finally:
        for line in lines:
            line.close()

    def comes_in() -> bool:
        with opened_page(served, "10.9.9.9") as line:
            return line.recv(12).endswith(b"200")

    poll(comes_in, "a seat, as the others have left")


def opened_page(served: Served, address: str) -> socket.socket:
    """/events, opened from an address that a proxy tells."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    connection.sendall(
        f"GET /events HTTP/1.1\r\nhost: x\r\nx-forwarded-for: {address}\r\n\r\n".encode()
    )
    return connection


def test_pages_that_never_read_cost_no_memory(serve: Serve, tmp_path: Path) -> None:
    """20 pages open /events and read nothing while jobs run: the server buffers nothing for them,
    and a page that does read receives everything."""
    data, long = tmp_path / "data", "slow " + "word " * 390
    jobs = records.queue_up(data, 150, long)  # they run for minutes
    served = serve("ok", MOCHI_MAX_PENDING="200").ready()
    path = address(jobs[:MOST_NAMED])  # 140 KB, when it is opened
    asyncio.run(steps_heard(served, path, 20))  # whatever a server needs once, it has by now
    before = served.memory_mib
    deaf = [deaf_listener(served.port, path) for _ in range(20)]
    try:
        asyncio.run(steps_heard(served, path, 100))
        # The system takes up to 3 MiB for each of them; the other 9 are nobody's.
        assert served.memory_mib - before < 40
    finally:
        for connection in deaf:
            connection.close()


async def steps_heard(served: Served, path: str, count: int) -> None:
    """Listen until so many events have come."""
    heard = Heard()
    async with listening(heard, served.url, path):
        await eventually(lambda: heard.events >= count, f"{count} events", 60)
