"""Ask a starting app for a video and its enhance, as a newcomer would; fails when there is none."""

import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from gradio_client import Client


def wait_until_ready(url: str, seconds: float = 120) -> None:
    """Poll /healthz."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"{url} made no slot ready within {seconds:g} s")


def main() -> None:
    """Ask, enhance, look at the files."""
    url = sys.argv[1]
    wait_until_ready(url)
    client = Client(url, verbose=False)
    preview = client.predict("a red circle moving left on a blue background", api_name="/generate")
    listed = client.predict(api_name="/list_jobs")["jobs"][0]
    enhanced = client.predict(listed["id"], api_name="/enhance_job")
    limit = time.monotonic() + 120
    while (job := client.predict(enhanced["id"], api_name="/get_job_status"))["status"] in (
        "PENDING",
        "PROCESSING",
    ):
        if time.monotonic() > limit:
            raise SystemExit(f"no end of {job}")
        time.sleep(0.2)
    video = client.predict(enhanced["id"], api_name="/get_output_file")
    for path in (preview, video):
        if Path(path).read_bytes()[4:8] != b"ftyp":
            raise SystemExit(f"{path} is no MP4")
    sys.stdout.write(f"preview and enhance of {listed['id']}: two videos\n")


if __name__ == "__main__":
    main()
