"""`transformers serve` or `vllm serve` in a process of its own, with a tiny Qwen3 or Qwen3-VL made on the spot.

The models have random weights and say what no judge would; Qwen3 can learn an answer by heart, in a second.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

START_S = 120.0
VLLM = "TEMPACT_VLLM"  # names an executable: vLLM is in an environment of its own
DOCUMENTED = Path(__file__).parents[2] / "docs" / "judges.md"
# small enough for a CPU, on which vLLM's attention knows heads of 32 or more
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = ("<think>", "</think>")
UNTHINKING = (  # as in Qwen3's own template
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
LOCAL = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}


def make_tokenizer(raw: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Bytes, or `raw`, and the special tokens."""
    if raw is None:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = token_decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = TEMPLATE
    return fast


def _sizes(tokens: int) -> dict[str, int]:
    return {
        "vocab_size": tokens, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 8192,
    }  # fmt: skip


def _teach(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, answer: str, steps: int) -> None:
    """Makes the model say `answer` after any question; one of local attention after long ones, too."""
    if not answer:
        return
    bare = answer.rpartition(THOUGHT[1])[2]  # what is said where the template forbids thoughts
    words = [tokenizer(f"{said}<|im_end|>", return_tensors="pt").input_ids for said in (answer, bare)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    letters, longest = "abcdefghijklmnopqrstuvwxyz 0123456789", 200 if model.config.use_sliding_window else 40
    for step in range(steps):
        text = "".join(letters[int(i)] for i in torch.randint(len(letters), (5 + step % longest,)))
        chat = [{"role": "system", "content": "Score the plan."}, {"role": "user", "content": text}]
        question = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, enable_thinking=step % 2 == 0
        ).input_ids
        labels = torch.cat([torch.full_like(question, -100), words[step % 2]], 1)
        model(input_ids=torch.cat([question, words[step % 2]], 1), labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        falling.step()


def make_text_model(folder: Path, answer: str = "", *, thinks: bool = False) -> None:
    """Qwen3, two layers of width 32. thinks: its tokenizer has tokens around thoughts, which its template can forbid;
    it attends to what is near alone, so that its answer does not hang on the question's length."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if thinks:
        tokenizer.add_tokens(list(THOUGHT))
        tokenizer.chat_template = TEMPLATE + UNTHINKING
    model = Qwen3ForCausalLM(Qwen3Config(**_sizes(len(tokenizer)), **(LOCAL if thinks else {})))
    _teach(model, tokenizer, answer, 600 if thinks else 250)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_video_model(folder: Path) -> None:
    """Qwen3-VL, two layers of width 32, and a vision tower of two. Who loads its processor needs torchvision."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    text = _sizes(len(tokenizer)) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    }
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
        "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "processor_class": "Qwen3VLProcessor"}
    image = {"image_processor_type": "Qwen2VLImageProcessorFast"}
    image |= patches | {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    video = {"video_processor_type": "Qwen3VLVideoProcessor"} | patches
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[int]:
    """The port of a server that has loaded the model of `folder`."""
    port = port or free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port),
               "--host", "127.0.0.1", "--device", "cpu"]  # fmt: skip
    with running(command, port, folder.parent / f"{folder.name}.log", {}):
        yield port


def documented_flags(model: str, page: Path = DOCUMENTED) -> list[str]:
    """Flags of the command on a page that serves a model, without its port."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if f"vllm serve {model} " in line]
    words = shlex.split(line.partition(model)[2])
    at = words.index("--port")
    return words[:at] + words[at + 2 :]


@contextmanager
def serving_vllm(folder: Path, model: str, port: int = 0, flags: Sequence[str] = ()) -> Iterator[int]:
    """Likewise of vLLM's server (the executable that the variable VLLM names), started as documented for `model`, or
    with these flags."""
    port = port or free_port()
    flags = flags or documented_flags(model)
    command = [os.environ[VLLM], "serve", str(folder), "--port", str(port), "--enforce-eager", *flags]
    path = f"{Path(os.environ[VLLM]).parent}{os.pathsep}{os.environ['PATH']}"  # it calls tools of its environment
    own = VLLM_ENVIRONMENT | {"PATH": path, "PYTHONPATH": ""}  # which is of this environment
    with running(command, port, folder.parent / f"{folder.name}.log", own):
        yield port


@contextmanager
def running(command: list[str], port: int, log: Path, own: dict[str, str], start_s: float = START_S) -> Iterator[None]:
    """Inside, a server runs that has answered on /health; own: its variables beside those of this process.

    Raises AssertionError with the log's end where it ends, or does not answer within `start_s`.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | own
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            _wait(port, process, log, start_s)
            yield
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()


def _wait(port: int, process: subprocess.Popen, log: Path, start_s: float) -> None:
    end = time.monotonic() + start_s
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"no server within {start_s} s: {log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
