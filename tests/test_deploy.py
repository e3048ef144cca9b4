"""The page through real proxies, in a real browser, as `deploy/` and `docs/operations.md` tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from gradio_client import Client
from playwright import sync_api
from playwright.sync_api import Browser, expect

from mochi_app import accounts
from mochi_app.files import PROJECT_DIR
from tests import proxies
from tests.browsing import CHROMIUM, CHROMIUM_ARGS, PROMPT, generate, playing
from tests.proxies import CADDY, NGINX, PREFIX, needs
from tests.serving import DEADLINE, Served, free_port

pytestmark = [pytest.mark.browser, needs(CHROMIUM)]

OPERATIONS = PROJECT_DIR / "docs" / "operations.md"

Studio = Callable[[str], Served]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser to which `gpubox` and `evil` are names of this machine."""
    names = "--host-resolver-rules=MAP gpubox 127.0.0.1, MAP evil 127.0.0.1"
    with sync_api.sync_playwright() as playwright:
        args = [*CHROMIUM_ARGS, names]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """`studio(prefix)`: the app for that GRADIO_ROOT_PATH, over a faked model."""
    started: dict[str, Served] = {}

    def start(prefix: str) -> Served:
        if prefix not in started:
            served = Served(
                tmp_path_factory.mktemp("deploy") / "data",
                program=("-m", "tests.faults.server", "ok"),
                GRADIO_ROOT_PATH=prefix,
                MOCHI_TRUSTED_PROXIES="127.0.0.1",
            )
            started[prefix] = served
            served.start().ready()
        return started[prefix]

    yield start
    for served in started.values():
        served.end()


@pytest.fixture(autouse=True)
def patience() -> None:
    expect.set_options(timeout=DEADLINE * 1000)


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    """Where a test leaves what must end with it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proxies.certificate(tmp_path_factory.mktemp("certificate"))


def makes_a_video(browser: Browser, url: str) -> None:
    """The page at this address loads, takes a prompt and plays the video; all it asks for is there,
    and nothing of it anywhere else."""
    context = browser.new_context(ignore_https_errors=True)
    context.set_default_timeout(DEADLINE * 1000)
    elsewhere: list[str] = []
    refused: list[str] = []

    def see(response: sync_api.Response) -> None:
        if not response.url.startswith(url):
            elsewhere.append(response.url)
        elif response.status >= 400:
            refused.append(f"{response.status} {response.url}")

    context.on("response", see)
    try:
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#mochi-status")).to_contain_text("Ready")
        expect(page.locator(".m-gate")).to_be_hidden()
        generate(page, "slow through the proxy", Steps=40)
        expect(page.locator("#mochi-panel .m-stage")).to_have_text(re.compile(r"step \d+ of 40"))
        assert playing(page, "Preview")["width"] == 96
        icon = page.locator("link[rel~=icon]").evaluate("link => link.href")
        assert icon == f"{url}favicon.ico"
        fetched = "async url => (await fetch(url)).headers.get('content-type')"
        assert page.evaluate(fetched, icon) == "image/png"
    finally:
        context.close()
    assert elsewhere == []
    assert refused == []


@pytest.mark.slow
@needs(NGINX)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_nginx_as_gradios_guide_has_it(
    browser: Browser, studio: Studio, tmp_path: Path, ending: ExitStack, prefix: str
) -> None:
    port = free_port()
    server = proxies.GRADIOS_GUIDE.format(port=port, prefix=prefix, app_port=studio(prefix).port)
    ending.callback(proxies.nginx(tmp_path, server, port).end)
    makes_a_video(browser, f"http://gpubox:{port}{prefix}/")


@pytest.mark.slow
@needs(NGINX)
@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nginx_as_deployed(
    browser: Browser,
    studio: Studio,
    tmp_path: Path,
    ending: ExitStack,
    certificate: Path,
    scheme: str,
    prefix: str,
) -> None:
    ports = {"http": free_port(), "https": free_port()}
    both = (ports["http"], ports["https"])
    app_port = studio(prefix).port
    proxy = proxies.deployed_nginx(tmp_path, app_port, both, certificate, bool(prefix))
    ending.callback(proxy.end)
    makes_a_video(browser, f"{scheme}://gpubox:{ports[scheme]}{prefix}/")


@pytest.mark.slow
@needs(CADDY)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_caddy_as_deployed(
    browser: Browser,
    studio: Studio,
    tmp_path: Path,
    ending: ExitStack,
    certificate: Path,
    prefix: str,
) -> None:
    port = free_port()
    proxy = proxies.deployed_caddy(tmp_path, studio(prefix).port, port, certificate, bool(prefix))
    ending.callback(proxy.end)
    makes_a_video(browser, f"https://gpubox:{port}{prefix}/")


@pytest.mark.slow
@needs(NGINX)
def test_nginx_that_passes_the_prefix_on(
    browser: Browser, studio: Studio, tmp_path: Path, ending: ExitStack
) -> None:
    port = free_port()
    app_port = studio(PREFIX).port
    server = proxies.PASSES_PREFIX.format(port=port, prefix=PREFIX, app_port=app_port)
    ending.callback(proxies.nginx(tmp_path, server, port).end)
    makes_a_video(browser, f"http://gpubox:{port}{PREFIX}/")


@pytest.mark.slow
@needs(NGINX)
def test_gradios_client_comes_through_nginx_as_gradios_guide_has_it(
    studio: Studio, tmp_path: Path, ending: ExitStack
) -> None:
    port, served = free_port(), studio(PREFIX)
    server = proxies.GRADIOS_GUIDE.format(port=port, prefix=PREFIX, app_port=served.port)
    ending.callback(proxies.nginx(tmp_path, server, port).end)
    client = Client(f"http://127.0.0.1:{port}{PREFIX}/", verbose=False)
    video = client.predict("through the proxy", num_inference_steps=2, api_name="/generate")
    assert Path(video).read_bytes()[4:8] == b"ftyp"


@pytest.mark.slow
@needs(NGINX)
def test_one_logs_in_through_nginx_as_gradios_guide_has_it(
    browser: Browser, tmp_path: Path, ending: ExitStack
) -> None:
    people = tmp_path / "accounts"
    accounts.add(people, "ann", "ann's password", admin=False)
    program = ("-m", "tests.faults.server", "ok")
    served = Served(tmp_path / "data", program=program, MOCHI_AUTH_FILE=str(people))
    ending.callback(served.end)
    port = free_port()
    server = proxies.GRADIOS_GUIDE.format(port=port, prefix=PREFIX, app_port=served.start().port)
    ending.callback(proxies.nginx(tmp_path / "nginx", server, port).end)
    context = browser.new_context()
    context.set_default_timeout(DEADLINE * 1000)
    ending.callback(context.close)
    page = context.new_page()
    page.goto(f"http://gpubox:{port}{PREFIX}/")
    page.fill("[name=username]", "ann")
    page.fill("[name=password]", "ann's password")
    page.click("button")
    expect(page.locator(".m-who")).to_have_text("ann")
    generate(page, "asked by ann")
    playing(page, "Preview")
    page.get_by_role("button", name="Log out").click()
    expect(page.locator("[name=username]")).to_be_visible()


@pytest.mark.slow
@needs(NGINX)
def test_over_https_a_page_works_whatever_host_the_proxy_passes(
    browser: Browser, studio: Studio, tmp_path: Path, ending: ExitStack, certificate: Path
) -> None:
    port = free_port()
    server = proxies.NO_HEADERS.format(
        port=port, ssl="ssl", certificate=certificate, app_port=studio("").port
    )
    ending.callback(proxies.nginx(tmp_path, server, port).end)
    makes_a_video(browser, f"https://gpubox:{port}/")


@pytest.mark.slow
@needs(NGINX)
def test_a_page_whose_calls_are_refused_says_so(
    browser: Browser, studio: Studio, tmp_path: Path, ending: ExitStack, certificate: Path
) -> None:
    port = free_port()
    server = proxies.NO_HEADERS.format(
        port=port, ssl="", certificate=certificate, app_port=studio("").port
    )
    ending.callback(proxies.nginx(tmp_path, server, port).end)
    page = browser.new_page()
    ending.callback(page.close)
    page.goto(f"http://gpubox:{port}/")
    notice = page.locator(".m-gate")
    expect(notice).to_be_visible()
    expect(notice).to_contain_text("Host header")
    expect(notice).to_contain_text("docs/operations.md")
    page.fill(PROMPT, "typed in vain")
    page.click("#mochi-generate")
    expect(notice).to_be_visible()
    assert page.locator(PROMPT).input_value() == "typed in vain"


def shown(path: str) -> str:
    """What `docs/operations.md` shows of this file."""
    text = OPERATIONS.read_text().split(f"<!-- {path} -->\n")[1].split(f"<!-- /{path} -->")[0]
    return text.split("\n", 1)[1].removesuffix("```\n")


@pytest.mark.parametrize("path", ["deploy/nginx.conf", "deploy/Caddyfile"])
def test_the_docs_show_the_files_that_the_tests_run(path: str) -> None:
    assert shown(path) == (PROJECT_DIR / path).read_text()
