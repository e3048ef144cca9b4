"""What the endpoints of the real app take, give and refuse, by Gradio's client and plain HTTP."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import pytest

from mochi_app.store.metadata import read_metadata
from tests.serving import Refusal, Served
from tests.small_jobs import LONG, QUICK, SMALL


def test_every_endpoint_is_documented(app: Served) -> None:
    info = httpx.get(f"{app.url}/gradio_api/info").json()["named_endpoints"]
    assert set(info) == {
        "/submit_job",
        "/enhance_job",
        "/get_job_status",
        "/list_jobs",
        "/get_output_file",
        "/cancel_job",
        "/delete_job",
        "/restore_job",
        "/retry_job",
        "/star_job",
        "/generate",
    }
    assert all(endpoint["description"] for endpoint in info.values())
    submit = [item["parameter_name"] for item in info["/submit_job"]["parameters"]]
    assert submit == [
        "prompt",
        "negative_prompt",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "height",
        "width",
        "num_frames",
        "request_id",
        "schedule",
        "lora",
        "lora_scale",
    ]
    assert submit == [item["parameter_name"] for item in info["/generate"]["parameters"]]


def test_generate_streams_progress_and_returns_the_video(app: Served) -> None:
    client = app.client()
    call = client.submit(
        prompt="a red circle moving left on a blue background",
        seed=11,
        api_name="/generate",
    )
    *progress, video = list(call)
    assert [item["status"] for item in progress][-1] == "PROCESSING"
    steps = [item["step"] for item in progress]
    assert steps == sorted(steps)
    assert progress[-1]["steps"] == 8
    assert Path(video).read_bytes()[4:8] == b"ftyp"
    metadata = read_metadata(Path(video))
    assert metadata["prompt"] == "a red circle moving left on a blue background"
    assert metadata["seed"] == 11
    assert metadata["num_inference_steps"] == 8
    assert metadata["model"] == "tiny-mochi"
    assert metadata["version"]
    assert metadata["job_id"] == progress[0]["id"]


def test_preview_and_enhance_start_from_the_same_latents(app: Served) -> None:
    preview = app.ended(app.call("submit_job", prompt="a ring", seed=5, **SMALL)["id"])
    enhanced = app.ended(app.call("enhance_job", job_id=preview["id"])["id"])
    assert (preview["num_inference_steps"], enhanced["num_inference_steps"]) == (8, 64)
    assert enhanced["parent_id"] == preview["id"]
    assert enhanced["hashes"]["latents"] == preview["hashes"]["latents"]
    assert enhanced["hashes"]["frames"] != preview["hashes"]["frames"]


def test_two_runs_of_one_request_give_the_same_frames(app: Served) -> None:
    one, two = (
        app.ended(app.call("submit_job", prompt="a ring", seed=5, **QUICK)["id"]) for _ in range(2)
    )
    assert one["id"] != two["id"]
    assert one["hashes"] == two["hashes"]


def test_the_api_walk_over_plain_http(app: Served) -> None:
    job = app.call("submit_job", prompt="a quick walk", request_id="walk", **QUICK)
    assert job["status"] == "PENDING"
    assert (
        app.call("submit_job", prompt="a quick walk", request_id="walk", **QUICK)["id"]
        == (job["id"])
    )
    assert app.ended(job["id"])["status"] == "COMPLETED"
    listed = app.call("list_jobs", query="quick wal", status="COMPLETED", page_size=5)
    assert [item["id"] for item in listed["jobs"]] == [job["id"]]
    assert (listed["total"], listed["page"], listed["page_size"]) == (1, 1, 5)
    file = app.call("get_output_file", job_id=job["id"])
    assert httpx.get(file["url"]).content[4:8] == b"ftyp"
    assert app.call("star_job", job_id=job["id"])["starred"] is True
    assert app.call("star_job", job_id=job["id"], starred=False)["starred"] is False
    assert app.call("cancel_job", job_id=job["id"])["status"] == "COMPLETED"


def test_files_answer_range_and_type(app: Served) -> None:
    job = app.ended(app.call("submit_job", prompt="a file", **QUICK)["id"])
    url = f"{app.url}{job['video_url']}"
    whole = httpx.get(url)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    part = httpx.get(url, headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    assert httpx.head(url).status_code == 200
    download = httpx.get(url, params={"download": "true"})
    assert download.headers["content-disposition"].startswith("attachment")
    poster = httpx.get(f"{app.url}{job['poster_url']}")
    assert poster.headers["content-type"] == "image/webp"
    assert poster.content[8:12] == b"WEBP"


@pytest.mark.parametrize(
    "path",
    [
        "/files/nope",
        "/files/..%2f..%2fetc%2fpasswd",
        "/files/" + "0" * 14 + "-" + "0" * 16,
        "/files/" + "a" * 20_000,
        "/files/http:%2f%2f127.0.0.1%2f/poster",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=app.py",
    ],
)
def test_no_other_file_is_served(app: Served, path: str) -> None:
    answer = httpx.get(app.url + path)
    assert answer.status_code in (403, 404)
    assert b"root:" not in answer.content


BAD_SUBMITS: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", " \n\t "),
    ("prompt", "x" * 2001),
    ("prompt", "a\0b"),
    ("prompt", None),
    ("prompt", 5),
    ("negative_prompt", "x" * 2001),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 1.5),
    ("num_inference_steps", 0),
    ("num_inference_steps", 1),
    ("num_inference_steps", 10**9),
    ("num_inference_steps", "8"),
    ("guidance_scale", 21),
    ("guidance_scale", -0.1),
    ("height", 100),
    ("height", 48),
    ("width", 10**6),
    ("num_frames", 8),
    ("num_frames", 1),
    ("num_frames", 10**6 + 3),
    ("request_id", ""),
]


@pytest.mark.parametrize(("field", "value"), BAD_SUBMITS)
def test_a_bad_submit_is_refused_and_named(app: Served, field: str, value: Any) -> None:
    before = app.call("list_jobs")["total"]
    parameters = {"prompt": "a prompt"} | {field: value}
    for endpoint in ("submit_job", "generate"):
        with pytest.raises(Refusal, match=f"^{field}: got .*, expected "):
            app.call(endpoint, **parameters)
    assert app.call("list_jobs")["total"] == before


@pytest.mark.parametrize(
    ("field", "literal"),
    [
        ("num_inference_steps", "NaN"),
        ("guidance_scale", "Infinity"),
        ("prompt", '"\\ud800"'),
    ],
)
def test_what_json_should_not_carry_is_refused(app: Served, field: str, literal: str) -> None:
    prompt = "" if field == "prompt" else '"prompt": "p", '
    body = f'{{{prompt}"{field}": {literal}}}'
    base = f"{app.url}/gradio_api/call"
    posted = httpx.post(
        f"{base}/v2/submit_job", content=body, headers={"content-type": "application/json"}
    )
    assert posted.status_code == 200, posted.text
    answer = httpx.get(f"{base}/submit_job/{posted.json()['event_id']}").text
    assert "event: error" in answer
    assert f"{field}: got" in answer
    assert httpx.get(f"{app.url}/healthz").status_code == 200


def test_a_number_that_python_does_not_parse_is_a_bad_call(app: Served) -> None:
    body = f'{{"prompt": "p", "num_inference_steps": 1{"0" * 5000}}}'
    posted = httpx.post(
        f"{app.url}/gradio_api/call/v2/submit_job",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert posted.status_code == 400
    assert httpx.get(f"{app.url}/healthz").status_code == 200


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "http://127.0.0.1/x", "x" * 200_000, ""])
@pytest.mark.parametrize(
    "endpoint",
    [
        "get_job_status",
        "get_output_file",
        "enhance_job",
        "cancel_job",
        "delete_job",
        "restore_job",
        "retry_job",
        "star_job",
    ],
)
def test_a_malformed_job_id_is_refused(app: Served, endpoint: str, job_id: str) -> None:
    with pytest.raises(Refusal, match=r"^job_id: got .*, expected the id that submit_job") as error:
        app.call(endpoint, job_id=job_id)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("name", "body", "status", "told"),
    [
        ("submit_job", {"seed": 1}, 422, "prompt"),
        ("submit_job", {"prompt": "p", "cfg": 1}, 422, "cfg"),
        ("make_coffee", {}, 404, "make_coffee"),
    ],
)
def test_a_call_that_does_not_fit_is_explained(
    app: Served, name: str, body: dict[str, Any], status: int, told: str
) -> None:
    answer = httpx.post(f"{app.url}/gradio_api/call/v2/{name}", json=body)
    assert answer.status_code == status
    assert told in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("call/nope", {"data": []}),
        ("queue/join", {"data": [], "session_hash": "x", "fn_index": 10**9}),
        ("run/predict", {"data": [], "fn_index": -1}),
        (
            "component_server",
            {"data": 1, "component_id": 10**9, "session_hash": "x", "fn_name": "whoami"},
        ),
    ],
)
def test_what_is_not_there_is_no_server_error(app: Served, path: str, body: Any) -> None:
    assert httpx.post(f"{app.url}/gradio_api/{path}", json=body).status_code == 404
    assert httpx.get(f"{app.url}/?page=nope").status_code == 404


def test_the_stream_of_an_unknown_event_ends(app: Served) -> None:
    answer = httpx.get(f"{app.url}/gradio_api/call/submit_job/unknown")
    assert "event: error" in answer.text


def test_an_unknown_job_is_told_so(app: Served) -> None:
    with pytest.raises(Refusal, match="no job has the id"):
        app.call("get_job_status", job_id="0" * 14 + "-" + "0" * 16)


@pytest.mark.parametrize(("field", "value"), [("page", -1), ("page_size", 0), ("status", "DONE")])
def test_a_bad_listing_is_refused(app: Served, field: str, value: Any) -> None:
    with pytest.raises(Refusal, match=f"^{field}: got"):
        app.call("list_jobs", **{field: value})


def test_what_cannot_be_enhanced_is_told_so(app: Served) -> None:
    running = app.call("submit_job", prompt="a long one", **LONG)
    with pytest.raises(Refusal, match="expected a COMPLETED preview"):
        app.call("enhance_job", job_id=running["id"])
    app.call("cancel_job", job_id=running["id"])
    assert app.ended(running["id"])["status"] == "CANCELLED"
    with pytest.raises(Refusal, match="is CANCELLED"):
        app.call("enhance_job", job_id=running["id"])
    with pytest.raises(Refusal, match="has no video"):
        app.call("get_output_file", job_id=running["id"])


def test_a_turn_is_for_tickets_only(app: Served) -> None:
    call = f"{app.url}/gradio_api/call/engine_turn"
    event = httpx.post(call, json={"data": []}).json()["event_id"]
    answer = httpx.get(f"{call}/{event}").text
    assert "event: error" in answer
    assert "the app's own" in answer
    bypass = httpx.post(f"{app.url}/gradio_api/run/submit_job", json={"data": ["p"] + [None] * 8})
    assert bypass.status_code == 404


def test_a_client_that_leaves_changes_nothing_for_its_job(app: Served) -> None:
    blocker = app.call("submit_job", prompt="in front", **LONG)
    base = f"{app.url}/gradio_api/call"
    ids = []
    for number in range(2):
        parameters = QUICK | {"prompt": "left alone", "request_id": f"left {number}"}
        event = httpx.post(f"{base}/v2/generate", json=parameters).json()["event_id"]
        with httpx.stream("GET", f"{base}/generate/{event}") as stream:
            next(stream.iter_lines())  # and then the connection is dropped
        ids.append(app.call("submit_job", **parameters)["id"])
    app.call("cancel_job", job_id=blocker["id"])
    assert [app.ended(job_id)["status"] for job_id in ids] == ["COMPLETED"] * 2


def test_sixty_waiting_clients_do_not_starve_the_engine(app: Served) -> None:
    blocker = app.call("submit_job", prompt="in front", **LONG)
    between = [app.call("submit_job", prompt="in between", **QUICK) for _ in range(10)]

    def wait(number: int) -> str:
        return str(
            app.call("generate", prompt="everybody waits", request_id="all", **QUICK)["path"]
        )

    with concurrent.futures.ThreadPoolExecutor(60) as threads:
        waiting = [threads.submit(wait, number) for number in range(60)]
        everybody = app.call("submit_job", prompt="everybody waits", request_id="all", **QUICK)
        app.running(blocker["id"])
        app.call("cancel_job", job_id=blocker["id"])
        paths = {future.result() for future in waiting}
    assert len(paths) == 1
    assert everybody["id"] in paths.pop()
    assert [app.job(job["id"])["status"] for job in between] == ["COMPLETED"] * 10
    assert app.ended(app.call("submit_job", prompt="after", **QUICK)["id"])["status"] == "COMPLETED"
