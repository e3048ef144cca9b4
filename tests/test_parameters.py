"""Parameters: what one declaration gives, and where else a parameter's name stands."""

from __future__ import annotations

import io
import tokenize
from dataclasses import asdict, fields
from typing import Any

import gradio as gr
import pytest
from gradio.utils import get_function_description

from mochi_app import messages
from mochi_app.files import PROJECT_DIR
from mochi_app.jobs import Job
from mochi_app.parameter_types import Text
from mochi_app.parameters import (
    ASKED,
    PARAMETERS,
    REQUEST_FIELDS,
    Parameters,
    read_parameters,
)
from mochi_app.request import RequestError
from mochi_app.web.api import Api
from mochi_app.web.ui import FORM_FIELDS
from tests.plain_requests import validate

API_NAMES = [
    "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "height", "width",
    "num_frames", "request_id", "schedule", "lora", "lora_scale",
]  # fmt: skip
IN_A_VIDEO = asdict(validate(seed=5, lora="noir", lora_scale=0.5, loras=["noir"]))

# Where the names of parameters stand beside their declarations: in the code that uses them. One
# that has no use of its own, such as a new one that only the pipeline reads, adds one file.
USES = {
    "negative_prompt": {"engine/pipeline.py", "engine/text.py"},
    "lora_scale": {"engine/pipeline.py"},
}


def names_in(source: str) -> set[str]:
    """The identifiers and quoted texts of a module."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.string.strip("\"'")
        for token in tokens
        if token.type in (tokenize.NAME, tokenize.STRING)
    }


@pytest.mark.parametrize("name", USES)
def test_a_name_stands_in_its_declaration_and_where_it_is_used(name: str) -> None:
    package = PROJECT_DIR / "mochi_app"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if name in names_in(path.read_text(encoding="utf-8"))
    }
    assert found == USES[name] | {"parameters.py"}


@pytest.mark.parametrize("endpoint", ["submit_job", "generate"])
def test_the_api_takes_them_in_the_promised_order(endpoint: str) -> None:
    with gr.Blocks() as page:
        gr.api(getattr(Api, endpoint).__get__(object()), api_name=endpoint)
    described = page.get_api_info()["named_endpoints"][f"/{endpoint}"]["parameters"]
    assert [one["parameter_name"] for one in described] == API_NAMES
    assert [one["parameter_name"] for one in described if not one["parameter_has_default"]] == [
        "prompt"
    ]
    types = {one["parameter_name"]: one["python_type"]["type"] for one in described}
    assert types["prompt"] == "str"
    assert "int" in types["seed"]
    assert "float" in types["lora_scale"]
    _, helps, _ = get_function_description(getattr(Api, endpoint))
    assert {name: helps[name] for name in API_NAMES} == {
        name: declared.help for name, declared in ASKED.items()
    }


def test_jobs_messages_and_the_form_have_every_parameter() -> None:
    names = {item.name for item in fields(Parameters)}
    assert names == set(PARAMETERS)
    assert names < {item.name for item in fields(Job)}
    assert names < {item.name for item in fields(messages.Run)}
    assert set(REQUEST_FIELDS) == set(API_NAMES) - {"request_id"}
    assert set(FORM_FIELDS) == set(API_NAMES) - {"request_id"} | {"random_seed"}


def test_a_video_tells_its_parameters() -> None:
    told = {"job_id": "i", "kind": "preview"} | IN_A_VIDEO
    assert read_parameters(told) == {name: IN_A_VIDEO[name] for name in PARAMETERS}


def test_a_video_may_be_older_than_a_parameter() -> None:
    old = {name: IN_A_VIDEO[name] for name in PARAMETERS if not name.startswith("lora")}
    job = Job(**read_parameters(old), id="i", kind="preview", submitted_at=0.0)
    assert (job.lora, job.lora_scale) == (None, 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "prompt: got None"),
        ({"width": 63}, "width: got 63, expected a whole number from 64 to 8192"),
        ({"schedule": "slow"}, "schedule: got 'slow'"),
        ({"schedule": "fast", "num_inference_steps": 200}, "7 to 114 with the schedule fast"),
    ],
)
def test_what_no_server_writes_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read_parameters(IN_A_VIDEO | changes)


def test_an_unknown_parameter_is_a_mistake_of_the_code() -> None:
    with pytest.raises(TypeError, match="no such parameters: fps, speed"):
        validate(speed=2, fps=5)


def test_a_declaration_refuses_what_it_says() -> None:
    with pytest.raises(RequestError, match="a text of 0 to 3 characters"):
        Text(help="", most=3).read("title", "four")
