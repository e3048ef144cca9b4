"""Jobs as plain data, for the pure functions of scheduling."""

from __future__ import annotations

from mochi_app.jobs import Job


def job(name: str, *, at: float = 0.0, steps: int = 8, guidance_scale: float = 4.5) -> Job:
    return Job(
        id=name,
        kind="preview",
        prompt="p",
        negative_prompt="",
        seed=0,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=64,
        width=64,
        num_frames=7,
        fps=12,
        submitted_at=at,
    )


def one_second_a_step(job: Job) -> float:
    return float(job.num_inference_steps)
