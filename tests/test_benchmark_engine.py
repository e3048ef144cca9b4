"""The engine's benchmark runs, counts what the plan counts, and refuses what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import engine

SMALLEST = ["--device", "cpu", "--steps", "1", "--height", "32", "--width", "32"]
SMALLEST += ["--num-frames", "7", "--layers", "2"]


def test_it_measures_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "engine.json"
    engine.main([*SMALLEST, "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["layers"] == 2
    one = found["ranks"]["1"]
    assert one["mesh"] == [1, 1]
    assert one["sent"] == one["plan_sent"] == [0]
    assert one["peak"] > 0
    assert one["step"]["tflops"] > 0
    for stage in ("step", "decode"):
        assert one[stage]["speed_up"] == 1
        assert one[stage]["plan"] == pytest.approx(one[stage]["together"])  # it is its own measure
        assert len(one["turns"][0][stage]["together"]) == 1
    printed = capsys.readouterr().out
    assert "tiny, 2 layers, 7 frames of 32x32, float32" in printed
    assert "matmul TFLOP/s" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "5"], "12 attention heads cannot be split over 5 ranks"),
        (["--height", "90"], "height 90: expected a multiple of 16"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--device", "cuda", "--ranks", "99"], "--ranks 99: there are "),
    ],
)
def test_what_cannot_be_measured_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        engine.main([*SMALLEST, *options])
    assert message in capsys.readouterr().err
