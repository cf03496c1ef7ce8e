"""LoFTR's coarse path in ONNX Runtime: two graphs of static shapes, counting as everywhere.

One graph looks at images up to the first cross-attention, the other lets the tokens of two images
meet. Matches are counted by ``kernels.match_count`` on what the second leaves in torch's memory.
The arithmetic is LoFTR's, reordered: normalisation is folded into convolutions, and the value and
output projections of attention are applied to its small context matrix instead of to every cell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        self.device = matcher.device
        self._matcher = matcher
        self._net = matcher.net
        self._provider = _provider(self.device)
        self._sessions: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    @property
    def digest(self) -> str:
        """That of the torch matcher: features are equal up to rounding, kept ones serve either."""
        return self._matcher.digest

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Tokens of each image, including self-attention before the first meeting. [N, 1, H, W]"""
        check_images(images, CELL_PX)
        height, width = images.shape[-2:]
        rows, columns = height // CELL_PX, width // CELL_PX
        tokens = self._empty(len(images), rows * columns)
        chunk = max(1, CHUNK_PX[self.device.type] // (height * width))
        for part, out in zip(images.split(chunk), tokens.split(chunk), strict=True):
            pixels = part.to(self.device, torch.float32).contiguous()
            self._run(("images", "tokens"), (pixels,), (out,), (rows, columns))
        return Features(tokens, (rows, columns))

    @torch.no_grad()
    def compare(self, features0: Features, features1: Features) -> Matches:
        """Mutual nearest cells whose dual-softmax confidence exceeds the threshold."""
        check_pairs(features0, features1)
        tokens0 = features0.tokens.to(self.device)
        tokens1 = features1.tokens.to(self.device).expand(len(tokens0), -1, -1)
        chunk = max(1, CHUNK_CELLS[self.device.type] // tokens0.shape[1])
        found = []
        for part0, part1 in zip(tokens0.split(chunk), tokens1.split(chunk), strict=True):
            given = (part0.contiguous(), part1.contiguous())
            met = torch.empty_like(given[0]), torch.empty_like(given[1])
            self._run(("tokens0", "tokens1", "met0", "met1"), given, met)
            found.append(match_count(*met, scale=self._net.scale, threshold=self._net.threshold))
        confidence, partner = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cell_matches(confidence, partner, features0, features1)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty((*shape, self._net.config["coarse"]["d_model"]), device=self.device)

    def _run(
        self,
        names: tuple[str, ...],
        given: tuple[Tensor, ...],
        wanted: tuple[Tensor, ...],
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Run the graph for these shapes on torch's memory, inputs and outputs alike."""
        session = self._session(tuple(given[0].shape), tuple(given[-1].shape), grid)
        binding = session.io_binding()
        for k, (name, tensor) in enumerate(zip(names, (*given, *wanted), strict=True)):
            bind = binding.bind_input if k < len(given) else binding.bind_output
            index = self.device.index or 0
            shape = tuple(tensor.shape)
            bind(name, self.device.type, index, np.float32, shape, tensor.data_ptr())
        if self.device.type == "cuda":
            # ONNX Runtime has a stream of its own; it waits for itself at the end.
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)

    def _session(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], grid: tuple[int, int] | None
    ) -> Any:
        key = (*shape0, *shape1)
        session = self._sessions.get(key)
        if session is None:
            if grid is None:
                graph = met_graph(self._net, shape0[0], shape0[1], shape1[1])
            else:
                graph = tokens_graph(self._net, shape0[0], grid)
            session = _open(graph, self._provider)
            self._sessions[key] = session
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return session


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
    across = graph.op("Transpose", key, perm=(0, 2, 1))
    context = graph.op("MatMul", across, source)
    context = _linear(graph, context, layer.v_proj)
    context = graph.op("Mul", context, graph.constant(same_head / cells))
    context = _linear(graph, context, layer.merge)
    total = graph.op("ReduceMean", across, axes=(2,), keepdims=1)
    spread = graph.op("Mul", total, graph.constant(same_head))
    normaliser = graph.op("MatMul", query, spread)
    normaliser = graph.op("Add", normaliser, graph.constant(ATTENTION_EPSILON / cells))
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


def _open(model: bytes, provider: tuple[str, Mapping[str, Any]]) -> Any:
    """A session on that provider alone, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
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
