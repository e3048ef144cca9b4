"""The page: Gradio's components for the form, the scripts of `page/` for what is live.

The form posts to `submit`. Header, panel and history are `gr.HTML` parts that `page/main.js` fills:
it follows `/events` and asks the functions of `Calls`. Every rule is the studio's; no handler here
takes a place in Gradio's queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_app.callers import Caller
from mochi_app.errors import HistoryError
from mochi_app.jobs import JobStatus
from mochi_app.loras import lora_names
from mochi_app.parameter_types import Choice, Integer, LoraName, Number, Offer, Parameter, Text
from mochi_app.parameters import PARAMETERS, Parameters
from mochi_app.request import RequestError, refuse
from mochi_app.studio.studio import Studio
from mochi_app.web.auth import caller_of
from mochi_app.web.page_files import PAGE_FILES
from mochi_app.web.theme import theme

HERE = Path(__file__).parent

FILTERS: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "running": {"status": JobStatus.PROCESSING},
    "waiting": {"status": JobStatus.PENDING, "held": False},
    "held": {"held": True},
    "completed": {"status": JobStatus.COMPLETED},
    "failed": {"status": JobStatus.FAILED},
    "stopped": {"status": JobStatus.CANCELLED},
    "starred": {"starred": True},
    "previews": {"kind": "preview"},
    "enhanced": {"kind": "enhance"},
    "trash": {"deleted": True},
}

# Every handler of the page: no place in the queue, no entry in the API.
UNQUEUED: Mapping[str, Any] = {
    "queue": False,
    "api_visibility": "private",
    "show_progress": "hidden",
}

RANDOM_SEED = "random_seed"  # the form's own: whether each Generate draws a seed
# What the form sends and is filled with, in this order.
FORM_FIELDS = (RANDOM_SEED, *(name for name, declared in PARAMETERS.items() if declared.label))

Call = Callable[[Any, Caller], Awaitable[Any]]
Answer = Callable[[Any, gr.Request], Awaitable[dict[str, Any]]]


def answering(call: Call) -> Answer:
    """`call` as `page/server.js` hears it: `{"ok": …}`, or `{"error": …}` when it is refused."""

    async def answer(argument: Any, request: gr.Request) -> dict[str, Any]:
        try:
            return {"ok": await call(argument, caller_of(request))}
        except (RequestError, HistoryError) as error:
            return {"error": str(error)}

    answer.__name__ = call.__name__  # Gradio offers it to the page under its name
    return answer


class Calls:
    """What the page's scripts may ask. Each takes one JSON value, as Gradio's server functions do,
    and the caller."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def all(self) -> list[Answer]:
        """Every call, ready for `gr.HTML(server_functions=…)`."""
        calls: list[Call] = [
            self.whoami,
            self.lineage,
            self.list_jobs,
            self.enhance_job,
            self.retry_job,
            self.cancel_job,
            self.star_job,
            self.delete_job,
            self.restore_job,
            self.empty_trash,
        ]
        return [answering(call) for call in calls]

    async def whoami(self, _: Any, by: Caller) -> dict[str, Any]:
        """The caller's `name`, whether it is an `admin`, and whether there is a `login` at all."""
        return {"name": by.name, "admin": by.admin, "login": not by.anonymous}

    async def lineage(self, job_id: Any, _: Caller) -> dict[str, Any]:
        """The job with its preview or its newest enhance, whichever are there."""
        return self._studio.lineage(job_id)

    async def list_jobs(self, question: Any, _: Caller) -> dict[str, Any]:
        """A page of the history: `filter`, `query`, `page`, `page_size`; and the state of the
        listings, `listed` and `marked`, as `/events` counts it."""
        if not isinstance(question, dict) or str(question.get("filter")) not in FILTERS:
            raise refuse("filter", question, "one of " + ", ".join(FILTERS))
        found = self._studio.list_jobs(
            query=question.get("query"),
            page=question.get("page"),
            page_size=question.get("page_size"),
            **FILTERS[str(question["filter"])],
        )
        return found | asdict(self._studio.history.revisions)

    async def enhance_job(self, job_id: Any, by: Caller) -> dict[str, Any]:
        """The many-step version of a finished preview."""
        return self._studio.view(await self._studio.enhance(job_id, owner=by.name))

    async def retry_job(self, job_id: Any, by: Caller) -> dict[str, Any]:
        """A held job once more, or a new one in place of one that has failed or was stopped."""
        return self._studio.view(await self._studio.retry(job_id, by=by))

    async def cancel_job(self, job_id: Any, by: Caller) -> dict[str, Any]:
        """Stop a job."""
        return self._studio.view(await self._studio.cancel(job_id, by=by))

    async def star_job(self, question: Any, _: Caller) -> dict[str, Any]:
        """Star a job or not: `[job_id, starred]`."""
        if not isinstance(question, list) or len(question) != 2:
            raise refuse("star_job", question, "a job's id, and true or false")
        return self._studio.view(await self._studio.star(*question))

    async def delete_job(self, job_id: Any, by: Caller) -> dict[str, Any]:
        """Put a job into the trash."""
        return self._studio.view(await self._studio.delete(job_id, by=by))

    async def restore_job(self, job_id: Any, by: Caller) -> dict[str, Any]:
        """Take a job out of the trash."""
        return self._studio.view(await self._studio.restore(job_id, by=by))

    async def empty_trash(self, _: Any, by: Caller) -> int:
        """Remove every deleted job for good; how many."""
        return await self._studio.empty_trash(by=by)


def submitter(studio: Studio) -> Callable[..., Awaitable[dict[str, Any]]]:
    """The handler behind Generate: its outcome, for `page/form.js`. It touches none of the form."""

    async def submit(request: gr.Request, *values: Any) -> dict[str, Any]:
        given = dict(zip(FORM_FIELDS, values, strict=True))
        drawn = given.pop(RANDOM_SEED)
        given["seed"] = None if drawn else whole_number(given["seed"])
        try:
            job = await studio.submit(owner=caller_of(request).name, **given)
        except (RequestError, HistoryError) as error:
            return {"error": str(error)}
        return {"job": studio.view(job)}

    return submit


def whole_number(text: Any) -> Any:
    """The number that was typed; anything else as it is, for the studio to refuse."""
    digits = isinstance(text, str) and text.strip().isdecimal() and len(text) < 20
    return int(text) if digits else text


def live_part(name: str, events: tuple[str, ...] = (), **options: Any) -> gr.HTML:
    """A place on the page that `page/main.js` fills, now or as soon as it has come. The part can
    trigger `events`, which are then listeners of the component: Gradio takes their names from the
    script."""
    triggers = ", ".join(f"{event}: () => trigger('{event}')" for event in events)
    part = f"{{element, server, props, events: {{{triggers}}}}}"
    return gr.HTML(
        html_template="",
        js_on_load=page_call(f"page.attach({json.dumps(name)}, {part})"),
        apply_default_css=False,
        elem_id=f"mochi-{name}",
        elem_classes="m-part",
        **options,
    )


def page_call(call: str) -> str:
    """A script that calls `page` of `page/main.js`, which may not be there yet."""
    return f"(window.mochiQueue ??= []).push((page) => {call})"


def build(studio: Studio) -> None:
    """Lay out the page; inside a `gr.Blocks` context."""
    live_part("header")
    if studio.defaults.notice:
        gr.HTML(
            studio.defaults.notice,
            html_template="<p class='m-notice' role='note'>{{value}}</p>",
            js_on_load=None,
            apply_default_css=False,
            elem_classes="m-part",
        )
    with gr.Row(elem_id="mochi-work"):
        with gr.Column(scale=2, min_width=320, elem_id="mochi-ask"):
            fields = form(studio)
            values = live_part("form", events=("drawn", "reuse"), fields=FORM_FIELDS)
            generate = gr.Button("Generate", variant="primary", size="lg", elem_id="mochi-generate")
        with gr.Column(scale=3, min_width=320):
            live_part(
                "panel",
                server_functions=Calls(studio).all(),
                enhance_steps=studio.settings.enhance_steps,
                details=details(),
            )
    live_part("gallery")
    inputs = [fields[name] for name in FORM_FIELDS]
    outcome = gr.JSON(visible=False)
    submitted = f"(outcome) => {{ {page_call('page.submitted(outcome)')} }}"
    generate.click(submitter(studio), inputs, outcome, **UNQUEUED).then(
        None, [outcome], None, js=submitted, **UNQUEUED
    )
    values.drawn(None, None, fields["seed"], js="() => window.Mochi.drawn()", **UNQUEUED)
    values.reuse(None, None, inputs, js="() => window.Mochi.reused()", **UNQUEUED)


def form(studio: Studio) -> dict[str, Any]:
    """The form's components by the names of `FORM_FIELDS`."""
    offer = Offer(studio.defaults, studio.settings.preview_steps)
    prompt = gr.Textbox(
        label=PARAMETERS["prompt"].label,
        placeholder="Describe the video, then Generate or Ctrl+Enter",
        lines=4,
        max_lines=10,
        elem_id="mochi-prompt-box",
    )
    examples(studio.defaults.examples, prompt)
    with gr.Row(elem_id="mochi-seed", equal_height=True):
        seed = gr.Textbox(
            label=PARAMETERS["seed"].label,
            placeholder="drawn for you",
            max_lines=1,
            min_width=140,
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
        )
        random_seed = gr.Checkbox(label="New seed each time", value=True, min_width=140)
    made = {"prompt": prompt, "seed": seed, RANDOM_SEED: random_seed}
    rest = [name for name in FORM_FIELDS if name not in made]
    with gr.Accordion("Settings", open=False, elem_id="mochi-settings"):
        for row, names in itertools.groupby(rest, lambda name: PARAMETERS[name].row):
            with contextlib.ExitStack() as stack:
                if row:
                    visible = row != "lora" or studio.settings.lora_dir is not None
                    stack.enter_context(gr.Row(elem_id=f"mochi-{row}", visible=visible))
                for name in names:
                    made[name] = field(name, PARAMETERS[name], offer, studio.settings.lora_dir)
        if studio.settings.lora_dir is not None:  # files come and go: look again with each page
            choices = functools.partial(lora_choices, studio.settings.lora_dir)
            gr.on(None, lambda: gr.Dropdown(choices()), None, made["lora"], **UNQUEUED)
    return made


def field(name: str, declared: Parameter, offer: Offer, lora_dir: Path | None) -> Any:
    """The component by which a parameter is set, with what it is when it is omitted."""
    common: dict[str, Any] = {
        "value": declared.omitted(offer) if declared.omitted else None,
        "label": declared.label,
        "info": declared.info(offer) if declared.info else None,
    }
    if declared.row:
        common["min_width"] = 120
    match declared:
        case Integer(least=least, multiple=multiple):
            return gr.Slider(least, declared.most(offer), step=multiple, **common)
        case Number(least=least, most=most, step=step):
            return gr.Slider(least, most, step=step, **common)
        case Choice(options=options):
            return gr.Radio([(label, value) for value, label in options.items()], **common)
        case LoraName():  # a name that is gone is refused by the studio, which says so
            common["value"] = ""
            return gr.Dropdown(lora_choices(lora_dir), allow_custom_value=True, **common)
        case Text():
            return gr.Textbox(lines=2, max_lines=6, placeholder=declared.help.rstrip("."), **common)
    raise TypeError(f"{name}: the form has no component for a {type(declared).__name__}")


def details() -> list[dict[str, Any]]:
    """The parameters that a job's details name: `name`, `label`, and the `usual` value with which
    they do not; None if they always do."""
    return [
        {"name": item.name, "label": PARAMETERS[item.name].label, "usual": usual}
        for item in dataclasses.fields(Parameters)
        for usual in [item.default if PARAMETERS[item.name].detail == "changed" else None]
        if PARAMETERS[item.name].detail
    ]


def lora_choices(lora_dir: Path | None) -> list[tuple[str, str]]:
    """Label and name of each LoRA, and of none."""
    return [("None", ""), *((name, name) for name in lora_names(lora_dir))]


def examples(prompts: tuple[str, ...], prompt: gr.Textbox) -> None:
    """Example prompts as chips; a click puts one into the prompt."""
    with gr.Row(elem_id="mochi-examples"):
        for example in prompts:
            chip = gr.Button(example, size="sm", elem_classes="m-example", min_width=0)
            chip.click(None, None, prompt, js=f"() => {json.dumps(example)}", **UNQUEUED)


def page_options() -> dict[str, Any]:
    """Keyword arguments for `gr.mount_gradio_app`: theme, styles, scripts, icon."""
    return {
        "theme": theme(),
        "css_paths": [HERE / "page.css"],
        "head": PAGE_FILES.head,
        "favicon_path": str(HERE / "favicon.png"),
    }
