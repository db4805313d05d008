"""The videos that a run keeps to be looked at: held-out prompts before and after, worst and best samples.

`videos/index.json` lists the prompts with their files, in the order shown; file names are relative to `videos/`:
[{"prompt_id", "category", "prompt", "strip",
  "videos": [{"title", "mp4", "gif", "plan": [{"start", "end", "prompt"}]}]}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tempact.files import safe_name, write_atomic
from tempact.reporting.records import SAMPLES
from tempact.types import Plan, PlanBatch, Prompt, Rollout, Scored
from tempact.video import StripRow, film_strip, save_gif, save_mp4, save_strip

VIDEOS, INDEX = "videos", "index.json"
EXTREMES = 3  # worst and best videos of a sample table


class HeldOutVideo(Protocol):
    """frames uint8 [F, 3, height, width]."""

    @property
    def method(self) -> str: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def frames(self) -> Tensor: ...


def write_showcase(run_folder: Path, videos: Sequence[HeldOutVideo], titles: Mapping[str, str]) -> Path:
    """mp4, GIF and one film strip a prompt, with a row for each method in `titles`, in that order.

    `titles` maps a method to how its row is called ("step-prompt": "before"); other methods are left out.
    """
    folder = Path(run_folder) / VIDEOS
    index = []
    prompts = {video.prompt.prompt_id: video.prompt for video in videos if video.method in titles}
    for number, prompt in enumerate(prompts.values()):
        own = {video.method: video for video in videos if video.prompt.prompt_id == prompt.prompt_id}
        shown = [(titles[method], own[method]) for method in titles if method in own]
        stem = f"{number:02d}-{safe_name(prompt.category or 'prompt')}"
        rows = [StripRow(title, video.frames, video.plan.steps) for title, video in shown]
        save_strip(film_strip(rows, prompt.text), folder / f"{stem}.png")
        entries = []
        for title, video in shown:
            name = f"{stem}-{safe_name(title)}"
            save_mp4(video.frames, folder / f"{name}.mp4")
            save_gif(video.frames, folder / f"{name}.gif")
            plan = [asdict(step) for step in video.plan.steps]
            entries.append({"title": title, "mp4": f"{name}.mp4", "gif": f"{name}.gif", "plan": plan})
        index.append(
            {
                "prompt_id": prompt.prompt_id,
                "category": prompt.category,
                "prompt": prompt.text,
                "strip": f"{stem}.png",
                "videos": entries,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / INDEX, json.dumps(index, indent=1))
    return folder / INDEX


def write_extremes(run_folder: Path, step: int, plans: PlanBatch, rollout: Rollout, scored: Scored) -> list[Path]:
    """samples/step-000040-worst.png and -best.png: the continuations with the least and the most temporal
    following. Missing scores are neither; nothing is written when all are missing."""
    following = scored.temporal_following.flatten()
    order = [i for i in torch.argsort(following).tolist() if not following[i].isnan()]
    continuations = scored.temporal_following.shape[1]
    paths = []
    shown = min(EXTREMES, max(1, len(order) // 2))  # none is both, but for a single one
    for name, chosen in (("worst", order[:shown]), ("best", order[::-1][:shown])):
        rows = []
        for i in chosen:
            p, n = divmod(i, continuations)
            title = f"{following[i].item():.2f}  {plans.prompt_of(p).text}"
            rows.append(StripRow(title, rollout.frames[p, n], plans.plans[p].steps))
        if rows:
            path = Path(run_folder) / SAMPLES / f"step-{step:06d}-{name}.png"
            save_strip(film_strip(rows, f"{name.capitalize()} of iteration {step}, by temporal following"), path)
            paths.append(path)
    return paths
