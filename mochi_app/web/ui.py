"""The page: Gradio's components for the form, the scripts of `page/` for what is live.

The form posts to `submit`. Header, panel and history are `gr.HTML` parts that `page/main.js` fills:
it follows `/events` and asks the functions of `Calls`. Every rule is the studio's; no handler here
takes a place in Gradio's queue.
"""

from __future__ import annotations

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
from mochi_app.request import (
    DEFAULT_SCHEDULE,
    MAX_GUIDANCE_SCALE,
    MAX_LORA_SCALE,
    MAX_STEPS,
    MIN_SIDE,
    MIN_STEPS,
    SIDE_MULTIPLE,
    RequestError,
    refuse,
)
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

# The form's components in the order in which Gradio hands them on.
FORM_FIELDS = (
    "prompt",
    "negative_prompt",
    "random_seed",
    "seed",
    "steps",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "schedule",
    "lora",
    "lora_scale",
)

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
    """What the page may ask (`page/server.js`). Each takes one JSON value, as Gradio's server
    functions do, and who asks."""

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
    """The handler behind Generate: its outcome, for `page/form.js`. It touches none of the form.
    Its parameters are `FORM_FIELDS`."""

    async def submit(
        prompt: Any,
        negative_prompt: Any,
        random_seed: bool,
        seed: Any,
        steps: Any,
        guidance_scale: Any,
        height: Any,
        width: Any,
        num_frames: Any,
        schedule: Any,
        lora: Any,
        lora_scale: Any,
        request: gr.Request,
    ) -> dict[str, Any]:
        try:
            job = await studio.submit(
                owner=caller_of(request).name,
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=None if random_seed else whole_number(seed),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                num_frames=num_frames,
                schedule=schedule,
                lora=lora,
                lora_scale=lora_scale,
            )
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
    defaults = studio.defaults
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="Describe the video, then Generate or Ctrl+Enter",
        lines=4,
        max_lines=10,
        elem_id="mochi-prompt-box",
    )
    examples(defaults.examples, prompt)
    with gr.Row(elem_id="mochi-seed", equal_height=True):
        seed = gr.Textbox(
            label="Seed",
            placeholder="drawn for you",
            max_lines=1,
            min_width=140,
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
        )
        random_seed = gr.Checkbox(label="New seed each time", value=True, min_width=140)
    with gr.Accordion("Settings", open=False, elem_id="mochi-settings"):
        negative_prompt = gr.Textbox(
            label="Negative prompt", placeholder="What to avoid", lines=2, max_lines=6
        )
        steps = gr.Slider(
            MIN_STEPS,
            MAX_STEPS,
            value=studio.settings.preview_steps,
            step=1,
            label="Steps",
        )
        guidance_scale = gr.Slider(
            0, MAX_GUIDANCE_SCALE, value=defaults.guidance_scale, step=0.1, label="Guidance"
        )
        with gr.Row():
            width = side("Width", defaults.width, defaults.max_width)
            height = side("Height", defaults.height, defaults.max_height)
        num_frames = gr.Slider(
            7,
            defaults.max_num_frames,
            value=defaults.num_frames,
            step=6,
            label="Frames",
            info=f"{defaults.fps} a second",
        )
        schedule = gr.Radio(
            [("Standard", "linear_quadratic"), ("Fast, for 8 steps at guidance 1.5", "fast")],
            value=DEFAULT_SCHEDULE,
            label="Schedule",
        )
        with gr.Row(visible=studio.settings.lora_dir is not None, elem_id="mochi-lora"):
            lora = gr.Dropdown(
                lora_choices(studio),
                value="",
                label="LoRA",
                allow_custom_value=True,  # one that is gone is refused by the studio, by name
                min_width=120,
            )
            lora_scale = gr.Slider(
                0, MAX_LORA_SCALE, value=1, step=0.05, label="LoRA scale", min_width=120
            )
        if studio.settings.lora_dir is not None:  # files come and go: look again with each page
            gr.on(None, lambda: gr.Dropdown(lora_choices(studio)), None, lora, **UNQUEUED)
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "random_seed": random_seed,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "schedule": schedule,
        "lora": lora,
        "lora_scale": lora_scale,
    }


def lora_choices(studio: Studio) -> list[tuple[str, str]]:
    """Label and name of each LoRA, and of none."""
    return [("None", ""), *((name, name) for name in lora_names(studio.settings.lora_dir))]


def side(label: str, value: int, most: int) -> gr.Slider:
    """A slider over the sizes that Mochi takes, in pixels."""
    return gr.Slider(MIN_SIDE, most, value=value, step=SIDE_MULTIPLE, label=label, min_width=120)


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
