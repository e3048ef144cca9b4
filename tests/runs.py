"""Requests as a slot is sent them."""

from __future__ import annotations

from mochi_app.messages import Run


def request(prompt: str = "a prompt", job_id: str = "job", steps: int = 4, seed: int = 1) -> Run:
    return Run(
        job_id=job_id,
        prompt=prompt,
        negative_prompt="",
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=1.0,
        height=64,
        width=64,
        num_frames=7,
        fps=12,
    )
