"""A U-Net on a CPU as a program: no Python between its operations, and weights that are handed in.

What Python does between a thousand small operations takes half as long as computing them does for
one sample of ``nano``, and threads that compute side by side wait for each other's interpreter. So
the network is traced once for pictures of a size, and whoever runs the program says with whose
weights. A second program is for samples of several scenes: its layers compute one scene after the
other, each by the very products by which it would be computed alone, and what is between the layers
is done for all of them at once.

The programs are TorchScript's, which PyTorch calls deprecated and still ships; its successors need
a C++ compiler where the service runs. A network that cannot be traced is run by Python.
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeGuard

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from service.engine.conditioning import Conditioned, Conditioning, Together
from service.engine.layers import Exact, Packed
from service.engine.parts import Parting, Parts

logger = logging.getLogger(__name__)

# Samples in one call of the network. Four of nano take 0.85 of the time of four calls for one, and
# 0.95 where each is of another scene; eight as long as two calls for four (trials on one core).
AT_ONCE = 4
# For eight sizes of pictures and prompts, of one scene and of several: whoever sends more does not
# fill the memory, Python computes the others.
MOST_PROGRAMS = 16


class Given(threading.local):
    """What the calling thread's layers compute with.

    Attributes:
        weights: Of each part of the batch, packed weights, one for each layer; None for the
            layers' own.
        parts: Tell by their first sizes how many samples each part has; none where there is one.
    """

    weights: Sequence[Sequence[Tensor]] | None = None
    parts: Sequence[Tensor] = ()

    @contextmanager
    def by(
        self, weights: Sequence[Sequence[Tensor]], parts: Sequence[Tensor] = ()
    ) -> Iterator[None]:
        """The calling thread's layers compute with these."""
        before = self.weights, self.parts
        self.weights, self.parts = weights, parts
        try:
            yield
        finally:
            self.weights, self.parts = before


@dataclass
class GivenLayer:
    """An exact layer that computes with what is given.

    Attributes:
        place: Where the layer's weight stands among those given.
    """

    exact: Exact
    given: Given
    place: int

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's outcome. [N, ...]"""
        given = self.given
        if given.weights is None:
            return self.exact(x)
        weights = [of_part[self.place] for of_part in given.weights]
        if not given.parts:
            return self.exact.compute(x, weights[0])
        return self.exact.compute_parts(x, given.parts, weights)


class JoinedLayers(threading.local):
    """Layers that are computed as one, where they are asked with the same tensor.

    Args:
        layer: All of them.
        sizes: Channels of each one's outcome.
    """

    def __init__(self, layer: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self._layer = layer
        self._sizes = sizes
        self.forget()

    def forget(self) -> None:
        """Nothing was computed yet."""
        self._asked: Tensor | None = None
        self._outcomes: tuple[Tensor, ...] = ()

    def outcome(self, place: int, x: Tensor) -> Tensor:
        """Of one of the layers, by its place among them."""
        if self._asked is not x:
            self._asked, self._outcomes = x, self._layer(x).split(self._sizes, dim=-1)
        return self._outcomes[place]


# Names a packed weight for each layer of a network, for so many samples.
WeightsFor = Callable[[int], Sequence[Tensor]]


class Programs:
    """A network's programs, for pictures and prompts of one size each, of one scene or of several.

    Args:
        network: Computes [N, C, h, w] from latents, timesteps and prompts.
        given: By which its layers go.
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor], given: Given) -> None:
        self._network = network
        self._given = given
        self._programs: dict[tuple[object, ...], Callable[..., Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Programs traced so far."""
        return len(self._programs)

    def run(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        parts: Sequence[tuple[int, WeightsFor]],
    ) -> Tensor:
        """One call of the network.

        Args:
            latents: And what is known of the picture. [N, C, h, w]
            timesteps: Or what was made of them. [N] or [N, T]
            prompts: Or what was made of them. [N, L, D]
            parts: Samples of each part, ``AT_ONCE`` parts at most, and their weights.
        """
        given = (latents, timesteps, prompts)
        program = self._program(*given, parts)
        # Not in inference mode: forms that are packed here are kept, and their versions read.
        weights = _weights_of(parts)
        # Nothing is told to autograd, which would take a fiftieth of a mixed step. Optimising a
        # program takes longer than tracing it, and does not make it quicker.
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return program(*given, *weights)

    def _program(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        parts: Sequence[tuple[int, WeightsFor]],
    ) -> Callable[..., Tensor]:
        way = self.by_python if len(parts) == 1 else self.by_python_in_parts
        key = (len(parts) == 1, latents.shape[1:], prompts.shape[1:])
        if key not in self._programs:
            with self._lock:
                if key not in self._programs:
                    if len(self._programs) == MOST_PROGRAMS:
                        return way
                    # That of one sample is that of any number: its rows are filled up where one
                    # sample's are too few.
                    one = (latents[:1], timesteps[:1], prompts[:1])
                    weights = parts[0][1](1)
                    example = weights if len(parts) == 1 else _one_part_of(weights)
                    self._programs[key] = self._traced(way, one, example)
        return self._programs[key]

    def by_python(
        self, latents: Tensor, timesteps: Tensor, prompts: Tensor, *weights: Tensor
    ) -> Tensor:
        """What a program for one scene does, by Python."""
        with self._given.by([weights]):
            return self._network(latents, timesteps, prompts)

    def by_python_in_parts(
        self, latents: Tensor, timesteps: Tensor, prompts: Tensor, *parts_and_weights: Tensor
    ) -> Tensor:
        """What a program for several scenes does, by Python.

        Args:
            latents: As for ``run``, and ``timesteps`` and ``prompts``.
            parts_and_weights: What tells the sizes of ``AT_ONCE`` parts, and then the weights of
                one part after the other.
        """
        parts, weights = parts_and_weights[:AT_ONCE], parts_and_weights[AT_ONCE:]
        layers = len(weights) // AT_ONCE
        of_parts = [weights[k * layers : (k + 1) * layers] for k in range(AT_ONCE)]
        with self._given.by(of_parts, parts):
            return self._network(latents, timesteps, prompts)

    def by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """The calling thread's layers compute with these, one for each layer."""
        return self._given.by([weights])

    @torch.no_grad()
    def _traced(
        self,
        way: Callable[..., Tensor],
        given: tuple[Tensor, Tensor, Tensor],
        weights: Sequence[Tensor],
    ) -> Callable[..., Tensor]:
        # Layers want their weights packed for the size of pictures that they have seen.
        self._network(*given)
        try:
            with warnings.catch_warnings():
                # That sizes become part of the program is what is wanted.
                warnings.simplefilter("ignore")
                program: Callable[..., Tensor] = torch.jit.trace(
                    way, (*given, *weights), check_trace=False
                )
        except (RuntimeError, TypeError) as error:
            logger.warning("the U-Net cannot be made a program, Python runs it: %s", error)
            return way
        return program


def _one_part_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """What by_python_in_parts takes for one sample of one part, no tensor of it twice.

    Of a tensor that comes twice the tracer makes views, which packed weights refuse.
    """
    sizes = [1, *[0] * (AT_ONCE - 1)]
    nothing = [torch.empty(0) for _ in range(len(weights) * (AT_ONCE - 1))]
    return [*(torch.empty(size, 0) for size in sizes), *weights, *nothing]


def _weights_of(parts: Sequence[tuple[int, WeightsFor]]) -> list[Tensor]:
    """What a program is given besides its inputs: of several parts their sizes go before.

    There are ``AT_ONCE`` of these always, the last of which may be of no samples, and whose weights
    are then of no matter.
    """
    weights = [of_part(count) for count, of_part in parts]
    if len(parts) == 1:
        return list(weights[0])
    missing = AT_ONCE - len(parts)
    sizes = [*(count for count, _ in parts), *[0] * missing]
    weights += [weights[0]] * missing
    return [*(torch.empty(size, 0) for size in sizes), *itertools.chain(*weights)]


@dataclass
class PartedNetwork:
    """A U-Net whose samples follow a parting, a few of them in one call.

    Attributes:
        weights_of: The packed weights of a part for so many samples, given its set or None.
        conditioning: What is made of timesteps and prompts before the programs, which then take
            that in their place; None where these do it themselves.
    """

    programs: Programs
    parting: Parting
    weights_of: Callable[[Sequence[Packed | None] | None, int], Sequence[Tensor]]
    conditioning: Conditioning | None = None
    _together: Together = field(default_factory=Together)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | Sequence[Tensor],
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As ``UNet2DConditionModel.forward``. [N, C, h, w]

        Where there is a conditioning, a sequence of prompts says that they and the timesteps are
        what ``conditioned`` makes of them.
        """
        prompts = encoder_hidden_states
        timesteps = timestep.expand(len(sample)) if isinstance(prompts, Tensor) else timestep
        outcomes = []
        for start, stop in self.parting.parts.pieces(len(sample), AT_ONCE):
            parts = self.parting.parts.between(start, stop)
            told = self._told(timesteps[start:stop], prompts[start:stop], parts)
            by_part = [
                (size, partial(self.weights_of, chosen))
                for size, chosen in zip(parts.sizes(stop - start), parts.weights, strict=True)
            ]
            outcomes.append(self.programs.run(sample[start:stop], *told, by_part))
        outcome = outcomes[0] if len(outcomes) == 1 else torch.cat(outcomes)
        return UNet2DConditionOutput(sample=outcome) if return_dict else (outcome,)

    def _told(
        self, timesteps: Tensor, prompts: Tensor | Sequence[Tensor], parts: Parts
    ) -> Conditioned:
        """What a call's program is told in the place of timesteps and prompts."""
        if not isinstance(prompts, Tensor):
            return Conditioned(timesteps, self._together.of(prompts))
        made = []
        sizes = parts.sizes(len(prompts))
        for times, texts, chosen in zip(
            timesteps.split(sizes), prompts.split(sizes), parts.weights, strict=True
        ):
            made.append(self.conditioned(times, texts, chosen) or Conditioned(times, texts))
        return Conditioned(*map(torch.cat, zip(*made, strict=True)))

    @torch.no_grad()
    def conditioned(
        self, timesteps: Tensor, prompts: Tensor, chosen: Sequence[Packed | None] | None
    ) -> Conditioned | None:
        """What is made of timesteps and prompts with a set's weights; None where nothing is.

        Args:
            timesteps: [S]
            prompts: [N, L, D]
            chosen: The set; None for the network's own weights.
        """
        if self.conditioning is None:
            return None
        with self.programs.by(self.weights_of(chosen, 1)):
            return self.conditioning.of(timesteps, prompts)


def layers_that_read_alike(network: nn.Module) -> list[list[nn.Module]]:
    """Linear layers that read the same: of self attention, the prompts, the timestep."""
    of_tokens, of_prompts, of_times = [], [], []
    for module in network.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            of_prompts += [module.to_k, module.to_v]
        elif isinstance(module, Attention):
            of_tokens.append([module.to_q, module.to_k, module.to_v])
        elif isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            of_times.append(module.time_emb_proj)
    return [group for group in (*of_tokens, of_prompts, of_times) if len(group) > 1]


def are_alike(group: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    """Whether layers can be computed as one."""
    return (
        all(type(module) is nn.Linear for module in group)
        and len({(module.in_features, module.bias is None) for module in group}) == 1
    )
