"""Pretraining of ShapeWorld's held-out judge on performances of stories of the training split.

Its validation uses corruptions of one kind each, which the training performances do not use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from tempact.shapeworld.grammar import sample_story, write_instruction
from tempact.shapeworld.matcher import PAD, JudgeConfig, JudgeModel, ShapeWorldJudge
from tempact.shapeworld.pretraining import Course, draw_parts
from tempact.shapeworld.pretraining.clips import NONE, Scene, constant, relaxed_cues, shape_indices, tell
from tempact.shapeworld.pretraining.matcher_clips import ARGUMENTS, EVENTS, Performance, StoryTable, perform
from tempact.shapeworld.story import (
    CHUNK,
    CHUNKS,
    COLOURS,
    COLUMNS,
    FRAMES,
    OPACITY,
    ROWS,
    SHAPES,
    SIZE,
    TRACK,
    Entity,
    Story,
    draw,
    entity_track,
)

STORIES = 80_000
EVENT_SHARES = (0.25, 0.3, 0.25, 0.2)  # of stories with 1, 2, 3, 4 events
PARTS = 64  # of the story table, each with its own seed
VALIDATION_STORIES = 120  # a kind of corruption
READ_WEIGHT, TOLD_WEIGHT, WHEN_WEIGHT, BUSY_WEIGHT, STATE_WEIGHT = 0.3, 0.5, 0.1, 0.3, 1.0  # of the auxiliary losses
EVENT_FAULTS = ("shuffled", "missing", "cut", "overlapping", "pace", "argument")
PICTURE_FAULTS = ("duplicated", "misplaced")
CORRUPTIONS = ("truth", *EVENT_FAULTS, *PICTURE_FAULTS, "frozen")
DAMAGED = 0.3  # share of the score that a picture fault leaves


def told_stories(seed: int, count: int, split: str = "train") -> list[tuple[Story, str]]:
    """`count` stories of `split` with their instructions, from `seed`."""
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
    """Predictions that help learning and are not shipped. The queries name the events that they read, their times,
    whether they are told right, and how good the picture is; the video tokens tell the event and the state of their
    row."""

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
            loss = F.cross_entropy(head(read).float().transpose(1, 2), label, reduction="none")
            names = names + (loss * known).mean()
        told = F.binary_cross_entropy_with_logits(
            self.told(matched).float().squeeze(-1), show.told.float(), weight=known
        )
        times = self.when(matched).float().unflatten(-1, (2, -1)).permute(0, 3, 1, 2)
        when = (F.cross_entropy(times, show.when, reduction="none").sum(-1) * known).mean()
        busy = F.cross_entropy(self.busy(video).float().flatten(0, 1), show.busy.flatten())
        scale = constant((SIZE, SIZE, SIZE / 4, 1.0, 1.0, 1.0, 1.0), video.device)
        seen = show.state[..., OPACITY, None].expand_as(show.state).clone()
        seen[..., OPACITY] = 1.0  # the opacity is known even where nothing is seen
        error = (self.state(video).float().view_as(show.state) - show.state / scale).square()
        state = (error * seen).mean()
        told = told + intact
        return READ_WEIGHT * names + TOLD_WEIGHT * told + WHEN_WEIGHT * when + BUSY_WEIGHT * busy + STATE_WEIGHT * state


class JudgeCourse(Course):
    """The judge with its auxiliary heads, for the shared training loop."""

    name, batch, learning_rate, ema = "judge", 512, 1.5e-3, 0.999

    def __init__(self, seed: int, device: str, workers: int = 1, stories: int = STORIES):
        self.device, self.seed = device, seed
        pairs = draw_parts(told_stories, seed, stories, PARTS, workers)
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
        rows = torch.randint(len(self.table.tracks), (self.batch,), generator=generator, device=self.device)
        show = perform(self.table.take(rows), generator)
        logit, read, matched, video = self.judge.model(show.frames, show.tokens)
        score = F.binary_cross_entropy_with_logits(logit, show.target)
        return score + self.heads.loss(show, read, matched, video)

    def save(self, folder: Path) -> None:
        self.judge.save(folder)

    def figures(self, folder: Path) -> dict[str, float]:
        """Mean scores on stories of the validation split, told right and with each kind of corruption, and the
        correlation and mean difference of scores and targets."""
        rng = random.Random(self.seed)
        pairs = told_stories(self.seed, VALIDATION_STORIES * len(CORRUPTIONS), "validation")
        shows = [corrupt(story, CORRUPTIONS[i % len(CORRUPTIONS)], rng) for i, (story, _) in enumerate(pairs)]
        judge = ShapeWorldJudge.load(folder, self.device)
        scores = judge.score(draw_corrupted(shows), [text for _, text in pairs])
        targets = torch.tensor([show.target for show in shows])
        metrics = {"correlation": float(torch.corrcoef(torch.stack([scores, targets]))[0, 1])}
        metrics["error"] = float((scores - targets).abs().mean())
        for kind in CORRUPTIONS:
            own = torch.tensor([show.kind == kind for show in shows])
            metrics[f"score_{kind}"], metrics[f"target_{kind}"] = float(scores[own].mean()), float(targets[own].mean())
        return {name: round(value, 4) for name, value in metrics.items()}


class Corruption(NamedTuple):
    """A story gone wrong in one way.

    kind: one of CORRUPTIONS. scene: entities and cues. copy: an extra entity and the frame it comes at. target: share
    of the events told completely, at the right pace and after all events before them, times DAMAGED for a picture
    fault.
    """

    kind: str
    scene: Scene
    copy: tuple[Entity, int] | None
    target: float


def corrupt(story: Story, kind: str, rng: random.Random) -> Corruption:
    """The story told with one kind of fault; without an event where the story offers no such fault."""
    entities, cues = story.entities, relaxed_cues(story, rng)
    count = len(cues)
    one, right = rng.randrange(count), [True] * count
    event, changed, copy = story.events[one], None, None
    if kind == "shuffled" and count > 1:
        order = list(range(count))
        while order == sorted(order):
            order = rng.sample(range(count), count)
        cues = relaxed_cues(replace(story, events=tuple(story.events[i] for i in order)), rng)
        place = {i: at for at, i in enumerate(order)}
        right = [all(place[j] < place[i] for j in range(i)) for i in range(count)]
    elif kind == "overlapping" and count > 1:
        one = rng.randrange(1, count)
        changed = replace(cues[one], start=cues[one - 1].start)
    elif kind == "cut" and any(event.slow for event in story.events):
        one = rng.choice([i for i, event in enumerate(story.events) if event.slow])
        changed = replace(cues[one], stop=cues[one].start + rng.choice((CHUNK, 2 * CHUNK)))
    elif kind == "pace" and event.kind not in ("jump", "blink"):
        other_pace = replace(event, slow=not event.slow)
        if cues[one].start + other_pace.frames <= FRAMES:
            changed = replace(cues[one], event=other_pace)
    elif kind == "argument" and event.kind in ("move", "turn"):
        names = COLUMNS if event.kind == "move" else tuple(COLOURS)
        other = rng.choice([name for name in names if name != event.argument])
        changed = replace(cues[one], event=replace(event, argument=other))
    elif kind == "duplicated":
        actor, start = rng.choice(entities), rng.choice((0, CHUNK * rng.randrange(CHUNKS - 1)))
        column = rng.choice([column for column in range(len(COLUMNS)) if column != actor.column])
        copy = replace(actor, column=column, visible=True, row=rng.randrange(len(ROWS))), start
    elif kind == "misplaced":
        index = rng.randrange(len(entities))
        wrong = [column for column in range(len(COLUMNS)) if column != entities[index].column]
        moved = replace(entities[index], column=rng.choice(wrong))
        entities = (*entities[:index], moved, *entities[index + 1 :])
    elif kind == "frozen":
        cues, right = [], [False] * count
    if changed is not None:
        cues[one], right[one] = changed, False
    if kind in EVENT_FAULTS and all(right):
        dropped = set(rng.sample(range(count), rng.randint(1, max(1, count - 1))))
        cues = [cue for i, cue in enumerate(cues) if i not in dropped]
        kind, right = "missing", [i not in dropped for i in range(count)]
    damage = DAMAGED if kind in PICTURE_FAULTS else 1.0
    return Corruption(kind, (entities, cues), copy, sum(right) / count * damage)


def corrupted_tracks(shows: Sequence[Corruption]) -> tuple[Tensor, Tensor]:
    """Tracks [V, F, E, TRACK] and shapes [V, E] of corrupted stories; the last entity is the copy, if there is one."""
    scenes = [show.scene for show in shows]
    tracks, shapes = F.pad(tell(scenes), (0, 0, 0, 1)), F.pad(shape_indices(scenes), (0, 1))
    for video, show in enumerate(shows):
        if show.copy is not None:
            entity, start = show.copy
            tracks[video, start:, -1] = torch.tensor(entity_track(entity))
            shapes[video, -1] = SHAPES.index(entity.shape)
    return tracks, shapes


def draw_corrupted(shows: Sequence[Corruption]) -> Tensor:
    """Videos [V, F, 3, SIZE, SIZE] of corrupted stories."""
    tracks, shapes = corrupted_tracks(shows)
    return draw(tracks, shapes[:, None].expand(-1, FRAMES, -1))
