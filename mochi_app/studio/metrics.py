"""Prometheus metrics: counts and states read at each scrape, times observed as they happen."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mochi_app.jobs import Job, JobStatus
from mochi_app.slots.pool import Pool
from mochi_app.store.history import History
from mochi_app.store.media import MediaStore
from mochi_app.studio.retention import Retention

# Seconds: from the embedded model's preview to an enhance on one GPU that waited overnight.
RUN_BUCKETS = (1, 2, 5, 10, 20, 45, 90, 180, 300, 600, 1200, 2400, 4800, 9600)
WAIT_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 180, 600, 1800, 3600, 7200, 14400, 28800, 57600)
STEP_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The registry of one server."""

    def __init__(
        self, history: History, media: MediaStore, retention: Retention, pool: Pool
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Now(history, media, retention, pool))
        self._wait = Histogram(
            "mochi_job_wait_seconds",
            "From the submit, or the server's start if that was later, to the first start.",
            ["kind"],
            buckets=WAIT_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._run = Histogram(
            "mochi_job_run_seconds", "From the start of the last attempt to the video.", ["kind"],
            buckets=RUN_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._step = Histogram(
            "mochi_step_seconds", "One denoising step.",
            buckets=STEP_BUCKETS, registry=self._registry,
        )  # fmt: skip

    def started(self, job: Job, waited: float) -> None:
        """Observe a job that has just become PROCESSING, and the seconds that it waited."""
        if job.attempts == 1:
            self._wait.labels(job.kind).observe(waited)

    def completed(self, job: Job, ran: float) -> None:
        """Observe a job that has just become COMPLETED, and the seconds of its last attempt."""
        self._run.labels(job.kind).observe(ran)

    def stepped(self, seconds: float) -> None:
        """Observe the seconds of one step."""
        self._step.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format. Blocks to measure the disk."""
        return generate_latest(self._registry)


class Now(Collector):
    """Reads the state at each scrape; keeps none of its own."""

    def __init__(
        self, history: History, media: MediaStore, retention: Retention, pool: Pool
    ) -> None:
        self._history = history
        self._media = media
        self._retention = retention
        self._pool = pool

    def collect(self) -> list[Metric]:
        """The current metrics."""
        counts, held = self._history.counts(), self._history.held()
        jobs = GaugeMetricFamily("mochi_jobs", "Jobs in the history.", labels=["status"])
        for status in JobStatus:
            jobs.add_metric([status.lower()], counts.get(status, 0))
        sizes = {
            "mochi_queue_length": ("Jobs that wait.", counts.get(JobStatus.PENDING, 0) - held),
            "mochi_jobs_held": ("Jobs that wait for a person to try them again.", held),
            "mochi_videos_bytes": ("Bytes of all videos.", self._media.total_bytes()),
            "mochi_quota_bytes": ("Room for videos, in bytes.", self._retention.quota_bytes),
        }
        with contextlib.suppress(OSError):  # for a missing disk no value is reported, not even 0
            free = self._media.free_bytes()
            sizes["mochi_disk_free_bytes"] = ("Free on the data disk.", free)
        gauges = [GaugeMetricFamily(name, text, value=value)
                  for name, (text, value) in sizes.items()]  # fmt: skip
        return [jobs, *gauges, *self._slots()]

    def _slots(self) -> list[Metric]:
        up = GaugeMetricFamily(
            "mochi_slot_up", "1 when the slot has its model loaded.", labels=["slot", "state"]
        )
        restarts = CounterMetricFamily(
            "mochi_slot_restarts", "Ends of the slot's processes.", labels=["slot"]
        )
        memory = GaugeMetricFamily(
            "mochi_gpu_memory_bytes", "Held by a rank on its GPU.", labels=["slot", "rank"]
        )
        for supervised in self._pool.slots:
            described = supervised.describe()
            name, state = str(described["slot"]), described["state"]
            up.add_metric([name, state], float(state in ("ready", "busy")))
            restarts.add_metric([name], supervised.restarts)
            for rank, held in enumerate(supervised.slot.gpu_bytes):
                if held is not None:
                    memory.add_metric([name, str(rank)], held)
        return [up, restarts, memory]
