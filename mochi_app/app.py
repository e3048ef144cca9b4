"""The composition root: creates all parts of the app and serves them; nothing runs on import.

settings → history → media → pool → studio → web. The model loads in the slots' own processes, so
the page responds within seconds, and requests made meanwhile wait in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from types import FrameType

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from mochi_app.errors import HistoryError
from mochi_app.jobs import JobStatus
from mochi_app.logs import log_stderr, start_logging
from mochi_app.model_defaults import load_model_defaults
from mochi_app.platforms import signal_name
from mochi_app.settings import Settings, SettingsError, load_settings
from mochi_app.slots.pool import Pool
from mochi_app.slots.slot import ENGINE_COMMAND
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.studio import Studio
from mochi_app.web import ui
from mochi_app.web.api import Api
from mochi_app.web.auth import Auth, Guard, user_of
from mochi_app.web.connections import Connection, allow_files, most_connections
from mochi_app.web.gradio_queue import use_studio_queue
from mochi_app.web.hosts import OwnHost, ServedHosts, UnderPrefix, root_path
from mochi_app.web.login import add_login
from mochi_app.web.middleware import (
    BoundedBody,
    OnlyWhatIsNeeded,
    OwnOrigin,
    SecurityHeaders,
    WholeStreams,
)
from mochi_app.web.routes import add_routes, explain_bad_calls
from mochi_app.web.template import use_own_address
from mochi_app.web.tickets import Tickets
from mochi_app.web.unread import StreamLimits

log = logging.getLogger("mochi_app")

MAX_THREADS = 512  # events that Gradio's queue may run at a time, waiting callers included
STATUS_UPDATE_SECONDS = 5
CONNECTION_GRACE_SECONDS = 1


def build_web(studio: Studio, ticket_secret: str) -> FastAPI:
    """The parent app: our routes, then Gradio's page and API at the root.

    Raises:
        SettingsError: the accounts file, or GRADIO_ROOT_PATH, cannot be used.
    """
    auth = Auth(studio.settings, ticket_secret)
    gr.set_static_paths([studio.media.videos])
    use_own_address()
    with gr.Blocks(title="Mochi", analytics_enabled=False) as demo:
        ui.build(studio)
        Api(studio, ticket_secret).mount()
    queue = use_studio_queue(
        demo, max_threads=MAX_THREADS, update_seconds=STATUS_UPDATE_SECONDS, api_open=False
    )
    studio.checks += [lambda: queue.problem, lambda: auth.problem]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tickets = Tickets(
            app,
            ticket_secret,
            lambda: studio.dispatch.tickets_needed,
            studio.changed,
            starving=lambda: studio.dispatch.starving,
            on_stall=queue.restart,
        )
        studio.checks.append(lambda: tickets.problem)
        async with contextlib.AsyncExitStack() as ending:  # last in, first out, even if one raises
            ending.push_async_callback(studio.history.close)
            ending.push_async_callback(studio.stop)
            await studio.start()
            ending.push_async_callback(tickets.stop)
            tickets.start()
            ending.callback(studio.begin_stop)
            yield

    app = FastAPI(title="Mochi", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(app, studio)
    add_login(app, auth)
    gr.mount_gradio_app(
        app,
        demo,
        path="/",
        auth_dependency=user_of,
        root_path=root_path().value or None,
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        footer_links=["api", "settings"],
        **ui.page_options(),
    )
    explain_bad_calls(app)
    app.add_middleware(
        StreamLimits,
        queue=queue,
        ticket_secret=ticket_secret,
        most_unread=studio.settings.max_unread,
    )
    add_protection(app, auth, studio.settings)
    return app


def add_protection(app: FastAPI, auth: Auth, settings: Settings) -> None:
    """Add the middleware that every request passes through, from the inside out."""
    for route in app.routes:
        if isinstance(route, Mount) and isinstance(route.app, FastAPI):
            route.app.add_middleware(WholeStreams)
            route.app.add_middleware(OnlyWhatIsNeeded)
    app.add_middleware(BoundedBody)
    app.add_middleware(Guard, auth=auth)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=settings.trusted_proxies)
    root = root_path()
    if not auth.closed:
        hosts = ServedHosts(
            settings.allowed_hosts, root.host, space_host=os.environ.get("SPACE_HOST", "")
        )
        app.add_middleware(OwnHost, hosts=hosts, trusted_proxies=settings.trusted_proxies)
    app.add_middleware(OwnOrigin, allowed=settings.allowed_origins, public_url=root.value)
    app.add_middleware(  # Starlette's; with it Gradio's, which allows every site, is not used
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )
    app.add_middleware(SecurityHeaders, frame_ancestors=settings.frame_ancestors)
    if root.path:
        app.add_middleware(UnderPrefix, prefix=root.path)


class Server(uvicorn.Server):
    """Uvicorn that notifies the studio of a signal at once, so that open streams can end."""

    def __init__(self, config: uvicorn.Config, studio: Studio) -> None:
        super().__init__(config)
        self._studio = studio

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM or SIGINT: no new jobs, streams end, then uvicorn shuts down."""
        self._studio.begin_stop()
        log.info("%s: stopping", signal_name(sig))
        super().handle_exit(sig, frame)


def server_port() -> int:
    """The port that Gradio's own variable names.

    Raises:
        SettingsError: it is not a port.
    """
    value = os.environ.get("GRADIO_SERVER_PORT", "7860")
    if not value.isascii() or not value.isdecimal() or not 0 < int(value) < 65536:
        raise SettingsError(f"GRADIO_SERVER_PORT={value!r}: expected a port from 1 to 65535")
    return int(value)


async def serve(settings: Settings, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Create everything and serve until a signal. `engine_command` starts a rank."""
    defaults = load_model_defaults(settings)
    history = await History.open(settings.data_dir)
    media = await asyncio.to_thread(MediaStore, settings.data_dir)
    unfiled = {job.id for job in history.with_status(JobStatus.PROCESSING)}
    swept = await asyncio.to_thread(media.sweep, unfiled)
    log.info("swept leftovers: %s", swept)
    pool = Pool(settings, media.scratch, command=engine_command)
    studio = Studio(settings, defaults, history, media, pool)
    config = uvicorn.Config(
        build_web(studio, secrets.token_urlsafe(32)),
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=server_port(),
        http=Connection,
        ws="none",
        backlog=most_connections() // 4,  # this many are accepted before the first is counted
        log_config=None,  # its lines go to our log
        log_level="warning",
        proxy_headers=False,  # a layer of the app reads them
        timeout_graceful_shutdown=CONNECTION_GRACE_SECONDS,
    )
    log.info("serving http://%s:%d with model %s", config.host, config.port, settings.model)
    await Server(config, studio).serve()


def main(engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Run the app; the exit code says whether it could start."""
    start_logging("text")
    allow_files()
    try:
        settings = load_settings()
        start_logging(settings.log_format, settings.log_level)
        log_stderr()
        asyncio.run(serve(settings, engine_command))
    except (SettingsError, HistoryError, OSError) as error:
        log.error("cannot start: %s", error)
        return 2
    return 0
