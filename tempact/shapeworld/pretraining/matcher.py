"""Pretraining of ShapeWorld's held-out judge on renderings of stories of the training split."""

from __future__ import annotations

import logging
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from tempact.shapeworld.grammar import sample_story, write_instruction
from tempact.shapeworld.matcher import PAD, JudgeConfig, JudgeModel, ShapeWorldJudge
from tempact.shapeworld.pretraining.clips import CORRUPTIONS, corrupt
from tempact.shapeworld.pretraining.course import Course, train
from tempact.shapeworld.pretraining.matcher_clips import ARGUMENTS, EVENTS, NONE, Performance, StoryTable, perform
from tempact.shapeworld.pretraining.matcher_pictures import constant
from tempact.shapeworld.renderer import TRACK, draw
from tempact.shapeworld.story import FRAMES, SHAPES, SIZE, Story

log = logging.getLogger(__name__)

STORIES = 80_000
EVENT_SHARES = (0.25, 0.3, 0.25, 0.2)  # of stories with 1, 2, 3, 4 events
SHARDS = 64  # of the story table, each with its own seed, so that it does not depend on the workers
VALIDATION_STORIES = 120  # a kind of corruption
READ_WEIGHT, TOLD_WEIGHT, WHEN_WEIGHT, BUSY_WEIGHT, STATE_WEIGHT = 0.3, 0.5, 0.1, 0.3, 1.0  # of the auxiliary losses


def told_stories(arguments: tuple[int, int, str]) -> list[tuple[Story, str]]:
    """`count` stories of `split` with their instructions, from `seed`."""
    seed, count, split = arguments
    rng = random.Random(f"judge {split} {seed}")
    counts = rng.choices(range(1, EVENTS + 1), EVENT_SHARES, k=count)
    stories = [sample_story(rng, split, events) for events in counts]
    return [(story, write_instruction(story, rng)) for story in stories]


def fit_tokenizer(texts: list[str]) -> Tokenizer:
    """Words and marks of `texts`, in lower case."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )
    assert tokenizer.token_to_id("[PAD]") == PAD
    return tokenizer


class AuxiliaryHeads(nn.Module):
    """What helps learning and is not shipped: the queries name the events that they read, say when these happen and
    whether they are told right, and how good the picture is; the video tokens say what goes on in their row."""

    def __init__(self, dim: int):
        super().__init__()
        self.kind, self.argument = nn.Linear(dim, NONE + 1), nn.Linear(dim, len(ARGUMENTS))
        self.shape, self.slow = nn.Linear(dim, len(SHAPES)), nn.Linear(dim, 2)
        self.told, self.intact = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.when = nn.Linear(dim, 2 * (FRAMES + 1))
        self.busy, self.state = nn.Linear(dim, NONE + 1), nn.Linear(dim, TRACK)

    def loss(self, show: Performance, read: Tensor, matched: Tensor, video: Tensor) -> Tensor:
        intact = F.binary_cross_entropy_with_logits(self.intact(matched[:, 0]).float().squeeze(-1), show.intact)
        read, matched = read[:, 1:].float(), matched[:, 1:].float()
        known = (show.kinds != NONE).float()
        names = F.cross_entropy(self.kind(read).float().transpose(1, 2), show.kinds)
        pairs = ((self.argument, show.arguments), (self.shape, show.shapes), (self.slow, show.slow.long()))
        for head, label in pairs:
            names = (
                names + (F.cross_entropy(head(read).float().transpose(1, 2), label, reduction="none") * known).mean()
            )
        told = F.binary_cross_entropy_with_logits(
            self.told(matched).float().squeeze(-1), show.told.float(), weight=known
        )
        times = self.when(matched).float().unflatten(-1, (2, -1)).permute(0, 3, 1, 2)
        when = (F.cross_entropy(times, show.when, reduction="none").sum(-1) * known).mean()
        busy = F.cross_entropy(self.busy(video).float().flatten(0, 1), show.busy.flatten())
        scale = constant((SIZE, SIZE, SIZE / 4, 1.0, 1.0, 1.0, 1.0), video.device)
        seen = show.state[..., 3:4].expand_as(show.state).clone()
        seen[..., 3] = 1.0  # the opacity is known even where nothing is seen
        error = (self.state(video).float().view_as(show.state) - show.state / scale).square()
        state = (error * seen).mean()
        told = told + intact
        return READ_WEIGHT * names + TOLD_WEIGHT * told + WHEN_WEIGHT * when + BUSY_WEIGHT * busy + STATE_WEIGHT * state


class JudgeCourse(Course):
    """What the shared training loop needs to know about the judge."""

    name, batch, learning_rate, ema = "judge", 512, 1.5e-3, 0.999

    def __init__(self, seed: int, device: str, workers: int, stories: int = STORIES, batch: int = 512):
        self.device, self.seed, self.batch = device, seed, batch
        jobs = [(seed * 1_000_003 + shard, -(-stories // SHARDS), "train") for shard in range(SHARDS)]
        with ProcessPoolExecutor(workers) as pool:
            pairs = [pair for shard in pool.map(told_stories, jobs) for pair in shard]
        torch.manual_seed(seed)
        tokenizer = fit_tokenizer([text for _, text in pairs])
        model = JudgeModel(JudgeConfig(vocabulary=tokenizer.get_vocab_size()))
        self.judge = ShapeWorldJudge(model.to(device), tokenizer)
        tokens = self.judge.tokenize([text for _, text in pairs])
        self.table = StoryTable.build([story for story, _ in pairs], tokens).to(device)
        self.heads = AuxiliaryHeads(model.config.dim).to(device)
        self.modules = nn.ModuleDict({"judge": model, "heads": self.heads})

    def compile(self) -> None:
        for block in (*self.judge.model.text, *self.judge.model.video, *self.judge.model.matcher):
            block.compile()

    def loss(self, generator: torch.Generator) -> Tensor:
        """Cross-entropy against the soft target, and the auxiliary losses."""
        rows = torch.randint(len(self.table), (self.batch,), generator=generator, device=self.device)
        show = perform(self.table.take(rows), generator)
        logit, read, matched, video = self.judge.model(show.frames, show.tokens)
        score = F.binary_cross_entropy_with_logits(logit, show.target)
        return score + self.heads.loss(show, read, matched, video)

    def save(self, folder: Path) -> None:
        self.judge.save(folder)


def train_judge(
    out: Path, steps: int, seed: int, device: str, resume: bool, workers: int = 1, batch: int = 512
) -> dict[str, float]:
    """Trains the judge into folder `out`; an interrupted run goes on from its checkpoint there when `resume` is set.

    Returns the loop's figures and those of `validate`.
    """
    course = JudgeCourse(seed, device, workers, batch=batch)
    metrics = train(course, out, steps, resume=resume)
    metrics |= validate(ShapeWorldJudge.load(out, device), seed)
    log.info("judge: %s", metrics)
    return metrics


def validate(judge: ShapeWorldJudge, seed: int) -> dict[str, float]:
    """Mean scores of a judge on stories of the validation split, told right and with each kind of corruption of
    `clips.corrupt` (which the training performances do not use), and the correlation of scores and targets."""
    rng = random.Random(seed)
    pairs = told_stories((seed, VALIDATION_STORIES * len(CORRUPTIONS), "validation"))
    shows = [corrupt(story, CORRUPTIONS[i % len(CORRUPTIONS)], rng) for i, (story, _) in enumerate(pairs)]
    tracks = torch.stack([torch.from_numpy(show.tracks) for show in shows])
    shapes = torch.stack([torch.from_numpy(show.shapes) for show in shows])
    frames = draw(tracks, shapes[:, None].expand(-1, FRAMES, -1))
    scores, targets = judge.score(frames, [text for _, text in pairs]), torch.tensor([show.target for show in shows])
    metrics = {"correlation": float(torch.corrcoef(torch.stack([scores, targets]))[0, 1])}
    metrics["error"] = float((scores - targets).abs().mean())
    for kind in CORRUPTIONS:
        own = torch.tensor([show.kind == kind for show in shows])
        metrics[f"score_{kind}"], metrics[f"target_{kind}"] = float(scores[own].mean()), float(targets[own].mean())
    return {name: round(value, 4) for name, value in metrics.items()}
