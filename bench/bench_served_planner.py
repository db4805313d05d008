"""An iteration's plans from vLLM, and from the planner's own sampler beside it on the same GPU.

    PYTHONPATH=tests python -m bench.bench_served_planner FOLDER --vllm COMMAND [--prompts 16] [--plans 4]
    [--tokens 2024] [--repeats 3] [--gpu-memory-utilization 0.4] [--wait 300] [--tiny] [--save FILE] [--flag value ...]

Writes a Qwen3-1.7B of random weights to FOLDER (bench/weights.py), starts vLLM with the command of
docs/planner-server.md, where COMMAND stands for `vllm` and other flags are added, and makes the planner of
`self-forcing` beside it, without end tokens, so that every plan has its full length. Then, as often as --repeats says:
the adapter moves and is published, as in an iteration, and the same plans are asked from the server and from this
process. A repetition before them, in which kernels are compiled, is kept apart.

Told: seconds of all plans, and for both samplers how far their log-probs are from those that are trained, and the
weights of importance; seconds until the server samples with the moved adapter, which is to be below 2, with the canary.
The server's log is FOLDER/vllm.log. --tiny: a small model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rewards.tiny_server import VLLM_ENVIRONMENT, documented_flags, free_port, running

from bench import report, stories, weights
from tempact.cli import parse_run
from tempact.config import RunConfig
from tempact.distributed import Ranks
from tempact.errors import UserError, guarded
from tempact.files import write_atomic
from tempact.planner.planner import Planner, Responder
from tempact.planner.served import ServedSampler
from tempact.reporting import read_environment, record_environment
from tempact.rl.importance import importance_weights
from tempact.types import Prompt

PAGE = Path(__file__).parents[1] / "docs" / "planner-server.md"
DOCUMENTED = "Qwen/Qwen3-1.7B"  # the page's command is for this model
REAL = {"prompts": 16, "plans": 4, "tokens": 2024}
TINY = {"prompts": 2, "plans": 2, "tokens": 24}
TINY_HEADS = {"head_dim": 32}  # the least that vLLM's attention takes on a CPU
# a CPU cannot take back a seeded draw, which a prompt in pieces asks for
TINY_FLAGS = ["--enforce-eager", "--no-enable-chunked-prefill"]
MOVED = 0.01  # deviation by which an adapter moves: far enough for a canary to tell it from the one before
SEED = 11


def write_planner(folder: Path, *, tiny: bool) -> None:
    """A planner of random weights, made anew."""
    sizes = replace(weights.TINY, planner=weights.TINY.planner | TINY_HEADS) if tiny else weights.REAL
    torch.manual_seed(0)
    weights.planner(folder, sizes, "cpu" if tiny else "cuda")
    if not tiny:
        torch.cuda.empty_cache()  # the server looks how much is free


def moved(planner: Planner, seed: int) -> None:
    """The trained adapter, some updates later."""
    generator = torch.Generator(planner.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in planner.parameters().values():
            parameter.add_(MOVED * torch.randn(parameter.shape, generator=generator, device=planner.device))


def seconds_of(run: Callable[[], Any], planner: Planner) -> tuple[float, Any]:
    """Seconds of a call, work on the device included, and what it returns."""

    def wait() -> None:
        if planner.device.type == "cuda":
            torch.cuda.synchronize(planner.device)

    wait()
    began = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - began, result


def published(sampler: ServedSampler, instruction: str) -> dict[str, float | None]:
    """A change to the planner's present adapter: seconds of all, and of writing and loading alone; the canary, nats."""
    seconds, metrics = seconds_of(lambda: sampler.publish(instruction), sampler.planner)
    names = {
        "written_and_loaded_s": "planner/server_swap_s", "canary": "planner/server_canary",
        "canary_others": "planner/server_canary/others",
    }  # fmt: skip
    found = {name: metrics[own] for name, own in names.items()}
    return {"seconds": seconds} | {name: value if math.isfinite(value) else None for name, value in found.items()}


@torch.no_grad()
def sampled(planner: Planner, respond: Responder, prompts: list[Prompt], plans: int) -> dict[str, float]:
    """Seconds of `plans` plans a prompt, and how their log-probs and those that are trained differ: means over tokens
    of the difference's size and of k3, nats; over plans the weight of importance, and the share that is truncated."""
    asked, seeds = planner.requests(prompts, plans, SEED)
    seconds, responses = seconds_of(lambda: respond(asked, seeds), planner)
    tokens = planner.tokens(asked, responses)
    trained, mask = planner.log_probs(tokens), tokens.response_mask
    moves = (trained - tokens.log_probs)[mask].double()
    importance, cut = importance_weights(trained, tokens.log_probs, mask, planner.config.max_importance)
    count = sum(len(response.tokens) for response in responses)
    return {
        "seconds": seconds,
        "tokens": count,
        "tokens_per_second": count / seconds,
        "sampling_gap": moves.abs().mean().item(),
        "sampling_k3": (moves.expm1() - moves).mean().item(),
        "importance": importance.mean().item(),
        "importance_truncated": cut.float().mean().item(),
    }


def repetition(sampler: ServedSampler, prompts: list[Prompt], plans: int, number: int) -> dict[str, Any]:
    """An adapter's change, and plans of both samplers with it."""
    planner = sampler.planner
    moved(planner, number)
    change = published(sampler, prompts[0].text)
    served = sampled(planner, lambda *each: sampler.responses(sampler.begin(*each)), prompts, plans)
    return {"change": change, "served": served, "inside": sampled(planner, planner.respond, prompts, plans)}


def table(found: list[dict[str, Any]]) -> str:
    """Repetitions as lines: medians, all seconds beside them."""
    names = ("tokens_per_second", "sampling_gap", "sampling_k3", "importance", "importance_truncated")
    titles = ("tokens/s", "gap", "k3", "importance", "truncated")
    lines = ["{:<10}{:>9}{:>11}{:>11}{:>11}{:>12}{:>11}   seconds".format("sampler", "s", *titles)]
    for sampler in ("served", "inside"):
        rows = [each[sampler] for each in found]
        middle = {name: statistics.median(row[name] for row in rows) for name in ("seconds", *names)}
        values = (
            f"{middle[name]:{form}}" for name, form in zip(names, (".0f", ".2e", ".2e", ".6f", ".1%"), strict=True)
        )
        every = ", ".join(f"{row['seconds']:.2f}" for row in rows)
        cells = (sampler, f"{middle['seconds']:.2f}", *values)
        lines.append("{:<10}{:>9}{:>11}{:>11}{:>11}{:>12}{:>11}   ".format(*cells) + every)
    for change in (each["change"] for each in found):
        others = "none" if change["canary_others"] is None else f"{change['canary_others']:.2e}"
        own = f"{change['written_and_loaded_s']:.2f} s written and loaded"
        canary = f"canary {change['canary']:.2e} nats, nearest other {others}"
        lines.append(f"adapter changed in {change['seconds']:.2f} s ({own}); {canary}")
    return "\n".join(lines)


def version_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/version", timeout=30) as reply:
        return str(json.loads(reply.read())["version"])


def command_line(model: Path, given: argparse.Namespace, more: list[str], port: int) -> list[str]:
    """The server's command."""
    own = ["--gpu-memory-utilization", str(given.gpu_memory_utilization)] if not given.tiny else TINY_FLAGS
    flags = documented_flags(DOCUMENTED, PAGE)
    return [*shlex.split(given.vllm), "serve", str(model), "--port", str(port), *flags, *own, *more]


def configured(model: Path, url: str, given: argparse.Namespace) -> RunConfig:
    """That of `self-forcing`, whose planner asks the server. UserError for sizes that are not accepted."""
    keys = {
        "planner.weights": model, "planner.max_new_tokens": given.tokens, "planner.plans_per_prompt": given.plans,
        "planner.sampler": "served", "planner.server": url, "planner.server_attempt_s": 600,
        "planner.server_outage_s": 600, "planner.max_sampling_gap": 1e9,
    }  # fmt: skip
    return parse_run(["self-forcing", *(str(word) for key in keys.items() for word in (f"--{key[0]}", key[1]))], "")[0]


def measure(folder: Path, given: argparse.Namespace, more: list[str], save: Callable[[dict[str, Any]], None]) -> None:
    """Starts the server and measures; `save` gets all results after each repetition."""
    port, device = free_port(), "cpu" if given.tiny else "cuda"
    model, url = folder / "planner", f"http://127.0.0.1:{port}"
    config = configured(model, url, given)
    write_planner(model, tiny=given.tiny)
    server = command_line(model, given, more, port)
    # of this process's environment the server has another one's packages in its way
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": ""} | VLLM_ENVIRONMENT
    if os.sep in server[0]:
        own["PATH"] = f"{Path(server[0]).parent}{os.pathsep}{os.environ['PATH']}"  # it calls tools of its environment
    began = time.monotonic()
    with running(server, port, folder / "vllm.log", own, given.wait):
        print(f"vLLM {version_of(url)} answers after {time.monotonic() - began:.0f} s", flush=True)
        torch.manual_seed(0)
        executor = config.executor
        planner = Planner.load(model, config.planner, executor.frames, executor.chunk_frames, device=device)
        planner.generation.eos_token_id = []  # every plan has all of its tokens
        sampler = ServedSampler(planner, folder / "served", Ranks())
        prompts = [Prompt(str(number), stories.instruction(number)) for number in range(given.prompts)]
        about, found = described(folder, given, server, version_of(url)), []
        for number in range(given.repeats + 1):
            found.append(repetition(sampler, prompts, given.plans, number))
            counted = found[1:]
            if not given.tiny:
                about["trainer_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
            save(about | {"first": found[0], "measured": counted})
            print(f"repetition {number}" + " (not counted)" * (not number), table(found[-1:]), sep="\n", flush=True)
        sampler.close()
    print(f"median of {len(counted)}", table(counted), sep="\n", flush=True)


def described(folder: Path, given: argparse.Namespace, server: list[str], vllm: str) -> dict[str, Any]:
    """What was run, on what."""
    record_environment(folder, 0)
    session = read_environment(folder)[-1]
    given_words = ["COMMAND" if word == given.vllm else word for word in sys.argv[1:]]
    flags = server[server.index("serve") :]
    return {
        "command": f"PYTHONPATH=tests {report.command('bench.bench_served_planner', given_words)}",
        "server": report.command("vllm", flags).removeprefix("python -m "),
        "commit": report.commit(),
        "device": "cpu" if given.tiny else session.gpus[0],
        "hardware": f"{session.cpu} ({session.cores} cores), {session.memory_gib:.0f} GiB memory",
        "versions": session.versions | {"vllm": vllm},
        "prompts": given.prompts,
        "plans": given.prompts * given.plans,
        "tokens_of_a_plan": given.tokens,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of the weights, the adapters and the server's log")
    parser.add_argument("--vllm", required=True, help="what starts vLLM, as it stands before `serve`")
    for name, value in REAL.items():
        parser.add_argument(f"--{name}", type=int, help=f"{value}; {TINY[name]} of --tiny")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions that are counted")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4, help="share of the GPU's memory for vLLM")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds in which vLLM must have started")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--save", type=Path, help="results file")
    given, more = parser.parse_known_args(argv)
    if not given.tiny and not torch.cuda.is_available():
        raise UserError("bench_served_planner: found no GPU; accepted: one of 80 GB or more, --tiny")
    for name, value in (TINY if given.tiny else REAL).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    for name in (*REAL, "repeats"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name}: found {getattr(given, name)}; accepted: at least 1")
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def save(results: dict[str, Any]) -> None:
        if given.save is not None:
            given.save.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(given.save, json.dumps(results, indent=1) + "\n")

    measure(folder, given, more, save)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))  # a signal is an exception, and the server is ended
