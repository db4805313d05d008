"""ShapeWorld's held-out judges: a small learned model that scores the share of an instruction that a video shows, and
`clearness` of pictures.

Neither is ever a training reward, and they share nothing with the verifier. From pixels and the raw instruction the
model predicts the share of the events told right, in order and at the right pace, with an intact picture, as learned
from renderings (`pretraining/matcher.py`). A convolutional frame encoder and a text transformer feed a few queries, one
for each event and one for the whole, which read first the text and then the video.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tempact.errors import UserError
from tempact.shapeworld.story import (
    COLOURS,
    COLUMN_X,
    FRAMES,
    JUMP_HEIGHT,
    RADII,
    ROW_Y,
    ROWS,
    SHAPES,
    SIZE,
    SLOW_FRAMES,
    TRACK,
    coverage,
)

WEIGHTS = Path(__file__).parent / "weights" / "judge"
PAD = 0  # token id
SCORE_BATCH = 128  # videos a forward pass of `ShapeWorldJudge.score`


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes. `queries` is one for the whole instruction and one for each event."""

    vocabulary: int
    text_tokens: int = 128
    dim: int = 96
    heads: int = 4
    text_layers: int = 2
    video_layers: int = 2
    match_layers: int = 3
    queries: int = 5


class Attention(nn.Module):
    """Multi-head attention of `x` [V, Q, D] to `memory` [V, K, D]; `mask` [V, K] is False at padding."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then attention to `memories` further sequences, then an MLP."""

    def __init__(self, dim: int, heads: int, memories: int = 0):
        super().__init__()
        self.own = Attention(dim, heads)
        self.cross = nn.ModuleList(Attention(dim, heads) for _ in range(memories))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 + memories))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None, *memories: tuple[Tensor, Tensor | None]) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.own(normed, normed, mask)
        for attention, norm, (memory, memory_mask) in zip(self.cross, self.norms[1:], memories, strict=False):
            x = x + attention(norm(x), memory, memory_mask)
        return x + self.mlp(self.norms[-1](x))


class FrameEncoder(nn.Module):
    """Frames [V, F, 3, 24, 24] to one token for the upper and one for the lower half: [V, F * 2, D].

    A convolution over neighbouring frames makes changes visible to a single token.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 24, 4, 2, 1), nn.GELU(), nn.Conv2d(24, 48, 4, 2, 1), nn.GELU())
        cells = SIZE // 4
        half = 48 * cells * cells // len(ROWS)
        self.pool = nn.Sequential(nn.Linear(half, dim), nn.GELU(), nn.Linear(dim, dim))
        self.time = nn.Sequential(nn.Conv1d(dim, dim, 5, padding=2), nn.GELU(), nn.Conv1d(dim, dim, 5, padding=2))
        self.position = nn.Parameter(torch.randn(FRAMES, len(ROWS), dim) * 0.2)

    def forward(self, frames: Tensor) -> Tensor:
        videos = len(frames)
        cells = self.convolutions(frames.flatten(0, 1) * 2 - 1)
        halves = cells.unflatten(2, (len(ROWS), -1)).transpose(1, 2).flatten(2)
        tokens = self.pool(halves).unflatten(0, (videos, -1))  # [V, F, 2, D]
        rows = tokens.permute(0, 2, 3, 1).flatten(0, 1)  # time last
        changes = self.time(rows).unflatten(0, (videos, -1)).permute(0, 3, 1, 2)
        return (tokens + changes + self.position).flatten(1, 2)


class JudgeModel(nn.Module):
    """Scores videos against tokenised instructions."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.config, dim, heads = config, config.dim, config.heads
        self.words = nn.Embedding(config.vocabulary, dim, padding_idx=PAD)
        self.phrases = nn.Conv1d(dim, dim, 5, padding=2)  # binds "slowly", "moves", "left" before any attention
        self.places = nn.Parameter(torch.randn(config.text_tokens, dim) * 0.2)
        self.text = nn.ModuleList(Block(dim, heads) for _ in range(config.text_layers))
        self.text_norm = nn.LayerNorm(dim)
        self.frames = FrameEncoder(dim)
        self.video = nn.ModuleList(Block(dim, heads) for _ in range(config.video_layers))
        self.video_norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(config.queries, dim) * 0.5)
        self.reader = Block(dim, heads, memories=1)
        self.matcher = nn.ModuleList(Block(dim, heads, memories=2) for _ in range(config.match_layers))
        self.out_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, frames: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """frames [V, F, 3, 24, 24] in [0, 1], tokens [V, L] with PAD.

        Returns the logit of the score [V] and, for the auxiliary losses of training, the queries after the text
        [V, Q, D], the queries after the video [V, Q, D] and the video tokens [V, F * 2, D].
        """
        mask = tokens != PAD
        words = self.words(tokens)
        text = words + self.phrases(words.mT).mT + self.places[: tokens.shape[1]]
        for block in self.text:
            text = block(text, mask)
        text = self.text_norm(text)
        video = self.frames(frames)
        for block in self.video:
            video = block(video)
        video = self.video_norm(video)
        read = self.reader(self.queries.expand(len(frames), -1, -1), None, (text, mask))
        matched = read
        for block in self.matcher:
            matched = block(matched, None, (text, mask), (video, None))
        matched = self.out_norm(matched)
        return self.head(matched[:, 0]).squeeze(-1).float(), read, matched, video


class ShapeWorldJudge:
    """The judge with its tokenizer."""

    def __init__(self, model: JudgeModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, folder: Path = WEIGHTS, device: str | torch.device = "cpu") -> ShapeWorldJudge:
        """Reads judge.safetensors, config.json and tokenizer.json. Raises UserError for a missing file."""
        files = [folder / name for name in ("judge.safetensors", "config.json", "tokenizer.json")]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: not found; accepted: a folder that ShapeWorld's pretraining wrote")
        with torch.random.fork_rng(devices=[]):  # initial weights draw from the run's generator, and are overwritten
            model = JudgeModel(JudgeConfig(**json.loads(files[1].read_text(encoding="utf-8"))))
        model.load_state_dict({name: value.float() for name, value in load_file(files[0]).items()})
        return cls(model.to(device), Tokenizer.from_file(str(files[2])))

    def save(self, folder: Path) -> None:
        """Writes the files that `load` reads, weights in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().half().contiguous().cpu() for name, value in self.model.state_dict().items()}
        save_file(weights, folder / "judge.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.model.config), indent=1) + "\n", encoding="utf-8")
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def tokenize(self, instructions: list[str]) -> Tensor:
        """Token ids [V, L] padded with PAD. Raises UserError for an instruction longer than the model's limit."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(instructions)]
        limit = self.model.config.text_tokens
        for row, own in enumerate(ids):
            if not 0 < len(own) <= limit:
                raise UserError(f"instruction {row}: found {len(own)} words and marks; accepted: 1 to {limit}")
        tokens = torch.full((len(ids), max(map(len, ids), default=1)), PAD)
        for row, own in enumerate(ids):
            tokens[row, : len(own)] = torch.tensor(own)
        return tokens

    @torch.no_grad()
    def score(self, frames: Tensor, instructions: list[str]) -> Tensor:
        """Share of each instruction that its video shows: [V] in [0, 1], on the frames' device.

        frames [V, F, 3, 24, 24] in [0, 1]; one instruction a video.
        """
        assert len(frames) == len(instructions) and frames.shape[1:] == (FRAMES, 3, SIZE, SIZE)
        device = self.model.places.device
        tokens = self.tokenize(instructions).to(device)
        parts = zip(frames.split(SCORE_BATCH), tokens.split(SCORE_BATCH), strict=True)
        scores = [self.model(video.to(device, torch.float32), text)[0].sigmoid() for video, text in parts]
        return torch.cat(scores).to(frames.device)


BANDS = (slice(0, 11), slice(11, SIZE))  # pixel lines of the rows, which a shape does not leave, also while it jumps
GRID = 0.25  # pixels between two drawings of a shape that moves, grows or jumps
VIDEOS_A_PASS = 4  # bounds memory, and fits caches


@torch.no_grad()
def clearness(frames: Tensor) -> Tensor:
    """How close videos are to exact drawings of ShapeWorld: [V] in [0, 1], on the frames' device.

    1 - sqrt(error / drawn): each row of each frame is compared with all drawings of one shape, in the middle of any
    event too. `error` is the squared distance to the closest one, `drawn` the energy of that one, each summed over the
    video. So fainter pictures are no clearer: an empty video scores 0, and an empty frame counts for nothing.

    frames [V, F, 3, 24, 24] in [0, 1]. No shape is tracked and no story is known.
    """
    return torch.cat([_clearness(videos.float()) for videos in frames.split(VIDEOS_A_PASS)])


def _clearness(frames: Tensor) -> Tensor:
    error, drawn = frames.square().sum((1, 2, 3, 4)), torch.zeros(len(frames), device=frames.device)
    pure, mixed = _colours(frames.device)
    for row, lines in enumerate(BANDS):
        drawings, still = _drawings(row, frames.device)
        reach = drawings.norm(dim=0)
        seen = frames[:, :, :, lines].flatten(3) @ (drawings / reach)  # [V, F, 3, D]
        found = [_closest(seen, reach, pure), _closest(seen[..., :still], reach[:still], mixed)]
        explained, amount = (torch.stack(each) for each in zip(*found, strict=True))
        best, which = explained.max(0)
        error -= best.sum(1)
        drawn += amount.gather(0, which[None])[0].square().sum(1)
    return (1.0 - (error.clamp_min(0.0) / drawn.clamp_min(1e-6)).sqrt()).clamp_min(0.0) * (drawn > 0.0)


def _closest(seen: Tensor, reach: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Of the drawing that is closest: the energy of the picture that it explains, and its own norm. Both [V, F].

    seen [V, F, 3, D]: products with drawings of unit norm; reach [D]: their norms at full opacity; colours [C, 3].
    """
    norms = colours.norm(dim=1, keepdim=True)
    wanted = (colours / norms) @ seen  # [V, F, C, D]: the norm that explains most
    amount = torch.minimum(wanted, norms * reach).clamp_min(0.0)  # at no more than full opacity
    best, which = (amount * (2.0 * wanted - amount)).flatten(2).max(-1)
    return best, amount.flatten(2).gather(2, which[..., None])[..., 0]


@cache
def _drawings(row: int, device: torch.device) -> tuple[Tensor, int]:
    """Drawings [pixels of the row, D] in white, and how many of them, the first ones, are of shapes that stand."""

    def steps(values: Sequence[float]) -> list[float]:
        return torch.arange(min(values), max(values) + GRID, GRID).tolist()

    y, radii = ROW_Y[row], tuple(RADII.values())
    looks = [(x, y, radius) for x in COLUMN_X for radius in radii]
    still = len(looks) * len(SHAPES)
    looks += [(x, y, radius) for x in steps(COLUMN_X) for radius in radii]
    looks += [(x, y, radius) for x in COLUMN_X for radius in steps(radii)]
    looks += [(x, y - up, radius) for x in COLUMN_X for radius in radii for up in steps((0.0, JUMP_HEIGHT))]
    tracks = torch.ones(len(looks), len(SHAPES), TRACK)
    tracks[..., :3] = torch.tensor(looks)[:, None]
    drawings = coverage(tracks, torch.arange(len(SHAPES)).expand(len(looks), -1))[..., BANDS[row], :].flatten(2)
    return drawings.flatten(0, 1).T.contiguous().to(device), still


@cache
def _colours(device: torch.device) -> tuple[Tensor, Tensor]:
    """Colours and, for shapes that turn, mixtures of two: [C, 3]."""
    pure = torch.tensor(list(COLOURS.values()))
    shares = torch.arange(1, SLOW_FRAMES)[:, None] / SLOW_FRAMES
    mixed = torch.cat([a + (b - a) * shares for a, b in combinations(pure, 2)])
    return pure.to(device), mixed.to(device)
