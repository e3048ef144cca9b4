"""The page in a real browser against the real app: `pytest -m browser`.

One server with the embedded model serves all tests; each test has a browser context of its own,
which must make no request to anywhere else and leave no error on the console.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright import sync_api
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect

from mochi_app import accounts
from tests.browsing import (
    CARD,
    CHROMIUM,
    CHROMIUM_ARGS,
    PATIENCE,
    PROBLEM,
    PROMPT,
    SEED,
    TILE,
    generate,
    job_id,
    playing,
    tile,
)
from tests.serving import Served, poll

# Gradio gives what an accordion shows its values in the frame after it has opened.

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not Path(CHROMIUM).exists() and "CI" not in os.environ, reason="needs Debian's chromium"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real app, on a free port with an empty data folder."""
    served = Served(tmp_path_factory.mktemp("browser") / "data").start().ready()
    yield f"{served.url}/"
    served.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_ARGS))
        yield launched
        launched.close()


@dataclass
class Watch:
    """What the pages of a test did that they must not do."""

    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()  # parts of console errors that a test provokes

    def follow(self, context: BrowserContext) -> None:
        context.on("request", lambda request: self._see(request.url))
        context.on("console", lambda message: self._hear(message.type, message.text))
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def _see(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.foreign.append(url)

    def _hear(self, kind: str, text: str) -> None:
        if kind == "error" and not any(part in text for part in self.expected):
            self.errors.append(text)


@pytest.fixture
def watch() -> Iterator[Watch]:
    watching = Watch()
    yield watching
    assert watching.foreign == []
    assert watching.errors == []


Open = Callable[..., Page]


@pytest.fixture
def open_page(server: str, browser: Browser, watch: Watch) -> Iterator[Open]:
    """`open_page(address, **context options)`: the page in a fresh context, once it is there."""
    contexts: list[BrowserContext] = []

    def open_one(address: str = "", **options: Any) -> Page:
        options.setdefault("viewport", {"width": 1280, "height": 900})
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE * 1000)
        watch.follow(context)
        contexts.append(context)
        page = context.new_page()
        page.goto(address or server)
        page.wait_for_selector("#mochi-gallery .m-gallery")
        expect(page.locator("#mochi-status")).not_to_contain_text("Connecting")
        return page

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture(autouse=True)
def patience() -> None:
    expect.set_options(timeout=PATIENCE * 1000)


def test_from_prompt_to_comparison_and_back(server: str, open_page: Open) -> None:
    page = open_page()
    expect(page.locator(PROMPT)).to_be_focused()
    page.keyboard.type("a red circle that only this test asks for")
    page.keyboard.press("Control+Enter")
    doing = re.compile(r"step [1-8] of 8|Decoding")  # the steps take a moment
    expect(page.locator(f"{TILE} .m-stage")).to_have_text(doing)
    preview_id = job_id(page.url)
    expect(page.locator("#mochi-panel .m-prompt")).to_have_text(
        "a red circle that only this test asks for"
    )
    video = playing(page, "Preview")
    assert video["width"] == video["height"] == 96
    assert 31 / 12 - 0.2 < video["duration"] < 31 / 12 + 0.2
    seed = page.locator(SEED).input_value()
    expect(tile(page, "Preview").locator(".m-facts")).to_contain_text(f"Seed{seed}")

    page.locator("[data-action=enhance]").click()
    enhanced = tile(page, "Enhanced · 64 steps")
    expect(enhanced.locator(".m-stage")).to_have_text(re.compile(r"step \d+ of 64"))
    expect(enhanced.locator(".m-live")).to_be_visible()
    assert playing(page, "Enhanced")["width"] == 96
    assert playing(page, "Preview")["width"] == 96
    expect(enhanced.locator(".m-facts")).to_contain_text(f"Seed{seed}")
    left, right = (tile(page, name).bounding_box() for name in ("Preview", "Enhanced"))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    page.wait_for_function(
        "() => { const [a, b] = document.querySelectorAll('#mochi-panel video');"
        " return !a.paused && !b.paused && Math.abs(a.currentTime - b.currentTime) < 0.2 }"
    )

    page.reload()
    assert job_id(page.url) == preview_id
    assert playing(page, "Preview")["width"] == 96
    assert playing(page, "Enhanced")["width"] == 96
    expect(page.locator(f"{CARD} .m-chip-enhanced")).to_have_count(1)
    page.fill("#mochi-search", "circle only")
    expect(page.locator(CARD)).to_have_count(2)
    page.fill("#mochi-search", "nobody asked for this")
    expect(page.locator(CARD)).to_have_count(0)
    expect(page.locator(".m-none")).to_have_text("No prompt has these words.")
    page.fill("#mochi-search", "")
    page.select_option("#mochi-filter", "enhanced")
    expect(page.locator(CARD)).to_have_count(1)

    other = open_page(f"{server}?job={preview_id}")
    assert playing(other, "Preview")["width"] == 96
    assert playing(other, "Enhanced")["width"] == 96


def test_a_running_job_is_seen_from_elsewhere_and_stopped(server: str, open_page: Open) -> None:
    page = open_page()
    running = generate(page, "a job that takes long", Steps=512)
    expect(page.locator(f"{TILE} .m-stage")).to_have_text(re.compile(r"step \d+ of 512"))
    waiting = generate(page, "a job that waits behind it", Steps=512)
    assert waiting != running
    expect(page.locator(f"{TILE} .m-stage")).to_have_text("Place 1 in the queue")
    expect(page.locator("#mochi-status")).to_contain_text("1 running · 1 waiting")

    other = open_page(f"{server}?job={running}")
    expect(other.locator(f"{TILE} .m-stage")).to_have_text(re.compile(r"step \d+ of 512"))
    expect(other.locator("[data-action=stop]")).to_be_disabled()  # another browser's
    page.locator("[data-action=stop]").click()
    expect(tile(page, "Preview").locator(".m-badge")).to_have_text("Stopped")
    tab = page.context.new_page()
    tab.goto(f"{server}?job={running}")
    tab.locator("[data-action=stop]").click()
    expect(tile(tab, "Preview").locator(".m-badge")).to_have_text("Stopped")
    expect(tile(other, "Preview").locator(".m-badge")).to_have_text("Stopped")
    expect(other.locator("[data-action=retry]")).to_be_visible()
    expect(other.locator("#mochi-status")).to_contain_text("0 running · 0 waiting")


def test_star_delete_undo_trash_and_restore(open_page: Open) -> None:
    page = open_page()
    generate(page, "a blue square to throw away", Steps=2)
    playing(page, "Preview")
    page.locator("[data-action=star]").click()
    expect(page.locator("[data-action=star]")).to_have_text("Unstar")
    page.locator("[data-action=delete]").click()
    expect(page.locator(".m-undo")).to_contain_text("Preview moved to the trash.")
    expect(page.locator("[data-action=undo]")).to_be_focused()
    mine = page.locator(CARD, has_text="a blue square to throw away")
    expect(mine).to_have_count(0)
    page.keyboard.press("Enter")
    playing(page, "Preview")
    expect(mine).to_have_count(1)

    page.locator("[data-action=delete]").click()
    expect(mine).to_have_count(0)
    page.select_option("#mochi-filter", "trash")
    expect(mine).to_have_count(1)
    mine.get_by_role("button", name="Restore").click()
    expect(mine).to_have_count(0)
    page.select_option("#mochi-filter", "starred")
    expect(mine).to_have_count(1)
    mine.locator("a").click()
    page.locator("[data-action=delete]").click()
    page.select_option("#mochi-filter", "trash")
    expect(mine).to_have_count(1)
    page.locator("[data-action=empty-trash]").click()
    page.get_by_role("button", name="Keep them").click()
    expect(mine).to_have_count(1)
    page.locator("[data-action=empty-trash]").click()
    page.get_by_role("button", name="Delete for good").click()
    expect(page.locator(".m-none")).to_have_text("The trash is empty.")


def test_markup_and_marks_in_a_prompt_stay_text(open_page: Open) -> None:
    prompt = (
        '<img src=x onerror="window.harmed=1"> \u202eright to left\u202c <b>bold</b> שלום'
        " **bold** [link](javascript:alert(1)) \x1b[31mred"
    )
    page = open_page()
    generate(page, prompt, Steps=2)
    playing(page, "Preview")
    assert page.locator("#mochi-panel .m-prompt").text_content() == prompt
    card = page.locator(CARD).first
    expect(card.locator("a")).to_have_attribute("aria-current", "true")
    assert card.locator(".m-card-prompt").text_content() == prompt
    assert page.evaluate("window.harmed") is None
    marks = ":is(#mochi-panel, #mochi-gallery) :is(b, strong, img[src=x], a[href^=javascript])"
    assert page.locator(marks).count() == 0


def refused(page: Page, told: str) -> None:
    """Click Generate, and see the refusal. Gradio drops a click that comes before it is done with
    the one before, so there may have to be another."""
    for _ in range(9):
        page.click("#mochi-generate")
        with contextlib.suppress(AssertionError):
            expect(page.locator(PROBLEM)).to_contain_text(told, timeout=3000)
            return
    expect(page.locator(PROBLEM)).to_contain_text(told)


def test_a_refusal_is_told_and_nothing_typed_is_lost(open_page: Open) -> None:
    page = open_page()
    refused(page, "prompt")
    page.fill(PROMPT, long := "<i>w</i> " * 300)
    refused(page, "2000 characters")
    assert page.locator(f"{PROBLEM} i").count() == 0
    assert page.locator(PROMPT).input_value() == long
    page.fill(PROMPT, "short")
    page.fill(SEED, "4294967296")
    expect(page.get_by_label("New seed each time")).not_to_be_checked()
    refused(page, "seed: got 4294967296")
    assert page.locator(PROMPT).input_value() == "short"
    assert page.locator(SEED).input_value() == "4294967296"
    assert "job=" not in page.url


def test_use_again_and_a_pinned_seed(open_page: Open) -> None:
    page = open_page()
    page.fill(PROMPT, "again and again")
    page.fill(SEED, "4242")
    generate(page, "again and again", Steps=3)
    playing(page, "Preview")
    page.reload()
    playing(page, "Preview")
    page.locator("[data-action=reuse]").click()
    expect(page.locator(PROMPT)).to_have_value("again and again")
    expect(page.locator(SEED)).to_have_value("4242")
    first = page.url
    page.click("#mochi-generate")
    page.wait_for_url(lambda url: url != first)
    facts = tile(page, "Preview · 3 steps").locator(".m-facts")
    expect(facts).to_contain_text("Seed4242")


def streams(page: Page) -> list[str]:
    """Fill the list with what each stream of events asks for, as they are opened."""
    opened: list[str] = []

    def note(request: Request) -> None:
        if "/events?" in request.url:
            opened.append(request.url)

    page.on("request", note)
    return opened


def asked(page: Page, opened: list[str], *parts: str) -> bool:
    """Whether the newest stream asks for all of these."""
    page.evaluate("1")  # lets what has happened meanwhile be heard of
    return all(part in opened[-1] for part in parts)


def test_the_page_hears_of_the_jobs_it_shows_and_of_what_others_do(
    server: str, open_page: Open
) -> None:
    page, others = open_page(), open_page()
    opened = streams(page)
    shown = generate(page, "shown beside what others ask for", Steps=2)
    playing(page, "Preview")
    generate(others, "a long one of somebody else", Steps=512)
    batch = [generate(others, f"number {number} of a batch", Steps=4) for number in range(3)]
    expect(page.locator("#mochi-status")).to_contain_text("1 running · 3 waiting")
    cards = [page.locator(f"{CARD}[data-job='{job}']") for job in batch]
    for place, card in enumerate(cards, start=1):
        expect(card.locator(".m-placeholder")).to_have_text(f"Place {place} in the queue")
    poll(lambda: asked(page, opened, shown, *batch), "a stream that names them")
    others.goto(f"{server}?job={shown}")
    others.locator("[data-action=enhance]").click()
    expect(tile(page, "Enhanced").locator(".m-badge")).to_have_text("Waiting")
    others.locator("[data-action=stop]").click()
    expect(tile(page, "Enhanced").locator(".m-badge")).to_have_text("Stopped")
    others.select_option("#mochi-filter", "running")
    others.locator(f"{CARD} a").first.click()
    expect(others.locator("[data-action=stop]")).to_be_enabled()
    others.locator("[data-action=stop]").click()
    for card in cards:
        expect(card).to_have_attribute("data-status", "completed")
        expect(card.locator("img")).to_be_visible()


def test_a_hidden_tab_looks_now_and_then(open_page: Open) -> None:
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page = open_page()
    opened = streams(page)
    generate(page, "watched, then left alone", Steps=512)
    expect(page.locator(f"{TILE} .m-stage")).to_have_text(re.compile(r"step \d+ of 512"))
    page.evaluate(hide, True)
    poll(lambda: asked(page, opened, "hidden=true"), "a look")
    looks = len(opened)
    assert "pictures" not in opened[-1]
    expect(page.locator("#mochi-status")).to_contain_text("1 running")
    poll(lambda: asked(page, opened, "hidden=true") and len(opened) > looks, "another look", 40)
    page.evaluate(hide, False)
    expect(page.locator(f"{TILE} .m-stage")).to_have_text(re.compile(r"step \d+ of 512"))
    assert asked(page, opened, "pictures=")
    page.locator("[data-action=stop]").click()
    expect(tile(page, "Preview").locator(".m-badge")).to_have_text("Stopped")
    visible = len(opened)
    page.evaluate(hide, True)
    page.evaluate(hide, False)
    poll(lambda: asked(page, opened, "jobs=") and len(opened) > visible, "the stream again")
    assert all("hidden" not in url for url in opened[visible:]), "nothing is waited for"


@pytest.mark.parametrize("unknown", ["00000000000000-0000000000000000", "../x", "<b>"])
def test_an_unknown_job_leaves_the_page_usable(server: str, open_page: Open, unknown: str) -> None:
    page = open_page(f"{server}?job={unknown}")
    expect(page.locator("#mochi-panel .m-problem")).to_contain_text("This video is not here")
    page.locator(".m-example").first.click()
    expect(page.locator(PROMPT)).not_to_have_value("")
    expect(page.locator("#mochi-generate")).to_be_enabled()


def test_a_lost_connection_is_told_and_mended(open_page: Open, watch: Watch) -> None:
    watch.expected = ("ERR_FAILED", "net::")
    page = open_page()
    expect(page.locator("#mochi-status")).to_contain_text("Ready")
    page.route("**/events?*", lambda route: route.abort())
    page.evaluate("Mochi.reconnect()")
    expect(page.locator("#mochi-status")).to_contain_text("Connection to the server lost")
    page.unroute("**/events?*")
    expect(page.locator("#mochi-status")).to_contain_text("Ready")


def hold(context: BrowserContext, pattern: str) -> list[sync_api.Route]:
    """What a context's pages ask for of these addresses, each held until it is continued."""
    held: list[sync_api.Route] = []
    context.route(pattern, lambda route: held.append(route))
    return held


def test_the_scripts_may_come_after_gradio_has_made_the_parts(
    server: str, browser: Browser, watch: Watch
) -> None:
    context = browser.new_context()
    watch.follow(context)
    context.add_init_script("window.mochiQueue = window.calls = []")
    held = hold(context, "**/page/*/main.js")
    page = context.new_page()
    page.goto(server)
    page.wait_for_function("calls.length === 4")
    expect(page.locator(".m-header")).to_have_count(0)
    for route in held:
        route.continue_()
    expect(page.locator("#mochi-status")).to_contain_text("Ready")
    preview = generate(page, "a page whose scripts come late", Steps=2)
    playing(page, "Preview")

    opened = streams(page)
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.post_data or ""))
    page.evaluate("calls.forEach((call) => call(Mochi))")  # Gradio makes its parts once more
    playing(page, "Preview")
    expect(page.locator(".m-gallery")).to_have_count(1)
    expect(page.locator(f"{CARD}[data-job='{preview}'] a")).to_have_attribute(
        "aria-current", "true"
    )
    page.locator("[data-action=reuse]").click()
    expect(page.locator(PROMPT)).to_have_value("a page whose scripts come late")
    assert opened == []
    assert any("list_jobs" in call for call in calls)
    assert not any("whoami" in call for call in calls), "it has started twice"
    context.close()


def test_the_scripts_may_come_before_gradio_has_made_the_parts(
    server: str, browser: Browser, watch: Watch
) -> None:
    context = browser.new_context()
    watch.follow(context)
    held = hold(context, "**/assets/HTML-*.js")
    page = context.new_page()
    page.goto(server)
    page.wait_for_function("window.Mochi")
    poll(lambda: page.evaluate("1") and held, "a part that is waited for")
    for route in held:
        route.continue_()
    expect(page.locator("#mochi-status")).to_contain_text("Ready")
    expect(page.locator("#mochi-gallery .m-gallery")).to_be_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_pages_do_not_scroll_sideways(open_page: Open, scheme: str) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.locator("#mochi-gallery .m-gallery").scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")


def test_logging_in_and_whose_job_it_is(tmp_path: Path, browser: Browser, watch: Watch) -> None:
    watch.expected = ("401",)  # a wrong password, and the look of a page that is logged out
    people = tmp_path / "accounts"
    for name in ("ann", "bob"):
        accounts.add(people, name, f"{name}'s password", admin=False)
    program = ("-m", "tests.faults.server", "ok")
    served = Served(tmp_path / "data", program=program, MOCHI_AUTH_FILE=str(people)).start()
    contexts: list[BrowserContext] = []

    def enter(name: str, password: str, job: str = "") -> Page:
        contexts.append(browser.new_context())
        contexts[-1].set_default_timeout(PATIENCE * 1000)
        watch.follow(contexts[-1])
        page = contexts[-1].new_page()
        page.goto(f"{served.url}/{job}")
        page.fill("[name=username]", name)
        page.fill("[name=password]", password)
        page.click("button")
        return page

    try:
        page = enter("ann", "a guess")
        expect(page.locator("[role=alert]")).to_have_text("name or password is wrong")
        page.fill("[name=username]", "ann")
        page.fill("[name=password]", "ann's password")
        page.click("button")
        expect(page.locator(".m-who")).to_have_text("ann")
        job = generate(page, "slow", Steps=512)
        expect(tile(page, "Preview").locator(".m-facts")).to_contain_text("Byann")
        other = enter("bob", "bob's password", f"?job={job}")
        stop = other.locator("[data-action=stop]")
        expect(stop).to_be_disabled()
        expect(stop).to_have_attribute("title", "Only ann or an admin can do this")
        expect(other.locator(f"{CARD} .m-card-when").first).to_contain_text("ann")
        page.locator("[data-action=stop]").click()
        expect(tile(other, "Preview").locator(".m-badge")).to_have_text("Stopped")
        accounts.remove(people, "bob")
        other.evaluate("Mochi.reconnect()")
        expect(other.locator("#mochi-status")).to_contain_text("You are logged out")
        page.get_by_role("button", name="Log out").click()
        expect(page.locator("[name=username]")).to_be_visible()
    finally:
        for context in contexts:
            context.close()
        served.end()
