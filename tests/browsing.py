"""The page in a real browser: where its parts are, and what people do with them."""

from __future__ import annotations

import re
import shutil
from urllib.parse import parse_qs, urlsplit

from playwright import sync_api
from playwright.sync_api import Locator, Page

from tests.serving import poll

TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"

CHROMIUM_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

PATIENCE = 30.0  # seconds; what has not come by then has failed

PROMPT = "#mochi-prompt-box textarea"

TILE = "#mochi-panel .m-tile"

CARD = "#mochi-gallery .m-card"

PROBLEM = "#mochi-form .m-problem"

SEED = "#mochi-seed input[type=text]"


def generate(page: Page, prompt: str, **settings: int) -> str:
    """Fill in the form and press the button; the new job's id, as the address shows it."""
    page.fill(PROMPT, prompt)
    if settings:
        open_settings(page)
    for label, value in settings.items():
        number = page.get_by_label(f"number input for {label}", exact=True)
        slider = page.get_by_label(f"range slider for {label}", exact=True)

        def set_it(number: Locator = number, slider: Locator = slider, value: int = value) -> bool:
            number.fill(str(value))
            page.keyboard.press("Tab")
            page.evaluate(TWO_FRAMES)
            return slider.input_value() == str(value)

        # An accordion that has just opened may still write its own value over the first one.
        poll(set_it, f"{label} to be {value}", PATIENCE)
    before = page.url
    page.click("#mochi-generate")
    page.wait_for_url(lambda url: url != before)
    return job_id(page.url)


def open_settings(page: Page) -> None:
    if not page.get_by_label("number input for Steps").is_visible():
        page.click("#mochi-settings > button")
        page.evaluate(TWO_FRAMES)


def job_id(url: str) -> str:
    return parse_qs(urlsplit(url).query)["job"][0]


def tile(page: Page, name: str) -> sync_api.Locator:
    """The tile whose heading starts with `name`."""
    return page.locator(TILE, has=page.locator("h3", has_text=re.compile(f"^{name}")))


def playing(page: Page, name: str) -> dict[str, float]:
    """Wait until the tile's video has advanced; its measures."""
    video = tile(page, name).locator("video").element_handle()
    assert video is not None
    page.wait_for_function("video => video.readyState >= 2 && video.currentTime > 0", arg=video)
    began = video.evaluate("video => video.currentTime")
    page.wait_for_function("([video, began]) => video.currentTime !== began", arg=[video, began])
    measured: dict[str, float] = video.evaluate(
        "v => ({duration: v.duration, width: v.videoWidth, height: v.videoHeight})"
    )
    return measured
