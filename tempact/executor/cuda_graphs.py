"""The executor's calls of its transformer, as CUDA graphs where the kernels serve.

A chunk of one video keeps a GPU busy for about as long as the host takes to launch its kernels. A graph launches in one
go what was recorded once. Inputs are copied to where the recording read them; a context is a segment table over the
cache's pools, which are read in place, so one graph serves every chunk of a video.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csrc_triton import CacheRows, ForkableKVCache, LayerViews, fork_attention, runtime
from csrc_triton.kv_cache import Reservation
from tempact.distributed.shards import sharded
from tempact.distributed.watch import moved
from tempact.executor.lora import LoraLinear
from tempact.models.wan.transformer import ChunkAttention, TextKV, WanTransformer, kernels_serve

SLOTS = 4  # segment tables are widened to a multiple of it, so that their width seldom changes
MOST_GRAPHS = 24  # each holds its inputs and outputs; the one used longest ago gives way

# K/V before a chunk: in the cache, or K and V [P, Lp, heads, head_dim] of each layer; None before the first chunk
Context = LayerViews | Sequence[tuple[Tensor, Tensor]] | None

logger = logging.getLogger(__name__)


class CachedAttention(ChunkAttention):
    """Attention of one chunk over its own tokens and the cached context."""

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fork_attention(q, k, v, None if self.context is None else self.context[layer])


class StoringAttention(CachedAttention):
    """The same, writing the chunk's K/V to the cache: `places` gives the rows of a layer."""

    def __init__(self, context: Context, places: Callable[[int], CacheRows]):
        super().__init__(context)
        self.places = places

    def rows(self, layer: int) -> CacheRows:
        return self.places(layer)


@dataclass
class _Graph:
    """One call: run as it is at first, then recorded, then replayed."""

    calls: deque[int]  # numbers of the latest calls of this shape
    inputs: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None
    forward: torch.cuda.CUDAGraph | None = None
    backward: torch.cuda.CUDAGraph | None = None
    output_grad: Tensor | None = None
    given: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list)  # what `inputs` are copies of
    memory: Any = None  # the pool that it was recorded with
    refused: bool = False  # its recording failed

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Copies what has changed since the last call."""
        pairs = []
        for i, (own, new) in enumerate(zip(self.inputs, inputs, strict=True)):
            source, version = self.given[i]
            if source() is not new or version != new._version:
                pairs.append((own, new.detach()))
                self.given[i] = weakref.ref(new), new._version
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


class _Activations:
    """Stands for the activations of a replayed forward: alive until they are used or can no longer be."""


class _Replay(torch.autograd.Function):
    """A recorded forward whose backward adds to the parameters' gradients, as the recording does."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, graph: _Graph, gradients: Callable[[], None], activations: _Activations
    ) -> Tensor:
        assert graph.forward is not None and graph.output is not None
        ctx.graph, ctx.gradients, ctx.activations = graph, gradients, activations
        graph.forward.replay()
        return graph.output.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if ctx.activations is None:
            raise RuntimeError("backward: found a second one of the same call; accepted: one, as graphs keep no more")
        ctx.activations = None
        ctx.graph.output_grad.copy_(grad)
        ctx.gradients()
        ctx.graph.backward.replay()
        return None, None, None, None


class CudaGraphRunner:
    """The calls of one transformer, recorded as CUDA graphs and replayed.

    parameters: the trained ones. graphs: use CUDA graphs where the model is on a GPU, whole, and the kernels serve; a
    call is recorded after `warm_calls` of its shape, the first of which compiles what must be compiled. Graphs share
    one pool of memory, so that none runs while the activations of another wait for their backward pass: calls in
    between are run as they are, and so are those of a shape whose recording failed.
    """

    warm_calls = 2

    def __init__(self, model: WanTransformer, parameters: Callable[[], Iterable[nn.Parameter]], *, graphs: bool = True):
        self.model, self.parameters = model, parameters
        # the torch path waits for the device, which a recording must not
        served = kernels_serve(model.config.head_dim) and runtime.why_not_triton(model.device, model.dtype) is None
        self.graphs = graphs and served and not sharded(model)
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls = 0  # so far, of all shapes
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._pools: tuple[int, ...] = ()
        self._memory: Any = None
        self._waiting: Callable[[], _Activations | None] = lambda: None  # those of the latest replay with gradients
        self._anchor = torch.zeros((), requires_grad=True)

    def velocity(self, x: Tensor, sigma: Tensor, text: TextKV, positions: Tensor, context: Context) -> Tensor:
        """`WanTransformer.forward` without gradient; context as `KVHistory.context` gives it."""

        def call(context: Context, x: Tensor, sigma: Tensor, positions: Tensor, *words: Tensor) -> Tensor:
            return self.model(x, sigma, _text(words), positions, CachedAttention(context))

        return self._run("velocity", call, [x, sigma, positions, *_flat(text)], context)

    def write_context(
        self, x: Tensor, sigma: Tensor, text: TextKV, positions: Tensor, context: LayerViews | None,
        cache: ForkableKVCache, reservation: Reservation,
    ) -> None:  # fmt: skip
        """`WanTransformer.write_context` into the reserved rows of the cache, which the caller commits."""

        def call(
            context: Context, x: Tensor, sigma: Tensor, positions: Tensor, first: Tensor, *words: Tensor
        ) -> Tensor:
            def rows(layer: int) -> CacheRows:
                return replace(cache.rows_of(reservation, layer), first_rows=first)

            self.model.write_context(x, sigma, _text(words), positions, StoringAttention(context, rows))
            return first

        inputs = [x, sigma, positions, reservation.first_rows_on_device, *_flat(text)]
        self._run(("write", reservation.length), call, inputs, context, cache.addresses)

    def policy_velocity(
        self, x: Tensor, sigma: Tensor, words: Tensor, index: Tensor, positions: Tensor, context: Context
    ) -> Tensor:
        """The velocity with the gradient of everything trained, where gradients are on.

        words: rows of the text encoder [n, text_len, text_dim]; index [B] int64: the text of each batch row.
        """

        def call(context: Context, x: Tensor, sigma: Tensor, words: Tensor, index: Tensor, positions: Tensor) -> Tensor:
            text = self.model.project_text(words).select(index)
            return self.model(x, sigma, text, positions, CachedAttention(context))

        return self._run("policy", call, [x, sigma, words, index, positions], context)

    def _run(
        self, name: Hashable, call: Callable[..., Tensor], inputs: list[Tensor], context: Context,
        pools: tuple[int, ...] = (),
    ) -> Tensor:  # fmt: skip
        """`call(context, *inputs)`; pools: addresses of those that it writes to."""
        moved()
        views = context if isinstance(context, LayerViews) else None
        if not self._usable(inputs[0]) or views is not context:
            return call(context, *inputs)
        if views is not None:
            pools = views.addresses
            inputs = [*inputs, F.pad(views.table, (0, 0, 0, -views.table.shape[1] % SLOTS))]

        def run(*own: Tensor) -> Tensor:
            return call(None, *own) if views is None else call(views.with_table(own[-1]), *own[:-1])

        if pools and pools != self._pools:  # recordings read and write the cache's pools where they lay
            if self._pools:
                self.forget()
            self._pools = pools
        graph = self._called(self._key(name, inputs, views is None))
        if self._waiting() is not None:
            return self._plain(run, inputs)
        if graph.forward is not None:
            graph.load(inputs)
        elif not self._worth_recording(graph) or not self._record(graph, run, inputs):
            return self._plain(run, inputs)
        assert graph.forward is not None and graph.output is not None
        if torch.is_grad_enabled():
            activations = _Activations()
            self._waiting = weakref.ref(activations)
            return _Replay.apply(self._anchor, graph, self._use_own_gradients, activations)
        graph.forward.replay()
        return graph.output.clone()

    def _usable(self, x: Tensor) -> bool:
        return self.graphs and x.is_cuda and runtime.get_backend() != "torch"

    def _key(self, name: Hashable, inputs: Sequence[Tensor], alone: bool) -> Hashable:
        """What a recording depends on, its inputs' values and the pools' addresses aside."""
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        adapter = () if self._adapted is None else self._adapted.mode
        kind = inputs[0].device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return name, torch.is_grad_enabled(), adapter, alone, shapes, runtime.get_backend(), cast

    def _called(self, key: Hashable) -> _Graph:
        graph = self._graphs.setdefault(key, _Graph(deque(maxlen=self.warm_calls + 1)))
        self._calls += 1
        graph.calls.append(self._calls)
        return graph

    def _worth_recording(self, graph: _Graph) -> bool:
        """Whether a shape's calls, this one included, are more than `warm_calls`. Where there are MOST_GRAPHS, one
        gives way that was not used since the first of these calls, if there is one."""
        if graph.refused or len(graph.calls) <= self.warm_calls:
            return False
        used = {key: graph.calls[-1] for key, graph in self._graphs.items() if graph.forward is not None}
        if len(used) < MOST_GRAPHS:
            return True
        oldest = min(used, key=used.__getitem__)
        if used[oldest] > graph.calls[0]:
            return False
        torch.cuda.synchronize()  # it may be running
        del self._graphs[oldest]
        return True

    def _plain(self, call: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        """The call as it is. With gradients it runs on the stream that recordings are made on: autograd adds to a
        parameter's gradient on the stream where the parameter was first used, and that one must take part in them."""
        if not torch.is_grad_enabled():
            return call(*inputs)
        stream, current = self._side_stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = call(*inputs)
        current.wait_stream(stream)
        return out

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def _record(self, graph: _Graph, call: Callable[..., Tensor], inputs: list[Tensor]) -> bool:
        """Whether the call could be recorded; if not, its shape is run as it is from now on."""
        kind = inputs[0].device.type
        try:
            # without autocast's cache of weights: its copies would be gone when the recording is replayed
            with torch.autocast(
                kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
            ):
                self._capture(graph, call, inputs)
        except BaseException as error:
            graph.inputs, graph.given, graph.refused = [], [], True
            graph.forward = graph.backward = graph.output = graph.output_grad = None
            if not isinstance(error, Exception):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            logger.warning("no CUDA graph for a shape of call, which runs without one: %s", reason)
            return False
        logger.debug("CUDA graph %d of at most %d recorded", self._recorded(), MOST_GRAPHS)
        return True

    def _capture(self, graph: _Graph, call: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        graph.inputs = [tensor.detach().clone() for tensor in inputs]
        graph.given = [(weakref.ref(tensor), tensor._version) for tensor in inputs]
        # one pool of memory: no two graphs run at once, and outputs are copied before the next one. It is freed with
        # the last graph that has it
        if not any(each.forward is not None and each.memory is self._memory for each in self._graphs.values()):
            self._memory = torch.cuda.graph_pool_handle()
        graph.memory = self._memory
        graph.forward = torch.cuda.CUDAGraph()
        with self._recording(graph.forward):
            graph.output = call(*graph.inputs)
        if torch.is_grad_enabled():
            self._use_own_gradients()
            graph.output_grad = torch.empty_like(graph.output)
            graph.backward = torch.cuda.CUDAGraph()
            with self._recording(graph.backward):
                torch.autograd.backward(graph.output, graph.output_grad)
            graph.output = graph.output.detach()

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """As `torch.cuda.graph`, but memory goes back to the device only where it may be short there: what the plain
        call before took lies idle, and the recording takes about as much. The host's pinned memory is kept: that of an
        iteration's videos is gigabytes, and takes over a second to pin again."""
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if torch.cuda.mem_get_info()[0] < 2 * idle:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        with torch.cuda.stream(self._side_stream):
            try:
                # other threads may ask the device meanwhile, as NCCL's does for how its work is going
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                yield
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leaves torch as it was before a recording that has failed.

        Where the device has refused the recording, `capture_end` raises before torch's allocator hears of the end: the
        pool would count as recorded to, and as used by the graph, for ever.
        """
        device, pool = self.model.device.index, self._memory
        with suppress(RuntimeError):  # the first error says why
            graph.capture_end()
        with suppress(RuntimeError):  # that it has ended
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        self._memory = None
        with suppress(RuntimeError):
            self._record_nothing()

    def _record_nothing(self) -> None:
        """A recording that ends well, after one that did not: until then torch's generator of random numbers on the
        device counts as part of the broken one, and refuses every draw. It has memory of its own."""
        number, graph = torch.zeros(1, device=self.model.device), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        number.add_(1)  # torch warns of an empty graph
        graph.capture_end()

    def _recorded(self) -> int:
        return sum(graph.forward is not None for graph in self._graphs.values())

    def _use_own_gradients(self) -> None:
        """Makes the gradients that recordings add to those of the parameters, with the values these have now."""
        missing = []
        for parameter in self.parameters():
            if parameter not in self._grads:
                self._grads[parameter] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            own = self._grads[parameter]
            if parameter.grad is None:
                missing.append(own)
            elif parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own
        if missing:
            torch._foreach_zero_(missing)

    def forget(self) -> None:
        """Gives up all recordings and their memory."""
        self._graphs.clear()

    @cached_property
    def _adapted(self) -> LoraLinear | None:
        """A layer with adapters: they are switched together."""
        return next((module for module in self.model.modules() if isinstance(module, LoraLinear)), None)


def _flat(text: TextKV) -> list[Tensor]:
    return [tensor for pair in text.layers for tensor in pair]


def _text(tensors: Sequence[Tensor]) -> TextKV:
    return TextKV(list(zip(tensors[::2], tensors[1::2], strict=True)))
