"""Weights: chosen, downloaded, resumed, checked; real child processes against a stand-in hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mochi_app.files import PROJECT_DIR
from mochi_app.weights import hub_cache
from mochi_app.weights.events import (
    Event,
    Progress,
    decode,
)
from mochi_app.weights.files import (
    needed_files,
)
from mochi_app.weights.snapshot import RemoteFile, Snapshot
from tests.downloads import (
    FLOAT32,
    MB,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    command,
    run,
    tiny_files,
)
from tests.hub import REPO, Fault, Hub


def test_a_download_brings_exactly_what_is_needed_and_loads(hub: Hub, home: Path) -> None:
    outcome = run()
    needed = set(needed_files(tiny_files(), FLOAT32))
    assert set(hub.sent) == needed
    assert outcome.folder == home / "snapshots" / hub.commit
    assert outcome.progress[-1] == Progress(hub.size(needed), hub.size(needed), "")
    for path in needed:
        assert (outcome.folder / path).read_bytes() == hub.items[path].content
    from diffusers import MochiPipeline

    MochiPipeline.from_pretrained(outcome.folder)

    hub.sent.clear()
    again = run()
    assert again.folder == outcome.folder
    assert not hub.sent
    assert not again.notices
    assert again.progress[0].done == again.progress[0].total


def test_huggingface_hub_finds_our_cache_complete(hub: Hub) -> None:
    folder = run().folder
    hub.sent.clear()
    needed = needed_files(tiny_files(), FLOAT32)
    program = (
        "from functools import partial; from huggingface_hub import snapshot_download; "
        f"find = partial(snapshot_download, {REPO!r}, allow_patterns={needed}); "
        "print(find(local_files_only=True), find())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert found.stdout.split() == [str(folder), str(folder)]
    assert not hub.sent


def test_bfloat16_takes_the_variants_that_there_are(
    variants: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from diffusers import MochiPipeline

    with Hub(variants) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = run(dtype="bfloat16").folder
        shards = [path for path in hub.sent if "transformer/diffusion_pytorch_model.bf16-" in path]
        assert len(shards) > 1
        assert "transformer/diffusion_pytorch_model.safetensors.index.bf16.json" in hub.sent
        assert "vae/diffusion_pytorch_model.bf16.safetensors" in hub.sent
        assert TEXT_ENCODER in hub.sent
        assert not {TRANSFORMER, VAE, "dit.safetensors", "vae/model.bin"} & set(hub.sent)
        pipe = MochiPipeline.from_pretrained(folder, dtype=torch.bfloat16, variant="bf16")
        assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16

        hub.sent.clear()
        run(dtype="float32")
        assert set(hub.sent) == {TRANSFORMER, VAE}


def test_a_new_commit_costs_only_what_changed(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run().folder
    changed = tiny_files() | {"mochi_defaults.json": b"{}\n", "README.md": b"new"}
    with Hub(changed) as newer:
        monkeypatch.setenv("HF_ENDPOINT", newer.url)
        folder = run().folder
        assert folder != old
        assert set(newer.sent) == {"mochi_defaults.json"}
        assert (home / "refs" / "main").read_text() == newer.commit


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(hub: Hub) -> None:
    hub.token = "right"
    assert "HF_TOKEN" in run(HF_TOKEN="wrong").failure.error
    assert run(HF_TOKEN="right").folder.is_dir()


# Lost connections and killed processes
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_lost_connection_goes_on_where_it_was(hub: Hub, reset: bool) -> None:
    hub.pace = 30 * MB
    hub.faults[TRANSFORMER] = Fault(times=1, cut=6 * MB, reset=reset)
    assert run().folder.is_dir()
    first, second = hub.starts[TRANSFORMER]
    assert first == 0
    least = 0 if reset else 4 * MB  # an RST takes along what the client had not read yet
    assert least < second <= 6 * MB
    assert hub.starts[VAE] == [0]


def test_a_connection_that_is_always_lost_gets_there_in_pieces(hub: Hub) -> None:
    hub.faults[TRANSFORMER] = Fault(cut=5 * MB)
    assert run(REPO, "float32", "--patience", "0.1").failure.retry  # shorter than the first pause
    assert run().folder.is_dir()
    starts = hub.starts[TRANSFORMER]
    assert len(starts) == 3
    assert all(later - earlier > 4 * MB for earlier, later in pairwise(starts))


def test_a_killed_download_goes_on_at_the_next_start(hub: Hub, home: Path) -> None:
    hub.pace = 6 * MB
    process = subprocess.Popen(command(), cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        event = decode(line)
        if isinstance(event, Progress) and event.done > 7 * MB:
            break
    process.kill()
    process.communicate()
    partial = {p: size(home, hub, p) for p in (TRANSFORMER, VAE)}
    assert min(partial.values()) > 1 * MB
    assert not (home / "refs" / "main").exists()

    hub.starts.clear()
    hub.pace = 12 * MB
    outcome = run()
    assert outcome.folder.is_dir()
    assert {path: hub.starts[path] for path in partial} == {p: [n] for p, n in partial.items()}
    done = [progress.done for progress in outcome.progress]
    assert done[0] >= sum(partial.values())
    assert done == sorted(done)
    assert any(done[0] < value < done[-1] for value in done)
    assert done[-1] == outcome.progress[-1].total
    assert {progress.file for progress in outcome.progress} & {TRANSFORMER, VAE}
    assert len(done) <= 2 * outcome.seconds + 2


def size(home: Path, hub: Hub, path: str) -> int:
    """Bytes of a partial file."""
    return (home / "blobs" / f"{hub.items[path].etag}.incomplete").stat().st_size


def test_two_at_once_download_once(hub: Hub) -> None:
    hub.pace = 12 * MB
    both = [
        subprocess.Popen(command(), cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=30)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(hub.sent.values()) == hub.size(needed_files(tiny_files(), FLOAT32))
    assert sum("another process downloads" in output for output in outputs) == 1


def test_a_cache_that_takes_no_lock_is_used_without(hub: Hub, home: Path) -> None:
    folder = run().folder
    locks = home.parent / ".locks"
    shutil.rmtree(locks)
    locks.write_text("no folder")
    assert run().folder == folder


# Offline
def test_offline_uses_a_complete_cache_and_asks_nobody(hub: Hub) -> None:
    folder = run().folder
    hub.asked.clear()
    outcome = run(HF_HUB_OFFLINE="1")
    assert outcome.folder == folder
    assert not hub.asked

    (folder / VAE).resolve().unlink()
    failure = run(HF_HUB_OFFLINE="1").failure
    assert VAE in failure.error
    assert "unset it" in failure.error
    assert not failure.retry
    assert not hub.asked


def test_offline_without_a_cache_says_what_to_do(hub: Hub) -> None:
    failure = run(HF_HUB_OFFLINE="1").failure
    assert f"{REPO} is not in" in failure.error
    assert "unset it" in failure.error
    assert not failure.retry


def test_without_the_hub_a_complete_cache_is_used_and_that_is_said(hub: Hub) -> None:
    folder = run().folder
    hub.status = 503
    outcome = run()
    assert outcome.folder == folder
    assert "503" in outcome.notices[0]
    hub.stop()
    outcome = run()
    assert outcome.folder == folder
    assert "cannot be reached" in outcome.notices[0]

    (folder / VAE).resolve().unlink()
    failure = run().failure
    assert "cannot be reached" in failure.error
    assert "network" in failure.error
    assert failure.retry


# Refusals
def test_a_gated_repository_is_told_with_where_to_accept(hub: Hub) -> None:
    hub.gated = True
    failure = run().failure
    assert f"{hub.url}/{REPO}" in failure.error
    assert "HF_TOKEN" in failure.error
    assert not failure.retry


@pytest.mark.parametrize("model", ["genmo/no-such-model", "far/too/many/parts"])
def test_a_model_that_is_not_there_is_told(model: str) -> None:
    failure = run(model).failure
    assert model in failure.error
    assert "MOCHI_MODEL" in failure.error
    assert not failure.retry


@pytest.mark.parametrize(
    ("status", "retry"), [(500, True), (403, False), (451, False), (200, True)]
)
def test_a_hub_that_answers_badly_is_told(hub: Hub, status: int, retry: bool) -> None:
    hub.status = status
    failure = run().failure
    assert hub.url in failure.error
    assert failure.retry is retry


# Disk
def test_a_disk_that_is_too_small_is_told_before_anything_comes(hub: Hub, home: Path) -> None:
    failure = run(REPO, "float32", "--free-margin-gib", "1e6").failure
    assert str(home.parent) in failure.error
    assert "needs 1073741.8" in failure.error
    assert "HF_HOME" in failure.error
    assert failure.retry
    assert not hub.sent


def test_a_disk_that_fills_up_is_told(hub: Hub, home: Path) -> None:
    (home / "blobs").mkdir(parents=True)
    partial = home / "blobs" / f"{hub.items[VAE].etag}.incomplete"
    partial.symlink_to("/dev/full")
    failure = run().failure
    assert "is full" in failure.error
    assert failure.retry


# Damage
def test_a_file_shorter_than_listed_is_told(hub: Hub) -> None:
    hub.faults[TRANSFORMER] = Fault(truncate=9 * MB)
    failure = run().failure
    assert f"9000000 bytes of {TRANSFORMER}" in failure.error
    assert failure.retry


def test_a_file_that_comes_damaged_comes_again_once(hub: Hub) -> None:
    hub.faults[TRANSFORMER] = Fault(times=1, corrupt=5 * MB)
    outcome = run()
    assert (outcome.folder / TRANSFORMER).read_bytes() == hub.items[TRANSFORMER].content
    assert outcome.notices == [f"{TRANSFORMER} came damaged"]


def test_a_file_that_always_comes_damaged_is_told(hub: Hub, home: Path) -> None:
    hub.faults["vae/config.json"] = Fault(corrupt=3)
    failure = run().failure
    assert "vae/config.json" in failure.error
    assert "twice" in failure.error
    assert not (home / "blobs" / hub.items["vae/config.json"].etag).exists()


def test_what_is_damaged_in_the_cache_comes_again_alone(hub: Hub) -> None:
    folder = run().folder
    hub.sent.clear()
    os.truncate(folder / VAE, 5 * MB)
    with (folder / TEXT_ENCODER).open("r+b") as file:
        file.write(bytes(8))
    (folder / "vae/config.json").resolve().unlink()  # leaves a link to nothing
    outcome = run()
    assert set(hub.sent) == {VAE, TEXT_ENCODER, "vae/config.json"}
    assert all((outcome.folder / p).read_bytes() == hub.items[p].content for p in hub.sent)
    assert len(outcome.notices) == 2


def test_a_repository_that_is_damaged_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(tiny_files() | {VAE: bytes(1000)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        failure = run().failure
    assert f"{VAE}: its header is damaged" in failure.error
    assert f"{REPO} itself is damaged" in failure.error
    assert not failure.retry


def test_a_download_that_stands_still_says_so_now_and_then(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub_cache, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(hub_cache, "REPORT_SECONDS", 0.01)
    heard: list[Event] = []
    snapshot = Snapshot(tmp_path, REPO, "0", [RemoteFile("a", 5, "x")])
    with hub_cache.Reporter(snapshot, heard.append):
        limit = time.monotonic() + 10
        while len(heard) < 3 and time.monotonic() < limit:
            time.sleep(0.01)
    assert heard[:3] == 3 * [Progress(0, 5, "")]
