"""Videos named as VBench reads them.

VBench's own prompts: `<prompt>-<index>.mp4`, five of each prompt. A prompt that no file name can hold (too long, or
with a slash) gets its prompt_id instead; for such prompts, and for any others, `<condition>-prompts.json` maps every
file to its prompt, as VBench's mode `custom_input` takes it with `--prompt_file`.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from tempact.evaluation.harness import Evaluation
from tempact.files import safe_name, write_atomic

log = logging.getLogger(__name__)

FOLDER, PROMPTS = "vbench", "prompts.json"
NAME_BYTES = 255  # longest file name of usual file systems
SAMPLES = 5  # videos of a prompt that VBench's standard mode wants


def export_vbench(evaluation: Evaluation) -> list[Path]:
    """Copies the videos of a finished evaluation to vbench/<condition>/; returns these folders."""
    suite = evaluation.suite
    if suite.seeds != SAMPLES:
        log.warning("vbench: %d videos of a prompt; VBench's standard mode wants --seeds %d", suite.seeds, SAMPLES)
    made, renamed = [], 0
    for method in suite.methods:
        target = evaluation.folder / FOLDER / safe_name(method.name)
        target.mkdir(parents=True, exist_ok=True)
        told: dict[str, str] = {}
        for prompt in suite.all_prompts:
            for seed in range(suite.seeds):
                video = evaluation.video(method, prompt, seed)
                assert video is not None, (prompt.prompt_id, method.name, seed)
                name = f"{prompt.text}-{seed}.mp4"
                if "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > NAME_BYTES:
                    name, renamed = f"{prompt.prompt_id}-{seed}.mp4", renamed + 1
                # beside the folder, as the list below: VBench takes every file in it for a video
                partial = target.parent / f".{target.name}-{prompt.prompt_id}-{seed}.partial"
                shutil.copyfile(evaluation.folder / video["file"], partial)
                partial.replace(target / name)
                told[name] = prompt.text
        write_atomic(target.parent / f"{target.name}-{PROMPTS}", json.dumps(told, indent=1, ensure_ascii=False))
        made.append(target)
    if renamed:
        log.warning("vbench: %d videos have a prompt that is no file name; evaluate with --prompt_file", renamed)
    return made
