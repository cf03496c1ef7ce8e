"""A U-Net on a CPU as a program: no Python between its operations, and weights that are handed in.

What Python does between a thousand small operations takes half as long as computing them does for
one sample of ``nano``, and threads that compute side by side wait for each other's interpreter. So
the network is traced once for pictures of a size, and whoever runs the program says with whose
weights. Samples of several scenes are computed one scene after the other, each by the very
operations by which it would be computed alone.

The programs are TorchScript's, which PyTorch calls deprecated and still ships; its successors need
a C++ compiler where the service runs. A network that cannot be traced is run by Python.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from service.engine.conditioning import Conditioned, Conditioning
from service.engine.layers import Exact, Packed, Parting

logger = logging.getLogger(__name__)

# Samples of one scene in one call of the network. Four of nano take 0.8 of the time of four calls
# for one, and eight as long as two calls for four (trials on one core).
AT_ONCE = 4
# Sizes of pictures and prompts for which there are programs: whoever sends many does not fill the
# memory, Python computes the others.
MOST_PROGRAMS = 8


class Given(threading.local):
    """The packed weights that the calling thread's layers compute with; None for their own."""

    weights: Sequence[Tensor] | None = None

    @contextmanager
    def by(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """The calling thread's layers compute with these, one for each layer."""
        before, self.weights = self.weights, weights
        try:
            yield
        finally:
            self.weights = before


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
        weights = self.given.weights
        return self.exact(x) if weights is None else self.exact.compute(x, weights[self.place])


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


class Programs:
    """A network's programs, each for pictures and prompts of one size.

    Args:
        network: Computes [N, C, h, w] from latents, timesteps and prompts.
        given: By which its layers go.
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor], given: Given) -> None:
        self._network = network
        self._given = given
        self._programs: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}
        self._lock = threading.Lock()

    def run(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        weights: Callable[[int], Sequence[Tensor]],
    ) -> Tensor:
        """One call of the network.

        Args:
            latents: And what is known of the picture. [N, C, h, w]
            timesteps: Or what was made of them. [N] or [N, T]
            prompts: Or what was made of them. [N, L, D]
            weights: Names a packed weight for each of its layers, for so many samples.
        """
        given = (latents, timesteps, prompts)
        program = self._program(*given, weights)
        # Optimising a program takes longer than tracing it, and does not make it quicker.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return program(*given, *weights(len(latents)))

    def _program(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        weights: Callable[[int], Sequence[Tensor]],
    ) -> Callable[..., Tensor]:
        sizes = (latents.shape[1:], prompts.shape[1:])
        if sizes not in self._programs:
            with self._lock:
                if sizes not in self._programs:
                    if len(self._programs) == MOST_PROGRAMS:
                        return self.by_python
                    # That of one sample is that of any number: its rows are filled up where one
                    # sample's are too few.
                    one = (latents[:1], timesteps[:1], prompts[:1])
                    self._programs[sizes] = self._traced(*one, weights)
        return self._programs[sizes]

    def by_python(
        self, latents: Tensor, timesteps: Tensor, prompts: Tensor, *weights: Tensor
    ) -> Tensor:
        """What a program does, by Python."""
        with self._given.by(weights):
            return self._network(latents, timesteps, prompts)

    def by(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """The calling thread's layers compute with these, one for each layer."""
        return self._given.by(weights)

    @torch.no_grad()
    def _traced(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        weights: Callable[[int], Sequence[Tensor]],
    ) -> Callable[..., Tensor]:
        # Layers want their weights packed for the size of pictures that they have seen.
        self._network(latents, timesteps, prompts)
        try:
            with warnings.catch_warnings():
                # That sizes become part of the program is what is wanted.
                warnings.simplefilter("ignore")
                program: Callable[..., Tensor] = torch.jit.trace(
                    self.by_python, (latents, timesteps, prompts, *weights(1)), check_trace=False
                )
        except (RuntimeError, TypeError) as error:
            logger.warning("the U-Net cannot be made a program, Python runs it: %s", error)
            return self.by_python
        return program


@dataclass
class PartedNetwork:
    """A U-Net whose samples follow a parting, one part after the other.

    Attributes:
        weights_of: The packed weights of a part for so many samples, given its set or None.
        conditioning: What is made of timesteps and prompts before the programs, which then take
            that in their place; None where these do it themselves.
    """

    programs: Programs
    parting: Parting
    weights_of: Callable[[Sequence[Packed | None] | None, int], Sequence[Tensor]]
    conditioning: Conditioning | None = None

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
        pieces = []
        for start, stop, chosen in self.parting.parts.pieces(len(sample), AT_ONCE):
            times, of_piece = timesteps[start:stop], prompts[start:stop]
            if not isinstance(of_piece, Tensor):
                told = Conditioned(times, _together(of_piece))
            else:
                told = self.conditioned(times, of_piece, chosen) or Conditioned(times, of_piece)
            weights = partial(self.weights_of, chosen)
            pieces.append(self.programs.run(sample[start:stop], *told, weights))
        outcome = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return UNet2DConditionOutput(sample=outcome) if return_dict else (outcome,)

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


def _together(prompts: Sequence[Tensor]) -> Tensor:
    """Of several samples; not copied where all are one. [L, P] each to [N, L, P]"""
    first = prompts[0]
    if all(prompt is first for prompt in prompts):
        return first.expand(len(prompts), *first.shape)
    return torch.stack(list(prompts))


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
