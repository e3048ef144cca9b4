"""Gradio's queue, hardened against what would stop it or fill the memory.

`gradio.queueing.Queue` (6.31) keeps the answers of each session until they are read, in a map of
2000 that drops its oldest entry even if somebody waits for it; entries are never removed, read or
unread, and a message to a dropped session ends the loop that sends it. Here a lost session affects
only its own client, answers are removed once read, unread ones are bounded, and a loop that ends is
restarted: running events continue, waiting ones keep waiting. How many sessions there may be is
decided elsewhere (`unread.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from fastapi import HTTPException
from gradio.block_function import BlockFunction
from gradio.queueing import Event, Queue
from gradio.server_messages import EventMessage, ProcessCompletedMessage, ServerMessage

from mochi_app.errors import one_line

log = logging.getLogger(__name__)

MOST_SESSIONS = 1500  # well below the 2000 at which Gradio drops sessions that somebody waits for
MOST_EVENTS = 128  # answers of one session that wait to be read
MOST_MESSAGES = 256  # of one session; a watched job sends about one a second
MOST_STATES = 64  # sessions whose `gr.State` is kept. Nothing here uses any, and each takes 140 KB
STEADY_SECONDS = 1.0  # a loop that runs this long has recovered
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds before a loop is restarted
NEWS = (ServerMessage.estimation, ServerMessage.progress, ServerMessage.heartbeat)


class StudioQueue(Queue):
    """The queue of one `gr.Blocks`; see the module docstring."""

    def __init__(self, blocks: gr.Blocks, *, max_threads: int, update_seconds: float) -> None:
        """`max_threads` events run at a time; waiting ones are updated every `update_seconds`."""
        self._closed = False
        super().__init__(
            live_updates=False,
            concurrency_count=max_threads,
            update_intervals=update_seconds,
            max_size=None,
            blocks=blocks,
        )
        self._problems: dict[str, str] = {}
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._begun: set[str] = set()  # ids of the events whose processing has begun

    @property
    def problem(self) -> str | None:
        """Why the queue is not working at the moment."""
        return "; ".join(self._problems.values()) or None

    # Loops

    @property
    def stopped(self) -> bool:
        """Whether the queue is closed for good. Gradio's loop sets this when it ends, which would
        tell every reader that the server stopped; ours is restarted."""
        return self._closed

    @stopped.setter
    def stopped(self, value: bool) -> None:
        pass

    def close(self) -> None:
        """End the loops."""
        self._closed = True

    def start(self) -> None:
        """Start the loops; called by Gradio."""
        self.active_jobs = [None] * self.max_thread_count
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "processing": self.start_processing,
            "progress": self.start_progress_updates,
            "estimates": self.notify_clients,
        }
        self._keepers = [
            asyncio.create_task(self._keep(name, loop), name=f"queue {name}")
            for name, loop in loops.items()
        ]

    def restart(self, reason: str) -> None:
        """End the loops, so that they are restarted."""
        log.error("Gradio's queue is restarted: %s", reason)
        for loop in self._loops.values():
            loop.cancel(reason)

    async def _keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run one loop forever."""
        pause = FIRST_PAUSE
        while not self._closed:
            task = self._loops[name] = asyncio.ensure_future(loop())
            try:
                await asyncio.wait({task}, timeout=STEADY_SECONDS)
                if not task.done():
                    self._problems.pop(name, None)
                    pause = FIRST_PAUSE
                    await asyncio.wait({task})
            finally:
                task.cancel()
            if self._closed:
                return
            reason = f"Gradio's queue stopped ({name}: {ending(task)}); it is started again"
            self._problems[name] = reason
            log.critical("%s", reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            self._reclaim()

    def _cancel_asyncio_tasks(self) -> None:
        """Gradio cancels all running events when its loop ends; here they continue."""

    async def process_events(
        self, events: list[Event], batch: bool, begin_time: float, fn: BlockFunction
    ) -> None:
        """Run events, recording them so that `_reclaim` can tell which ones a loop lost."""
        ids = {event._id for event in events}
        self._begun |= ids
        try:
            await super().process_events(events, batch, begin_time, fn)
        finally:
            self._begun -= ids

    def _reclaim(self) -> None:
        """Requeue events that a loop took from the queue but did not start before it ended."""
        for place, events in enumerate(self.active_jobs):
            if events and events[0]._id not in self._begun:
                self.active_jobs[place] = None
        queues = self.event_queue_per_concurrency_id
        waiting = {event._id for queue in queues.values() for event in queue.queue}
        known = self.event_ids_to_events.items()
        lost = [event for event_id, event in known if event_id not in waiting | self._begun]
        for event in sorted(lost, key=lambda event: -event.enqueue_time):
            queues[event.concurrency_id].queue.insert(0, event)
        for name, queue in self.event_queue_per_concurrency_id.items():
            running = [jobs for jobs in self.active_jobs if jobs and jobs[0].concurrency_id == name]
            queue.current_concurrency = len(running)

    # Sessions: which answers each is still to get

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        """Queue an event; returns Gradio's answer.

        Raises:
            HTTPException: 429, its session has too many unread answers.
        """
        owed = len(self.pending_event_ids_session.get(body.session_hash, ()))
        if owed >= MOST_EVENTS:
            raise HTTPException(
                429,
                f"session_hash: {owed} answers of this session wait to be read, at most"
                f" {MOST_EVENTS} may: read its event stream",
                {"retry-after": "5"},
            )
        return await super().push(body, request, username)

    def send_message(self, event: Event, event_message: EventMessage) -> None:
        """Put a message into its session's box; drop it if that is gone.

        When the box is full, progress news is dropped, and other messages are replaced by a final
        error, except an event's result: a late reader learns that it missed some. Jobs are not
        affected.
        """
        box = self.pending_messages_per_session.get(event.session_hash)
        if box is None or not event.alive:
            return
        if box.qsize() >= MOST_MESSAGES and event_message.msg != ServerMessage.process_completed:
            if event_message.msg in NEWS:
                return
            output = {"error": f"{MOST_MESSAGES} messages were not read: ask for the job by its id"}
            event_message = ProcessCompletedMessage(output=output, success=False)
            super().send_message(event, event_message)
            event.alive = False
            return
        super().send_message(event, event_message)

    @property
    def sessions(self) -> int:
        """How many sessions are owed an answer, whether or not it is being read."""
        return len(self.pending_messages_per_session)

    def session_of(self, event_id: str) -> str | None:
        """The session that is owed this event's answer."""
        event = self.event_ids_to_events.get(event_id)
        if event is not None:
            return event.session_hash
        owed = self.pending_event_ids_session
        if event_id in owed:
            return event_id
        return next((session for session, ids in owed.items() if event_id in ids), None)

    def settle(self, session: str) -> bool:
        """After a stream of the session ended: forget the session if it is owed nothing more.

        Gradio never does. Returns whether the session was forgotten.
        """
        owed = self.pending_event_ids_session.get(session, set())
        events = [self.event_ids_to_events.get(event_id) for event_id in owed]
        box = self.pending_messages_per_session.get(session)
        wanted = any(event is not None and event.alive for event in events)
        if box is not None and owed and (wanted or not box.empty()):
            return False
        self.forget(session)
        return True

    def forget(self, session: str) -> None:
        """Drop all the session's answers. Its running events end at their next result; waiting
        ones still run, since somebody requested them."""
        for events in self.active_jobs:
            for event in events or ():
                if event.session_hash == session:
                    event.alive = False
        self.pending_messages_per_session.pop(session, None)
        self.pending_event_ids_session.pop(session, None)


def ending(task: asyncio.Future[None]) -> str:
    """How a loop ended."""
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return one_line(error) if error else "it returned"


def use_studio_queue(
    blocks: gr.Blocks, *, max_threads: int, update_seconds: float, **options: Any
) -> StudioQueue:
    """Give `blocks` its queue, with Gradio's other `options`; before `blocks` is mounted."""
    blocks.max_threads = max_threads
    blocks.state_session_capacity = MOST_STATES
    blocks.queue(**options)
    queue = StudioQueue(blocks, max_threads=max_threads, update_seconds=update_seconds)
    blocks._queue = queue
    return queue
