"""A server that is killed while it runs jobs: `python -m tests.dying DATA_DIR WORD JOB_ID…`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mochi_app.jobs import JobStatus
from mochi_app.store.checks import JOB
from mochi_app.store.database import RecordStore


def serve_and_die(data_dir: Path, told: str, *job_ids: str) -> None:
    """Hold the history, say that these jobs run, and be killed."""
    store = RecordStore(data_dir)
    index = store.open()
    jobs = [index.get(job_id) for job_id in job_ids]
    running = [job.moved(JobStatus.PROCESSING, started_processing_at=1.0) for job in jobs if job]
    store.write({JOB + job.id: job.to_record() for job in running})
    if told == "end":
        store.begin_end()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve_and_die(Path(sys.argv[1]), *sys.argv[2:])
