"""Weights: chosen, downloaded, resumed, checked; real child processes against a stand-in hub."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mochi_app.files import PROJECT_DIR
from mochi_app.weights import hub_cache
from mochi_app.weights.events import (
    Done,
    Event,
    Failure,
    Notice,
    Progress,
    WeightsError,
    decode,
    encode,
    progress_text,
)
from mochi_app.weights.explain import explain_failure, hub_name
from mochi_app.weights.fetch import WEIGHTS_COMMAND, fetch_weights
from mochi_app.weights.files import (
    PartTypes,
    check_folder,
    needed_files,
    safetensors_problem,
    weight_files,
)
from mochi_app.weights.snapshot import RemoteFile, Snapshot
from tests.conftest import alive, eventually
from tests.hub import REPO, Fault, Hub, folder_files

TINY = PROJECT_DIR / "assets" / "tiny-mochi"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
MB = 1_000_000
FLOAT32 = PartTypes("float32", "float32", "float32")
BFLOAT16 = PartTypes("bfloat16", "bfloat16", "bfloat16")

# What genmo/mochi-1-preview held in 2025, as far as public listings of it say.
SHARED = [
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    *(f"text_encoder/model-0000{n}-of-00004.safetensors" for n in range(1, 5)),
    "text_encoder/model.safetensors.index.json", "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json", "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json", "transformer/config.json", "vae/config.json",
]  # fmt: skip
BF16 = [
    *(f"transformer/diffusion_pytorch_model.bf16-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
    "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
    "vae/diffusion_pytorch_model.bf16.safetensors",
]
PLAIN = [
    *(f"transformer/diffusion_pytorch_model-0000{n}-of-00005.safetensors" for n in range(1, 6)),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    VAE,
]
UNUSED = [
    ".gitattributes", "README.md", "assets/grid.gif", "decoder.safetensors", "dit.safetensors",
    "encoder.safetensors", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
    "transformer/model.pt",
]  # fmt: skip
REAL = [*SHARED, *BF16, *PLAIN, *UNUSED]


@dataclass
class Outcome:
    """A finished run of the command."""

    code: int
    events: list[Event]
    seconds: float
    stderr: str
    notices: list[str] = field(init=False)
    progress: list[Progress] = field(init=False)

    def __post_init__(self) -> None:
        self.notices = [event.text for event in self.events if isinstance(event, Notice)]
        self.progress = [event for event in self.events if isinstance(event, Progress)]

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        last = self.events[-1]
        assert isinstance(last, Done), (self.events, self.stderr)
        assert self.code == 0
        return Path(last.folder)

    @property
    def failure(self) -> Failure:
        """Why there are none."""
        last = self.events[-1]
        assert isinstance(last, Failure), (self.events, self.stderr)
        assert self.code == 1
        return last


def command(model: str = REPO, dtype: str = "float32", *extra: str) -> list[str]:
    return [*WEIGHTS_COMMAND, "--model", model, "--dtype", dtype, *extra]


def run(model: str = REPO, dtype: str = "float32", *extra: str, **environment: str) -> Outcome:
    """The command, to its end."""
    started = time.monotonic()
    process = subprocess.run(
        command(model, dtype, *extra),
        env=os.environ | environment,
        cwd=PROJECT_DIR,
        capture_output=True,
        text=True,
        timeout=30,
    )
    events = [event for line in process.stdout.splitlines() if (event := decode(line))]
    return Outcome(process.returncode, events, time.monotonic() - started, process.stderr)


@cache
def tiny_files() -> dict[str, bytes]:
    return folder_files(TINY)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(tiny_files()) as hub:
        yield hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which asks the stand-in hub; returns where it will be."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "hf" / "hub" / "models--genmo--mochi-1-preview"


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository as mixed as the real one: two components in both variants, one in shards."""
    import torch
    from diffusers import MochiPipeline

    folder = tmp_path_factory.mktemp("variants")
    pipe = MochiPipeline.from_pretrained(TINY, dtype=torch.bfloat16)
    pipe.transformer.save_pretrained(folder / "transformer", variant="bf16", max_shard_size="3MB")
    pipe.vae.save_pretrained(folder / "vae", variant="bf16")
    others = dict.fromkeys(("dit.safetensors", "vae/model.bin"), b"not for diffusers")
    return tiny_files() | folder_files(folder) | others


# Which files


@pytest.mark.parametrize(("types", "weights"), [(BFLOAT16, BF16), (FLOAT32, PLAIN)])
def test_of_the_real_repository_only_one_variant_is_needed(
    types: PartTypes, weights: list[str]
) -> None:
    assert needed_files(REAL, types) == sorted([*SHARED, *weights])


def test_each_component_is_needed_in_its_own_type() -> None:
    text = "text_encoder/model.bf16.safetensors"
    mixed = needed_files([*REAL, text], PartTypes("bfloat16", "float32", "float32"))
    transformer = [path for path in BF16 if path.startswith("transformer")]
    assert mixed == sorted([*SHARED, *transformer, VAE])
    assert text in needed_files([*REAL, text], BFLOAT16)


def test_without_a_variant_the_plain_files_do() -> None:
    assert needed_files([*SHARED, *PLAIN], BFLOAT16) == sorted([*SHARED, *PLAIN])


def test_our_own_extras_come_along() -> None:
    needed = needed_files(tiny_files(), BFLOAT16)
    assert {"latent_rgb.json", "mochi_defaults.json"} <= set(needed)
    assert not {"README.md", "sheet.png"} & set(needed)


@pytest.mark.parametrize("lost", ["model_index.json", "vae/config.json", VAE, PLAIN[5]])
def test_a_repository_that_lacks_a_file_is_refused_by_name(lost: str) -> None:
    paths = [path for path in [*SHARED, *PLAIN] if path != lost]
    with pytest.raises(WeightsError, match=lost) as caught:
        needed_files(paths, FLOAT32)
    assert not caught.value.retry


@pytest.mark.parametrize(
    ("part", "stem", "chosen"),
    [
        ("transformer", "diffusion_pytorch_model", [1, 2]),
        ("text_encoder", "model", [0]),
    ],
)
def test_of_one_file_and_shards_the_library_takes_its_own(
    part: str, stem: str, chosen: list[int]
) -> None:
    names = [
        f"{stem}.safetensors", f"{stem}-00001-of-00001.safetensors",
        f"{stem}.safetensors.index.json",
    ]  # fmt: skip
    assert weight_files(part, names, "float32") == [names[number] for number in chosen]
    assert weight_files(part, names[:2], "float32") == names[:1]


# Texts


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (12_300_000_000, 31_000_000_000, "downloading 12.3 of 31.0 GB"),
        (0, 31_000_000_000, "downloading 0.0 of 31.0 GB"),
        (1_500_000, 25_283_446, "downloading 1.5 of 25.3 MB"),
    ],
)
def test_progress_is_told_in_decimal_units_of_the_total(done: int, total: int, text: str) -> None:
    assert progress_text(Progress(done, total, "")) == text


@pytest.mark.parametrize(
    "event", [Progress(1, 2, "vae/x"), Notice("n"), Done("/f"), Failure("e", True)]
)
def test_an_event_survives_its_line(event: Event) -> None:
    assert encode(event).count("\n") == 1
    assert decode(encode(event)) == event


@pytest.mark.parametrize("line", ["", "Fetching 3 files", "[1]", "{}", '{"a": 1}', "7"])
def test_what_a_library_prints_is_no_event(line: str) -> None:
    assert decode(line) is None


@pytest.mark.parametrize(
    ("number", "words", "retry"),
    [(errno.ENOSPC, "full", True), (errno.EROFS, "HF_HOME", False), (errno.EIO, "disk", True)],
)
def test_a_failing_disk_is_told_with_what_to_do(number: int, words: str, retry: bool) -> None:
    error = explain_failure([OSError(number, os.strerror(number))], Path("/cache"))
    assert "/cache" in str(error)
    assert words in str(error)
    assert error.retry is retry


# The download


def test_the_module_is_light() -> None:
    program = (
        "import sys; import mochi_app.weights.__main__ as w; "
        "assert not {'huggingface_hub', 'pydantic', 'torch'} & set(sys.modules); "
        f"assert w.main(['--model', '{REPO}', '--dtype', 'float32']) == 0; "
        "assert 'huggingface_hub' in sys.modules; "
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIR, check=True, timeout=30)


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


# A folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of a model that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_a_folder_that_is_whole_is_done_at_once(copy: Path, hub: Hub) -> None:
    assert run(str(copy)).folder == copy
    assert not hub.asked


@pytest.mark.parametrize(
    "lost",
    ["model_index.json", "tokenizer/tokenizer.json", "vae/config.json", VAE, TEXT_ENCODER],
)
def test_a_folder_that_lacks_a_file_is_refused_by_name(copy: Path, lost: str) -> None:
    (copy / lost).unlink()
    with pytest.raises(WeightsError, match=lost.replace("tokenizer/", "")) as caught:
        check_folder(copy, FLOAT32, "Copy it")
    assert str(caught.value).endswith("Copy it")


def test_a_truncated_file_is_refused_with_its_sizes(copy: Path) -> None:
    os.truncate(copy / TRANSFORMER, 9 * MB)
    failure = run(str(copy)).failure
    assert f"{TRANSFORMER}: it has 9000000 bytes, its header says 11125496" in failure.error
    assert not failure.retry


@pytest.mark.parametrize(
    "content",
    [b"", bytes(8), b"\x02" + bytes(7) + b"[]", b"\xff" * 16, b"\x02" + bytes(7) + b"{x"],
)
def test_what_is_no_safetensors_file_is_seen(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert safetensors_problem(path) == "its header is damaged"


def test_a_lost_shard_is_seen_by_the_index(variants: dict[str, bytes], copy: Path) -> None:
    for path, content in variants.items():
        (copy / path).write_bytes(content)
    check_folder(copy, BFLOAT16, "")
    shard = sorted((copy / "transformer").glob("*.bf16-*"))[-1]
    shard.unlink()
    check_folder(copy, FLOAT32, "")
    with pytest.raises(WeightsError, match=f"{shard.name}: it is missing"):
        check_folder(copy, BFLOAT16, "")


def test_a_component_in_another_type_only_is_taken(copy: Path) -> None:
    small = copy / "vae" / "diffusion_pytorch_model.bf16.safetensors"
    (copy / VAE).rename(small)
    check_folder(copy, BFLOAT16, "")
    check_folder(copy, FLOAT32, "")
    small.unlink()
    with pytest.raises(WeightsError, match=f"for float32: {VAE}: it is missing"):
        check_folder(copy, FLOAT32, "")


def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    assert "model_index.json" in run(str(tmp_path / "nowhere")).failure.error
    assert not hub.asked


def test_files_of_the_same_content_count_once() -> None:
    files = [RemoteFile("a", 5, "x"), RemoteFile("b", 5, "x"), RemoteFile("c", 1, "y")]
    snapshot = Snapshot(Path("/nowhere"), REPO, "0", files)
    assert snapshot.total == 6
    assert snapshot.progress() == Progress(0, 6, "")


# The parent's side


def pid_command(path: Path) -> tuple[str, ...]:
    """The command, in a process that leaves its id in a file."""
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
        "from mochi_app.weights.__main__ import main; sys.exit(main(sys.argv[2:]))"
    )
    return (sys.executable, "-c", program, str(path))


def ignore(progress: Progress) -> None:
    pass


async def test_the_parent_hears_of_progress_and_gets_the_folder(hub: Hub, home: Path) -> None:
    heard: list[Progress] = []
    folder = await fetch_weights(REPO, FLOAT32, heard.append)
    assert folder == home / "snapshots" / hub.commit
    assert heard[-1].done == heard[-1].total > 25 * MB


async def test_the_parent_may_name_a_folder_relative_to_itself(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert await fetch_weights("model", FLOAT32, ignore) == copy


async def test_the_parent_gets_the_childs_error(hub: Hub) -> None:
    hub.status = 503
    with pytest.raises(WeightsError, match="try again later") as caught:
        await fetch_weights(REPO, FLOAT32, ignore)
    assert caught.value.retry


async def test_a_cancel_takes_the_child_along(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 1 * MB
    seen = asyncio.Event()

    def hear(progress: Progress) -> None:
        if progress.done > 0:
            seen.set()

    pid_file = tmp_path / "pid"
    task = asyncio.create_task(fetch_weights(REPO, FLOAT32, hear, pid_command(pid_file)))
    await asyncio.wait_for(seen.wait(), 20)
    pid = int(pid_file.read_text())
    assert alive(pid)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pid)


async def test_a_cancel_during_the_start_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def slow_spawn(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await spawn(*arguments, **options))
        await asyncio.sleep(0.05)
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow_spawn)
    program = (sys.executable, "-c", "import time; time.sleep(60)")
    task = asyncio.create_task(fetch_weights(REPO, FLOAT32, ignore, program))
    await eventually(lambda: started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(started[0].pid)


async def test_a_child_that_is_killed_is_told_by_its_signal(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 1 * MB
    pid_file = tmp_path / "pid"

    def kill(progress: Progress) -> None:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)

    with pytest.raises(WeightsError, match="killed by SIGKILL") as caught:
        await fetch_weights(REPO, FLOAT32, kill, pid_command(pid_file))
    assert caught.value.retry


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; print('hello'); sys.exit('no such thing')", "code 1 .*no such thing"),
        ("pass", "code 0 and no result"),
        ('print(\'{"event": "done", "folder": "/"}\'); raise SystemExit(3)', "code 3"),
    ],
)
async def test_a_child_without_a_result_is_told_by_its_code(program: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        await fetch_weights(REPO, FLOAT32, ignore, (sys.executable, "-c", program))


async def test_the_child_dies_with_its_parent(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 1 * MB
    pid_file = tmp_path / "pid"
    program = (
        "import asyncio, sys; from mochi_app.weights.fetch import fetch_weights; "
        "from mochi_app.weights.files import PartTypes; "
        f"types, command = PartTypes(*3 * ['float32']), {pid_command(pid_file)!r}; "
        f"asyncio.run(fetch_weights({REPO!r}, types, print, command))"
    )
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), cwd=PROJECT_DIR, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    await parent.stdout.readline()
    pid = int(pid_file.read_text())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await eventually(lambda: not alive(pid), "the end of the child", deadline=3)


def test_a_token_in_the_hubs_address_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:secret@mirror.example:8443/hf")
    assert hub_name() == "https://mirror.example:8443/hf"


async def test_a_child_that_says_nothing_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(3600)"
    )
    command = (sys.executable, "-c", program, str(pid_file))
    with pytest.raises(WeightsError, match="said nothing for 1 seconds") as caught:
        await fetch_weights(REPO, FLOAT32, ignore, command, silence=1)
    assert caught.value.retry
    assert not alive(int(pid_file.read_text()))


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
