"""The model's folder: one download for all slots, shown while it goes on, retried by the pool."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from mochi_app.slots.pool import Pool
from mochi_app.weights.provision import types_of
from tests.conftest import eventually, quick_settings
from tests.hub import REPO, Fault, Hub, folder_files
from tests.places import TINY
from tests.serving import Served, poll

ON_GPU = "bfloat16, text encoder float32, decoder bfloat16"
MakePool = Callable[..., Awaitable[Pool]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the Hub that has the embedded model, and a cache of the test's own."""
    with Hub(folder_files(TINY)) as hub:
        for name in list(os.environ):
            if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"slots": "cpu"}, ["float32"]),
        ({"slots": "0;1"}, [ON_GPU]),
        ({"slots": "cpu;0"}, [ON_GPU, "float32"]),
        ({"slots": "cpu;0", "dtype": "float32"}, ["float32"]),
        ({"slots": "0", "text_dtype": "bfloat16"}, ["bfloat16"]),
        (
            {"slots": "0", "vae_dtype": "float32"},
            ["bfloat16, text encoder float32, decoder float32"],
        ),
    ],
)
def test_types_follow_devices_and_settings(given: dict[str, str], expected: list[str]) -> None:
    assert list(map(str, types_of(quick_settings(**given)))) == expected


async def test_slots_share_one_download_and_show_it(hub: Hub, make_pool: MakePool) -> None:
    hub.pace = 12_000_000
    pool = await make_pool(model=REPO, slots="cpu;cpu")
    shown: set[str] = set()

    def ready() -> bool:
        shown.update(slot.describe()["state"] + ": " + slot.describe()["detail"]
                     for slot in pool.slots)  # fmt: skip
        return pool.ready_or_busy == 2

    await eventually(ready, deadline=60)
    assert any(text.startswith("loading: downloading ") for text in shown), shown
    weights = {path: sent for path, sent in hub.sent.items() if path.endswith(".safetensors")}
    sizes = {path: (TINY / path).stat().st_size for path in weights}
    assert weights == sizes  # each once, for both slots
    folder = pool.slots[0].slot.model
    assert folder is not None
    assert (folder / "model_index.json").is_file()


async def test_a_hub_that_fails_is_asked_again(hub: Hub, make_pool: MakePool) -> None:
    hub.status = 503
    pool = await make_pool(model=REPO, restart_backoff_max=0.5)
    await eventually(lambda: "503" in pool.slots[0].reason, deadline=60)
    hub.status = None
    await eventually(lambda: pool.ready_or_busy == 1, deadline=60)


async def test_a_missing_model_breaks_the_slot_with_the_cause(
    hub: Hub, make_pool: MakePool
) -> None:
    pool = await make_pool(model="genmo/no-such-model")
    await eventually(lambda: pool.slots[0].broken, deadline=60)
    described = pool.slots[0].describe()
    assert described["state"] == "broken"
    assert "no model genmo/no-such-model" in described["detail"]


async def test_a_damaged_folder_is_named_before_a_rank_starts(
    tmp_path: Path, make_pool: MakePool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    pool = await make_pool(model=str(folder))
    await eventually(lambda: pool.slots[0].broken)
    assert "vae/diffusion_pytorch_model.safetensors" in pool.slots[0].describe()["detail"]
    assert str(tmp_path) not in pool.slots[0].describe()["detail"]
    assert str(tmp_path) in pool.slots[0].reason
    assert pool.slots[0].slot.epoch == 0


async def test_files_that_are_gone_after_a_death_are_looked_at_again(
    tmp_path: Path, make_pool: MakePool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    pool = await make_pool(model=str(folder))
    await eventually(lambda: pool.ready_or_busy == 1)
    shutil.move(folder / "vae", tmp_path / "vae")
    pool.slots[0].slot.kill("asked to")
    await eventually(lambda: pool.slots[0].broken)
    assert "vae/config.json" in pool.slots[0].describe()["detail"]


async def test_a_stop_ends_the_download(hub: Hub, make_pool: MakePool) -> None:
    hub.pace = 100_000
    pool = await make_pool(model=REPO)
    await eventually(lambda: "downloading" in pool.slots[0].describe()["detail"], deadline=60)
    async with asyncio.timeout(5):
        await pool.stop(0.1)


def test_a_video_of_a_model_that_came_over_a_connection_cut_in_the_middle(
    hub: Hub, tmp_path: Path
) -> None:
    """The whole way: a Hub id in the settings, a download with an accident, a video."""
    hub.faults["transformer/diffusion_pytorch_model.safetensors"] = Fault(times=1, cut=3_000_000)
    server = Served(
        tmp_path / "data", MOCHI_MODEL=REPO, MOCHI_HEIGHT="96", MOCHI_WIDTH="96",
        MOCHI_NUM_FRAMES="7", MOCHI_FPS="12",
    ).start()  # fmt: skip
    try:
        states = [slot["detail"] for slot in httpx.get(f"{server.url}/healthz").json()["slots"]]
        assert states
        poll(lambda: httpx.get(f"{server.url}/healthz").status_code == 200, "readiness", 90)
        job = server.call("submit_job", prompt="a red ring", num_inference_steps=2)
        assert server.ended(job["id"])["status"] == "COMPLETED"
    finally:
        server.end()
