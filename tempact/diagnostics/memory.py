"""Memory of a training iteration, from the traces of its parts.

Plans and switches are not known beforehand. Memory is that of the worst case: every plan forks after its first chunk,
from where its continuations share nothing, as those of a tree that has one switch for all its forks. A plan is taken to
have a prompt every other chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tempact.config import RunConfig
from tempact.diagnostics import footprints as footprint
from tempact.diagnostics.sizes import Decoder, video_bytes
from tempact.executor.executor import TEXTS_KEPT
from tempact.executor.rollout import cache_rows, enough_rows, update_cache_rows
from tempact.executor.sampler import RolloutSettings
from tempact.planner.decode import BUCKET, rows_of

GIB = 2**30
# not in torch's count of tensors: the CUDA context with libraries' workspaces, and holes between tensors
CONTEXT_BYTES = 1 * GIB
HOLES = 0.05
EXACT, TRACED, ESTIMATED = "exact", "traced", "estimated"  # shapes; the code on fake tensors; a formula


@dataclass(frozen=True)
class Item:
    """Bytes of one kind of data; source: EXACT, TRACED or ESTIMATED."""

    what: str
    bytes: int
    source: str


@dataclass(frozen=True)
class Phase:
    """A part of an iteration, and the data that only this part holds."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return total(self.items)


@dataclass(frozen=True)
class Needs:
    """Memory of a run: data kept for whole iterations, data of each phase, and data on the host."""

    kept: tuple[Item, ...]
    phases: tuple[Phase, ...]
    host: tuple[Item, ...]

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        return total(self.kept) + self.worst.bytes


@dataclass(frozen=True)
class Budget:
    """A device's memory. On a GPU, tensors cannot have all of it; without one, data of the host count too."""

    name: str
    bytes: int
    on_gpu: bool = True

    @property
    def usable(self) -> int:
        return int((self.bytes - CONTEXT_BYTES) * (1 - HOLES)) if self.on_gpu else self.bytes

    def taken(self, needs: Needs) -> int:
        """Bytes of this memory at the worst moment."""
        return needs.peak + (0 if self.on_gpu else total(needs.host))

    def fits(self, needs: Needs) -> bool:
        return self.taken(needs) <= self.usable


# planned for where there is no GPU and none is named; as nvidia-smi counts them
USUAL_GPUS = (Budget("an H100 of 80 GB", 81_559 * 2**20), Budget("an H200 of 141 GB", 143_771 * 2**20))


def total(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


FP32 = 4  # bytes of a number
CHUNKS_A_PROMPT = 2
PROMPT_ROWS = 128  # text rows of a prompt of a step, without padding
ADAPTER_COPIES = 2  # trained and reference
ADAM_STATES = 2
GATHERED = 3  # blocks of a sharded model: one at work, the next one on its way, the buffer that the first came in
DRAWING = 3 * FP32 + 3 * 8  # bytes of a token of the vocabulary while one is drawn: fp32 and int64
PLANNING = ("plan", "planner update")  # phases of the planner


@dataclass(frozen=True)
class Run:
    """A configuration with the sizes of its models.

    planner: None for a model of unknown size. decoder: None where latents are pixels. text_bytes, scorer_bytes: weights
    of text encoder and PickScore. on_gpu: the run is planned for a GPU. ranks: processes of the run, all on one
    machine; what follows is of the first, which has most: a share of the plans, and the text encoder, held once.
    """

    config: RunConfig
    sizes: footprint.Sizes
    planner: footprint.PlannerSizes | None = None
    decoder: Decoder | None = None
    text_bytes: int = 0
    scorer_bytes: int = 0
    on_gpu: bool = True
    ranks: int = 1

    @property
    def plans(self) -> int:
        """Those that share weights have the same ones."""
        groups = max(1, self.ranks // self.config.executor.shard)
        return math.ceil(self.config.data.prompts_per_iteration * self.config.planner.plans_per_prompt / groups)

    @property
    def updated(self) -> int:
        """Plans of an update."""
        return math.ceil(self.plans / self.config.trainer.updates_per_iteration)

    @property
    def continuations(self) -> int:
        """Of a plan, that one process makes."""
        return self.config.executor.continuations // self.config.executor.shard

    @property
    def branches(self) -> int:
        return self.plans * self.continuations

    @property
    def siblings(self) -> int:
        """Branches of a row of the record, which share a context."""
        return math.gcd(self.settings.siblings, self.continuations)

    @property
    def multiple(self) -> int:
        """The number of continuations is a multiple of this one: of processes that share weights, and of the branches
        that each of a tree's first ones becomes."""
        return math.prod((self.config.executor.shard, *self.config.executor.branching[1:]))

    @property
    def forked(self) -> int:
        """Branches of a plan at its forks: those of a tree at every one."""
        numbers = self.config.executor.branching or (self.continuations,)
        return sum(math.prod(numbers[:depth]) for depth in range(1, len(numbers) + 1))

    @property
    def recorded(self) -> int:
        """Trained chunks of a plan: of its branches at their forks, or all of its videos but the first chunk."""
        return self.forked * (1 if self.config.executor.trained_chunks == "first" else self.settings.chunks - 1)

    @property
    def rows(self) -> int:
        """Of the record, of all plans."""
        return self.plans * self.recorded // self.siblings

    @property
    def together(self) -> int:
        """Videos that are rolled out in one batch: those of as many plans as `executor.rollout_videos` lets in."""
        n, most = self.continuations, self.config.executor.rollout_videos
        return (min(self.plans, max(1, most // n)) if most else self.plans) * n

    @property
    def settings(self) -> RolloutSettings:
        return RolloutSettings.of(self.config.executor)

    @property
    def switch(self) -> int:
        """Latent frame of the earliest switch."""
        return min(self.config.executor.chunk_frames, self.config.executor.frames - self.config.executor.chunk_frames)

    @property
    def fork(self) -> int:
        """Latent frame from which on a plan has all its videos, at the earliest."""
        return 0 if self.config.executor.forks == "none" else self.switch

    @property
    def graphs(self) -> bool:
        return self.on_gpu and self.sizes.kernels and self.config.executor.cuda_graphs

    @property
    def offloaded(self) -> bool:
        """Do the text encoder's weights wait on the host?"""
        return self.config.executor.offload_text_encoder and self.decoder is not None and self.text_bytes > 0

    @property
    def planner_waits(self) -> bool:
        """Do the planner's weights wait on the host?"""
        return self.config.planner.offload and self.on_gpu

    @property
    def attended(self) -> dict[int, int]:
        """Number of latent frames in the context of the chunk that starts at each frame."""
        s = self.settings
        return {start: len(s.window.attended(start, s.chunk)) for start in range(0, s.frames, s.chunk)}

    @property
    def switches(self) -> list[int]:
        """Frames at which the prompt changes."""
        starts = range(self.switch, self.settings.frames, CHUNKS_A_PROMPT * self.settings.chunk)
        return [*starts][: self.texts - 1] if self.switch else []

    @property
    def texts(self) -> int:
        """Prompts of a plan."""
        return math.ceil(self.settings.chunks / CHUNKS_A_PROMPT)

    def recached(self, start: int) -> tuple[int, int]:
        """A switch at `start` under "recache": latent frames attended to, and latent frames whose K/V it rewrites."""
        frames = self.settings.window.recached(start)
        return min(self.settings.window.sink, frames[0] if frames else 0), len(frames)

    @property
    def steps(self) -> int:
        """Levels of a chunk that an update trains."""
        return self.settings.trained if self.config.executor.levels == "all" else min(1, self.settings.trained)

    @property
    def contexts(self) -> int:
        """Contexts that an update holds at a time: those of a micro-batch."""
        each = self.siblings * self.steps
        return min(self.rows, max(1, self.config.executor.micro_batch // each)) if each else 0

    @property
    def update_rows(self) -> int:
        """(continuation, transition) pairs of the largest micro-batch."""
        steps = self.steps
        each, most = self.siblings * steps, self.config.executor.micro_batch
        if not steps:  # a model of one denoising call, which cannot be trained
            return 0
        if most >= each:
            return min(most // each, self.rows) * each
        return min(most // steps, each // steps) * steps if most >= steps else min(most, steps)

    def changed(self, *, continuations: int | None = None, prompts: int | None = None) -> Run:
        """This run with other numbers of continuations (N) or of prompts."""
        config, n = self.config, continuations or self.config.executor.continuations
        first = (n // self.multiple,) if config.executor.branching else ()
        branching = first + config.executor.branching[1:]
        executor = replace(config.executor, continuations=n, branching=branching)
        data = replace(config.data, prompts_per_iteration=prompts or config.data.prompts_per_iteration)
        return replace(self, config=replace(config, executor=executor, data=data))


def needs_of(run: Run, *, planning: bool = True) -> Needs:
    """Memory of training. planning: include the planner's phases."""
    activations = _rollout_activations(run)
    training = update_cost(run).bytes
    kept = [*_weights(run), *_kept_of_a_rollout(run)]
    latents = Item(
        f"latents of {run.together} videos", run.together * run.sizes.latent_bytes(run.settings.frames), EXACT
    )
    rollout = [latents, *_rollout(run)]
    update = [
        Item("velocities of the reference", _transitions(run, run.steps), EXACT),
        Item("K/V of a context's prompts", run.contexts * (run.texts + 1) * run.sizes.text_bytes, ESTIMATED),
        *_partial_sums(run, run.updated * run.rows // run.plans, footprint.parameters_of(run.sizes).trained),
    ]
    if run.graphs:
        kept.append(Item("activations of rollout and update, held by CUDA graphs", max(activations, training), TRACED))
    else:
        rollout.append(Item(f"activations, {run.together} branches", activations, TRACED))
        update.append(Item(f"activations, {run.update_rows} transitions", training, TRACED))
    if run.config.executor.shard > 1:
        blocks = GATHERED * footprint.parameters_of(run.sizes).shared_bytes // run.sizes.model.layers
        gathered = Item(f"gathered weights, {GATHERED} blocks", blocks, ESTIMATED)
        rollout, update = [*rollout, gathered], [*update, gathered]
    video = video_bytes(run.sizes.latent, run.settings.frames, run.decoder)
    host = [Item(f"{run.branches} videos, uint8", run.branches * video, EXACT)]
    phases = _planner_phases(run) if planning else []
    if run.planner is not None and run.planner_waits:
        host.append(Item("planner's weights", run.planner.weights, EXACT))
    if run.offloaded:
        text = Item("text encoder", run.text_bytes, EXACT)
        host.append(text)
        phases.append(Phase("text", (text,)))
    host.append(Item("recorded transitions", _recorded(run), EXACT))
    phases.append(Phase("rollout", tuple(rollout)))
    if run.decoder is not None:
        phases.append(_decoding(run, run.decoder, latents))
    if run.config.executor.train:
        phases.append(Phase("executor update", tuple(update)))
    return Needs(tuple(kept), tuple(phases), tuple(host))


def update_cost(run: Run) -> footprint.Cost:
    """Cost of the largest micro-batch of the executor's update."""
    again = run.config.executor.checkpoint_activations
    return footprint.update(run.sizes, run.update_rows, max(run.attended.values()), checkpointing=again)


def _weights(run: Run) -> list[Item]:
    """All models, and the adapters' gradients and optimiser states."""
    parameters = footprint.parameters_of(run.sizes)
    share = run.config.executor.shard
    own = parameters.weight_bytes - parameters.shared_bytes * (share - 1) // share
    items = [Item("executor's weights" + f", 1 / {share} of its blocks" * (share > 1), own, EXACT)]
    items += _adapter("executor", parameters.trained * FP32, ema=True)
    plain = run.config.kernels == "auto" and run.config.executor.precision == "fp32"  # on a CPU
    if (run.sizes.kernels if run.on_gpu else plain) and share == 1:
        items.append(Item("executor's weights with the adapter merged", parameters.adapted_bytes, EXACT))
    if run.planner is not None:
        items += [] if run.planner_waits else [Item("planner's weights", run.planner.weights, EXACT)]
        items += _adapter("planner", run.planner.trained * FP32)
    if not run.offloaded:
        items.append(Item("text encoder", run.text_bytes, EXACT))
    if run.decoder is not None:
        items += [Item("VAE", run.decoder.weights, EXACT), Item("PickScore", run.scorer_bytes, EXACT)]
    return items


def _adapter(who: str, trained: int, *, ema: bool = False) -> list[Item]:
    average = " and average" if ema else ""
    states = 1 + ADAM_STATES + ema  # gradients, too
    return [
        Item(f"{who}'s adapter and its frozen start", ADAPTER_COPIES * trained, EXACT),
        Item(f"{who}'s gradients, Adam's moments{average}", states * trained, EXACT),
    ]


def _partial_sums(run: Run, leaves: int, trained: int) -> list[Item]:
    """Gradients of `trained` numbers that wait for others in the tree of an update's sum, which has so many leaves, or
    fewer."""
    count = math.ceil(math.log2(leaves))
    received = ", and one received" if run.ranks > 1 else ""
    buffers = count + (run.ranks > 1)
    return [Item(f"partial sums of gradients, {count}{received}", buffers * trained * FP32, ESTIMATED)][:buffers]


def _kept_of_a_rollout(run: Run) -> list[Item]:
    """The cache keeps its size, the largest that roll-out or update needs; text rows stay at hand."""
    sizes, settings, n = run.sizes, run.settings, run.continuations
    tokens = sizes.frame_tokens
    rows = (enough_rows if run.graphs else cache_rows)(settings, run.together // n, n, run.fork, tokens)
    if run.config.executor.train and run.contexts:
        rows = update_cache_rows(settings, run.contexts, tokens, rows)
    texts = min(TEXTS_KEPT, run.plans * run.texts) * PROMPT_ROWS * sizes.model.text_dim * sizes.dtype.itemsize
    return [
        Item(f"K/V cache, {rows / tokens:.0f} latent frames", rows * sizes.frame_bytes // tokens, EXACT),
        Item("text rows of prompts seen", texts, ESTIMATED),
    ]


def _recorded(run: Run) -> int:
    """Bytes of states, noises and contexts of all plans, with the latest switch."""
    contexts = run.rows * run.sizes.latent_bytes(run.settings.frames - run.settings.chunk)
    return contexts + _transitions(run, sum(run.settings.recorded))


def _transitions(run: Run, each: int) -> int:
    """Bytes of `each` fp32 chunks for every trained branch."""
    return run.plans * run.recorded * each * run.sizes.latent_bytes(run.settings.chunk)


def _rollout_activations(run: Run) -> int:
    """Activations of the widest call: a chunk of all videos, or the pass that rewrites a video's window."""
    settings = run.settings
    calls = [(run.together, max(run.attended.values()), settings.chunk)]
    if settings.text_switch == "recache":
        calls.append((1, *max((run.recached(start) for start in run.attended), key=lambda call: call[1])))
    return max(footprint.denoise(run.sizes, *call).bytes for call in calls if call[2])


def _rollout(run: Run) -> list[Item]:
    """Data of a rollout beside the cache and the activations."""
    sizes, settings = run.sizes, run.settings
    steps = max(settings.schedule.calls, settings.first.calls)
    plans = run.together // run.continuations
    prompts = plans * run.texts
    # a graph reads copies of its own; there are two of each batch, for denoiser calls and for context passes
    copies = run.together + (2 * (run.forked + 1) * plans if run.graphs else 0)
    noise = run.together * 2 * steps * sizes.latent_bytes(settings.chunk)
    return [
        Item("K/V of the prompts, and copies a branch", (prompts + copies) * sizes.text_bytes, ESTIMATED),
        Item("noise of a chunk, and its rows in a batch", noise, EXACT),
        Item("states of this chunk, one by one and stacked", noise, ESTIMATED),
    ]


def _decoding(run: Run, decoder: Decoder, latents: Item) -> Phase:
    videos = min(decoder.videos, run.continuations)
    frames = videos * video_bytes(run.sizes.latent, decoder.latents + 1, decoder)
    items = (
        latents,
        Item(f"decoder's state of {videos} videos and their beginning", (videos + 1) * decoder.state, TRACED),
        Item(f"a call of {videos} x {decoder.latents} latent frames, at most", videos * decoder.call, TRACED),
        Item("frames on their way to the host", frames, EXACT),
    )
    return Phase("decode", items)


def _planner_phases(run: Run) -> list[Phase]:
    if run.planner is None:
        return []
    sizes, tokens = run.planner, run.planner.tokens
    rows = rows_of(run.config.planner, on_gpu=run.on_gpu)
    length = math.ceil(tokens / BUCKET) * BUCKET
    drawing = rows * sizes.vocabulary * (sizes.dtype.itemsize + DRAWING)
    cached = Item(f"K/V of {rows} plans, {length} tokens each", rows * length * sizes.cached, EXACT)
    drawn = Item("logits of a step, and the weights of their tokens", drawing, ESTIMATED)
    weights = (Item("planner's weights", sizes.weights, EXACT),) if run.planner_waits else ()
    phases = [Phase(PLANNING[0], (*weights, cached, drawn))]
    if run.config.planner.train:
        rows = min(run.updated, run.config.planner.micro_batch or run.updated)
        logits = sizes.logits_bytes(rows, run.config.planner.max_new_tokens)
        items = (
            *weights,
            Item(f"activations, {rows} plans of {tokens} tokens", rows * sizes.row_bytes, TRACED),
            Item("their logits", logits, ESTIMATED),
            *_partial_sums(run, math.ceil(run.updated / rows), sizes.trained),
        )
        phases.append(Phase(PLANNING[1], items))
    return phases
