"""The page's Python half: what `page.js` may ask, the form's handler, what browsers are sent."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from mochi_app.callers import Caller
from mochi_app.jobs import JobStatus
from mochi_app.studio.studio import Studio
from mochi_app.web import ui
from mochi_app.web.auth import SCOPE_KEY
from tests.conftest import eventually

WEB = Path(ui.__file__).parent
SCRIPT = (WEB / "page.js").read_text(encoding="utf-8")
STYLES = (WEB / "page.css").read_text(encoding="utf-8")

MakeStudio = Callable[..., Awaitable[Studio]]


def asker(name: str = "", admin: bool = False) -> Any:
    """A request of this caller's, as `Guard` leaves it."""
    return SimpleNamespace(scope={SCOPE_KEY: Caller(name, admin)})


def calls(studio: Studio, request: Any = None) -> dict[str, Callable[[Any], Awaitable[Any]]]:
    """The server functions by the names that `page.js` uses, asked by nobody known."""
    request = request or asker()

    def asking(call: ui.Answer) -> Callable[[Any], Awaitable[Any]]:
        return lambda argument: call(argument, request)

    return {call.__name__: asking(call) for call in ui.Calls(studio).all()}


async def finished(studio: Studio, **parameters: Any) -> str:
    """The id of a job that has completed."""
    job = await studio.submit(**parameters)
    await eventually(lambda: studio.find(job.id).status is JobStatus.COMPLETED, "the video")
    return job.id


async def submit(studio: Studio, **changes: Any) -> dict[str, Any]:
    """Press Generate with the form's own values, but for `changes`."""
    form: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "",
        "random_seed": True,
        "seed": "",
        "num_inference_steps": 2,
        "guidance_scale": 3,
        "height": 64,
        "width": 64,
        "num_frames": 7,
        "schedule": "linear_quadratic",
        "lora": "",
        "lora_scale": 1,
    }
    values = [(form | changes)[name] for name in ui.FORM_FIELDS]
    return await ui.submitter(studio)(asker("anon-1"), *values)


async def test_generate_answers_with_the_job(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    outcome = await submit(studio, seed="nothing that a random seed minds")
    job = studio.find(outcome["job"]["id"])
    assert outcome["job"]["seed"] == job.seed
    assert (job.prompt, job.num_inference_steps, job.owner) == ("a red circle", 2, "anon-1")


async def test_schedule_and_lora_are_kept(make_studio: MakeStudio, tmp_path: Path) -> None:
    (tmp_path / "noir.safetensors").touch()
    studio = await make_studio(lora_dir=tmp_path)
    asked = {"schedule": "fast", "num_inference_steps": 8, "lora": "noir", "lora_scale": 0.5}
    job = (await submit(studio, **asked))["job"]
    assert (job["schedule"], job["lora"], job["lora_scale"]) == ("fast", "noir", 0.5)
    assert "noir" in (await submit(studio, lora="retro"))["error"]


async def test_a_fixed_seed_is_kept(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    outcome = await submit(studio, random_seed=False, seed=" 4294967295 ")
    assert outcome["job"]["seed"] == 2**32 - 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": "  "}, "prompt: got '  '"),
        ({"prompt": "x" * 2001}, "2001 characters"),
        ({"random_seed": False, "seed": ""}, "seed: got ''"),
        ({"random_seed": False, "seed": "4294967296"}, "seed: got 4294967296"),
        ({"random_seed": False, "seed": "1.5"}, "seed: got '1.5'"),
        ({"random_seed": False, "seed": "9" * 5000}, "seed: got '999"),
        ({"num_inference_steps": 1}, "num_inference_steps: got 1"),
        ({"num_inference_steps": None, "width": 65}, "width: got 65"),
        ({"num_frames": 8}, "num_frames: got 8"),
    ],
)
async def test_a_refusal_names_the_field_and_makes_no_job(
    make_studio: MakeStudio, changes: dict[str, Any], told: str
) -> None:
    studio = await make_studio()
    assert told in (await submit(studio, **changes))["error"]
    assert studio.list_jobs()["total"] == 0


async def test_lineage_joins_preview_and_newest_enhance(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    ask = calls(studio)
    preview = await finished(studio, prompt="a ring")
    alone = (await ask["lineage"](preview))["ok"]
    assert (alone["preview"]["id"], alone["enhance"]) == (preview, None)
    enhance = (await ask["enhance_job"](preview))["ok"]["id"]
    for asked in (preview, enhance):
        both = (await ask["lineage"](asked))["ok"]
        assert (both["preview"]["id"], both["enhance"]["id"]) == (preview, enhance)


async def test_a_retry_is_a_new_job_with_the_same_parameters(make_studio: MakeStudio) -> None:
    studio = await make_studio()
    ask = calls(studio)
    failed = await studio.submit(prompt="fail", seed=11, num_inference_steps=3)
    await eventually(lambda: studio.find(failed.id).status is JobStatus.FAILED, "the failure")
    again = (await ask["retry_job"](failed.id))["ok"]
    assert again["id"] != failed.id
    assert (again["prompt"], again["seed"], again["num_inference_steps"]) == ("fail", 11, 3)


async def test_star_and_cancel_reach_the_studio(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    ask = calls(studio)
    job = await studio.submit(prompt="waits")
    assert (await ask["star_job"]([job.id, True]))["ok"]["starred"] is True
    assert (await ask["cancel_job"](job.id))["ok"]["status"] == "CANCELLED"


async def test_every_filter_is_one_that_the_history_knows(make_studio: MakeStudio) -> None:
    studio = await make_studio(turns=False)
    await studio.submit(prompt="waits")
    totals = {}
    for name in ui.FILTERS:
        question = {"filter": name, "query": "", "page": 1, "page_size": 24}
        totals[name] = (await calls(studio)["list_jobs"](question))["ok"]["total"]
    found = {name for name, total in totals.items() if total}
    assert found == {"all", "waiting", "previews"}


@pytest.mark.parametrize("argument", [None, "", "../x", 5, [], {}, {"filter": "no"}, "0" * 10**6])
async def test_nonsense_is_refused_in_words(make_studio: MakeStudio, argument: Any) -> None:
    studio = await make_studio()
    for name, call in calls(studio).items():
        if name not in ("empty_trash", "whoami"):
            assert (await call(argument))["error"], name


async def test_handlers_take_no_place_in_the_queue_and_none_in_the_api(
    make_studio: MakeStudio,
) -> None:
    studio = await make_studio()
    with gr.Blocks() as demo:
        ui.build(studio)
    assert demo.fns
    for function in demo.fns.values():
        assert function.queue is False, function.name
        assert function.api_visibility == "private", function.name
    assert demo.get_api_info()["named_endpoints"] == {}


def test_page_and_python_agree_on_filters_and_calls() -> None:
    block = re.search(r"const FILTERS = \[(.*?)\];", SCRIPT, re.S)
    assert block
    assert re.findall(r'\["(\w+)"', block[1]) == list(ui.FILTERS)
    asked = set(re.findall(r'ask\("(\w+)"', SCRIPT))
    assert asked == {call.__name__ for call in ui.Calls(SimpleNamespace()).all()}  # type: ignore[arg-type]


def test_no_text_becomes_markup() -> None:
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in SCRIPT


def test_nothing_is_loaded_from_elsewhere() -> None:
    options = ui.page_options()
    allowed = "http://www.w3.org/2000/svg"
    everything = options["head"] + STYLES + options["theme"]._get_theme_css()
    assert set(re.findall(r"https?://[^\s\"'`)]+", everything)) <= {allowed}
    assert "@import" not in STYLES
    assert options["theme"]._stylesheets == []
    assert Path(options["favicon_path"]).is_file()
