"""The soak's audit: it sees what was lost, made twice, or made for nobody."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests import soak
from tests.serving import Refusal
from tests.soak import REQUESTS, Crowd, Ledger, audit


class Listing:
    """A server that lists these jobs, all made, with their files."""

    url = ""

    def __init__(self, data_dir: Path, **request_ids: str | None) -> None:
        self.data_dir = data_dir
        self._jobs = [
            {"id": job_id, "status": "COMPLETED", "error": None, "video_url": "", **REQUESTS[0]}
            | {"request_id": request_id}
            for job_id, request_id in request_ids.items()
        ]
        for folder in ("videos", "posters", "withheld", "checkpoints", "scratch"):
            (data_dir / folder).mkdir()
        for job_id in request_ids:
            (data_dir / "videos" / f"{job_id}.mp4").touch()
            (data_dir / "posters" / f"{job_id}.webp").touch()

    def call(self, name: str, page: int, page_size: int) -> dict[str, Any]:
        assert name == "list_jobs"
        return {"jobs": self._jobs if page == 1 else []}

    def pids(self) -> list[int]:
        return []


@pytest.mark.parametrize(
    ("listed", "wrong"),
    [
        ({"j1": "a", "j2": "b"}, []),
        ({"j1": "a", "j2": "b", "j3": "open"}, []),  # its answer was lost: it may be made
        ({"j1": "a"}, ["j2 is lost"]),
        ({"j1": "a", "j2": "b", "j3": "a"}, ["request a is 2 jobs: j1, j3",
                                             "j3: its request a was answered with j1"]),
        ({"j1": "a", "j2": "b", "j3": "open", "j4": "open"}, ["request open is 2 jobs: j3, j4"]),
        ({"j1": "a", "j2": "b", "j3": "gone"}, ["j3: its request gone was answered with j9"]),
        ({"j1": "a", "j2": "b", "j3": "no"}, ["j3: its request no was refused"]),
        ({"j1": "a", "j2": "b", "j3": None}, ["j3: nobody asked for it"]),
        ({"j1": "a", "j2": "b", "j3": "x"}, ["j3: nobody asked for it"]),
    ],
)  # fmt: skip
def test_every_job_is_one_request_and_every_request_one_job(
    listed: dict[str, str | None], wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpx, "get", lambda url: SimpleNamespace(content=b""))
    monkeypatch.setattr(soak, "frames_hash", lambda content: "calm")
    ledger = Ledger()
    for key, answer in {"a": "j1", "b": "j2", "gone": "j9", "no": None, "open": ...}.items():
        ledger.asks(key, REQUESTS[0])
        if answer is not ...:
            ledger.answered(key, answer)
    ledger.deleted.add("j9")
    served: Any = Listing(tmp_path, **listed)
    assert audit(served, ledger, {REQUESTS[0]["seed"]: "calm"}) == wrong


def test_a_request_whose_answer_is_lost_is_made_again_under_its_id() -> None:
    lost = [
        Refusal("404: Not Found"),  # of a server that was started after the post
        Refusal("Server stopped unexpectedly."),
        Refusal("the server is stopping"),
        httpx.ReadError("gone"),
    ]
    asked = []

    def call(name: str, **parameters: Any) -> Any:
        asked.append((name, parameters))
        if lost:
            raise lost.pop()
        return {"id": "j1"}

    served: Any = SimpleNamespace(call=call)
    ledger = Ledger()
    crowd = Crowd(served, ledger, 0)
    crowd._end = SimpleNamespace(is_set=lambda: False, wait=lambda seconds: None)  # type: ignore[assignment]
    assert crowd._again("submit_job", request_id="a") == {"id": "j1"}
    assert asked == [("submit_job", {"request_id": "a"})] * 5
    assert not ledger.refused
