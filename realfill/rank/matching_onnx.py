"""LoFTR's coarse path in ONNX Runtime: two graphs of static shapes, counting as everywhere.

One graph looks at images up to the first cross-attention, the other lets the tokens of two images
meet. Matches are counted by ``kernels.match_count`` on what the second leaves in torch's memory.
The arithmetic is LoFTR's, reordered: normalisation is folded into convolutions, and the value and
output projections of attention are applied to its small context matrix instead of to every cell.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kernels.match_count import match_count
from realfill.errors import MatcherUnavailable
from realfill.rank.correspondences import (
    CELL_PX,
    Features,
    Matcher,
    Matches,
    cell_matches,
    check_images,
    check_pairs,
)
from realfill.rank.matching import CoarseLoFTR, LoFTRMatcher, loftr
from realfill.rank.onnx_graph import Graph

# Of each kind and shape one; the least recently used goes.
MAX_SESSIONS = 16
CHUNK_CELLS = {"cpu": 2**12, "cuda": 2**16}
CHUNK_PX = {"cpu": 2**18, "cuda": 2**22}
ATTENTION_EPSILON = 1e-6

T = TypeVar("T")


@dataclass(frozen=True)
class _Run:
    """One run of one graph.

    Attributes:
        key: Names the graph among those of a matcher.
        graph: Writes it.
        given: Inputs, contiguous float32.
        wanted: Outputs, to be overwritten, likewise.
    """

    key: str
    graph: Callable[[], bytes]
    given: dict[str, Tensor]
    wanted: dict[str, Tensor]


class OnnxLoFTRMatcher(Matcher):
    """LoFTR's coarse path as a ``Matcher`` in ONNX Runtime, in float32."""

    size_multiple = CELL_PX

    def __init__(self, matcher: LoFTRMatcher) -> None:
        """Take the network of a matcher, and the device it is on.

        Raises:
            MatcherUnavailable: ONNX Runtime has no provider for that device.
        """
        self.name = f"{matcher.name}-onnx"
        self.working_px = matcher.working_px
        self.threshold = matcher.threshold
        self.device = matcher.device
        self._matcher = matcher
        self._net = matcher.net
        self._provider = _provider(self.device)
        self._sessions: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = 1 if self.device.type == "cuda" else torch.get_num_threads()
        self._pool = _single_threads(self._threads)
        self.takes_all_cores = self._threads > 1

    @property
    def digest(self) -> str:
        """That of the torch matcher: features are equal up to rounding, kept ones serve either."""
        return self._matcher.digest

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Tokens of each image, including self-attention before the first meeting. [N, 1, H, W]"""
        check_images(images, CELL_PX)
        height, width = images.shape[-2:]
        grid = (height // CELL_PX, width // CELL_PX)
        shape = (len(images), grid[0] * grid[1], self._net.config["coarse"]["d_model"])
        tokens = torch.empty(shape, device=self.device)
        chunk = self._chunk(len(images), CHUNK_PX[self.device.type] // (height * width))

        def look(part: Tensor, out: Tensor, threads: int) -> None:
            run = _Run(
                f"tokens {len(part)} {grid}",
                partial(tokens_graph, self._net, len(part), grid),
                {"images": part.to(self.device, torch.float32).contiguous()},
                {"tokens": out},
            )
            self._bind_and_run(run, self._session(run, threads))

        self._each(look, images.split(chunk), tokens.split(chunk))
        return Features(tokens, grid)

    @torch.no_grad()
    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        """Mutual nearest cells whose dual-softmax confidence exceeds the threshold."""
        check_pairs(features0, features1)
        tokens0 = features0.tokens.to(self.device)
        tokens1 = features1.tokens.to(self.device).expand(len(tokens0), -1, -1)
        chunk = self._chunk(len(tokens0), CHUNK_CELLS[self.device.type] // tokens0.shape[1])
        work = partial(self._found, self.threshold if threshold is None else threshold)
        found = self._each(work, tokens0.split(chunk), tokens1.split(chunk))
        confidence, partner = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cell_matches(confidence, partner, features0, features1)

    def _found(
        self, threshold: float, tokens0: Tensor, tokens1: Tensor, threads: int
    ) -> tuple[Tensor, Tensor]:
        """Confidence and partner of each cell of some pairs. [n, L] each"""
        sizes = (len(tokens0), tokens0.shape[1], tokens1.shape[1])
        met0, met1 = tokens0.new_empty(tokens0.shape), tokens1.new_empty(tokens1.shape)
        run = _Run(
            f"met {sizes}",
            partial(met_graph, self._net, *sizes),
            {"tokens0": tokens0.contiguous(), "tokens1": tokens1.contiguous()},
            {"met0": met0, "met1": met1},
        )
        self._bind_and_run(run, self._session(run, threads))
        return match_count(met0, met1, scale=self._net.scale, threshold=threshold)

    def _chunk(self, count: int, most: int) -> int:
        """How many images or pairs to take at a time, so that every thread has some."""
        return max(1, min(most, -(-count // self._threads)))

    def _each(
        self,
        work: Callable[[Tensor, Tensor, int], T],
        firsts: Sequence[Tensor],
        seconds: Sequence[Tensor],
    ) -> list[T]:
        """Work on every pair of parts; on a CPU side by side, where there are enough of them.

        Threads that share one small product mostly wait for each other.
        """
        if len(firsts) < self._threads or self._threads == 1:
            pairs = zip(firsts, seconds, strict=True)
            return [work(first, second, self._threads) for first, second in pairs]
        return list(self._pool.map(work, firsts, seconds, [1] * len(firsts)))

    def _bind_and_run(self, run: _Run, session: Any) -> None:
        """Run a graph on torch's memory, inputs and outputs alike."""
        binding = session.io_binding()
        place, index = self.device.type, self.device.index or 0
        for bind, tensors in (
            (binding.bind_input, run.given),
            (binding.bind_output, run.wanted),
        ):
            for name, tensor in tensors.items():
                shape = tuple(tensor.shape)
                bind(name, place, index, np.float32, shape, tensor.data_ptr())
        if place == "cuda":
            # ONNX Runtime has a stream of its own; it waits for itself at the end.
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)

    def _session(self, run: _Run, threads: int) -> Any:
        """The session of a graph, opened now or kept from before."""
        key = (run.key, threads)
        # References may be prepared in one thread while another ranks.
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = _open(run.graph(), self._provider, threads)
                while len(self._sessions) > MAX_SESSIONS:
                    self._sessions.popitem(last=False)
            self._sessions.move_to_end(key)
            return self._sessions[key]


def onnx_loftr(source: str | Path = "nano", device: str | torch.device = "cpu") -> OnnxLoFTRMatcher:
    """Load a LoFTR matcher that runs in ONNX Runtime; arguments and errors as of ``loftr``."""
    return OnnxLoFTRMatcher(loftr(source, device))


def tokens_graph(net: CoarseLoFTR, count: int, grid: tuple[int, int]) -> bytes:
    """ONNX model of ``CoarseLoFTR.tokens`` for one batch and size."""
    graph, coarse = Graph(), net.config["coarse"]
    rows, columns = grid
    x = graph.input("images", (count, 1, rows * CELL_PX, columns * CELL_PX))
    backbone = net.backbone
    x = graph.op("Relu", _conv(graph, x, backbone.conv1, backbone.bn1))
    for layer in (backbone.layer1, backbone.layer2, backbone.layer3):
        for block in layer:
            x = _block(graph, x, block)
    x = _conv(graph, x, backbone.layer3_outconv, None)
    if rows > net.pos_encoding.pe.shape[2] or columns > net.pos_encoding.pe.shape[3]:
        net.pos_encoding.update_position_encoding_size((rows, columns))
    x = graph.op("Add", x, graph.constant(net.pos_encoding.pe[:, :, :rows, :columns]))
    x = graph.op("Transpose", x, perm=(0, 2, 3, 1))
    cells = rows * columns
    x = graph.op("Reshape", x, graph.constant((count, cells, coarse["d_model"])))
    for encoder in net.loftr_coarse.layers[: net.alone]:
        x = _encoder(graph, x, x, encoder, cells)
    graph.output(x, "tokens", (count, cells, coarse["d_model"]))
    return graph.encoded()


def met_graph(net: CoarseLoFTR, count: int, cells0: int, cells1: int) -> bytes:
    """ONNX model of ``CoarseLoFTR.met`` for one batch and pair of sizes."""
    graph, width = Graph(), net.config["coarse"]["d_model"]
    x0 = graph.input("tokens0", (count, cells0, width))
    x1 = graph.input("tokens1", (count, cells1, width))
    names = net.config["coarse"]["layer_names"]
    steps = list(zip(net.loftr_coarse.layers, names, strict=True))[net.alone :]
    for encoder, name in steps:
        if name == "self":
            x0 = _encoder(graph, x0, x0, encoder, cells0)
            x1 = _encoder(graph, x1, x1, encoder, cells1)
        else:
            x0 = _encoder(graph, x0, x1, encoder, cells1)
            x1 = _encoder(graph, x1, x0, encoder, cells0)
    graph.output(x0, "met0", (count, cells0, width))
    graph.output(x1, "met1", (count, cells1, width))
    return graph.encoded()


def _conv(graph: Graph, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> str:
    """A convolution with the normalisation behind it folded in, in float64."""
    weight = conv.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * factor[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * factor
    # Padding before and behind, of rows and of columns; all sides are alike.
    side = int(conv.padding[0])
    return graph.op(
        "Conv",
        x,
        graph.constant(weight),
        graph.constant(bias),
        kernel_shape=tuple(weight.shape[2:]),
        pads=(side, side, side, side),
        strides=tuple(conv.stride),
    )


def _block(graph: Graph, x: str, block: Any) -> str:
    """One residual block of the backbone."""
    y = graph.op("Relu", _conv(graph, x, block.conv1, block.bn1))
    y = _conv(graph, y, block.conv2, block.bn2)
    if block.downsample is not None:
        x = _conv(graph, x, block.downsample[0], block.downsample[1])
    return graph.op("Relu", graph.op("Add", x, y))


def _encoder(graph: Graph, x: str, source: str, layer: Any, cells: int) -> str:
    """One layer of linear attention from x to a source of that many cells. [N, L, C]

    Head by head, attention is ``q @ (k.T @ v) / (q @ sum(k))`` with ``v = source @ V`` and the
    merging projection M behind it, which is ``(q / normaliser) @ ((k.T @ source) @ V @ M)``.
    """
    head = torch.arange(layer.dim * layer.nhead) // layer.dim
    same_head = (head[:, None] == head[None, :]).float()
    query = _positive(graph, _linear(graph, x, layer.q_proj))
    key = _positive(graph, _linear(graph, source, layer.k_proj))
    context = graph.op("MatMul", graph.op("Transpose", key, perm=(0, 2, 1)), source)
    context = _linear(graph, context, layer.v_proj)
    context = graph.op("Mul", context, graph.constant(same_head / cells))
    context = _linear(graph, context, layer.merge)
    total = graph.op("ReduceMean", key, axes=(1,), keepdims=1)
    total = graph.op("Transpose", total, perm=(0, 2, 1))
    # Keys and queries are positive, so this keeps their products so too.
    total = graph.op("Add", total, graph.constant(ATTENTION_EPSILON / cells))
    normaliser = graph.op("MatMul", query, graph.op("Mul", total, graph.constant(same_head)))
    message = graph.op("MatMul", graph.op("Div", query, normaliser), context)
    message = graph.op("Concat", x, _layer_norm(graph, message, layer.norm1), axis=2)
    hidden = graph.op("Relu", _linear(graph, message, layer.mlp[0]))
    message = _layer_norm(graph, _linear(graph, hidden, layer.mlp[2]), layer.norm2)
    return graph.op("Add", x, message)


def _positive(graph: Graph, x: str) -> str:
    """elu(x) + 1, as exp(min(x, 0)) + max(x, 0), for which ONNX Runtime has the faster kernels."""
    low = graph.op("Exp", graph.op("Min", x, graph.constant(0.0)))
    return graph.op("Add", low, graph.op("Relu", x))


def _linear(graph: Graph, x: str, linear: Any) -> str:
    return graph.op("MatMul", x, graph.constant(linear.weight.T.contiguous()))


def _layer_norm(graph: Graph, x: str, norm: nn.LayerNorm) -> str:
    weight, bias = graph.constant(norm.weight), graph.constant(norm.bias)
    return graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=float(norm.eps))


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch works alone; its number of threads is a setting of each thread."""

    def begin() -> None:
        # A thread takes the common number when it is first asked, which must not be later.
        torch.get_num_threads()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "matcher", begin)
    started = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    # Threads that begin later take the number that was set last, wherever that was.
    torch.set_num_threads(before)
    return pool


def _provider(device: torch.device) -> tuple[str, Mapping[str, Any]]:
    """ONNX Runtime's provider for a device, with its options."""
    import onnxruntime

    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type, "")
    if name not in onnxruntime.get_available_providers():
        raise MatcherUnavailable(
            f"ONNX Runtime cannot run on {device} (it has "
            f"{', '.join(onnxruntime.get_available_providers())}); use the torch matcher there"
        )
    return name, {"device_id": device.index or 0} if device.type == "cuda" else {}


def _open(model: bytes, provider: tuple[str, Mapping[str, Any]], threads: int) -> Any:
    """A session on that provider alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between runs would take the cores from torch, whose turn it then is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    # Where a provider cannot start, the session goes on with the CPU and only logs it.
    if session.get_providers()[0] != provider[0]:
        raise MatcherUnavailable(
            f"ONNX Runtime could not start {provider[0]}; install the CUDA libraries that "
            "onnxruntime-gpu names, or use the torch matcher"
        )
    return session
