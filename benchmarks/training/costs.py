"""Operations of a training run, ours and the public script's, from counts of their parts.

The parts are counted by torch while they run. How often each runs is known: of ours by the
configuration, of the public script by its code.

Source: the public RealFill script (thuanz123/realfill and diffusers' example of the same name): a
batch is all pictures of the scene, each encoded anew in every step with and without its hole, each
with a prompt of its own, and every hundred steps four images are sampled in 200 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from realfill.adapt.training import train
from realfill.base import Base
from realfill.config import preset
from realfill.scene import Scene

VALIDATE_EVERY = 100
VALIDATION_IMAGES = 4
VALIDATION_STEPS = 200


@dataclass(frozen=True)
class Costs:
    """Operations, two for each multiplication with its addition.

    Attributes:
        sample: The U-Net of one sample, there and back.
        prompts: Two prompts, there and back, and what else a step does once.
        picture: A picture encoded with and without its hole.
        forward: The U-Net of one sample, there alone.
        decode: A picture decoded.
    """

    sample: int
    prompts: int
    picture: int
    forward: int
    decode: int

    def ours(self, *, steps: int, batch: int, pool: int) -> int:
        """A run of so many steps from a pool of so many pictures."""
        return pool * self.picture + steps * (self.prompts + batch * self.sample)

    def reference(self, *, steps: int, pictures: int) -> int:
        """A run of the public script for a scene of so many pictures, the target among them."""
        training = steps * pictures * (self.sample + self.picture + self.prompts // 2)
        image = VALIDATION_STEPS * self.forward + self.picture // 2 + self.decode
        return training + steps // VALIDATE_EVERY * VALIDATION_IMAGES * image


def count_costs(base: Base, scene: Scene) -> Costs:
    """Train for a step or two with the paper's factors, and count.

    Args:
        base: Whose operations; it is left as it was.
        scene: Any.
    """
    one = _of_training(base, scene, steps=1, batch=1, pool=1)
    sample = _of_training(base, scene, steps=1, batch=2, pool=1) - one
    picture = _of_training(base, scene, steps=1, batch=1, pool=2) - one
    step = _of_training(base, scene, steps=2, batch=1, pool=1) - one
    side, config = base.size_px // base.cell_px, base.unet.config
    latents = torch.zeros(1, int(config.in_channels), side, side).to(base.device, base.dtype)
    prompts = torch.zeros(1, 77, int(config.cross_attention_dim)).to(base.device, base.dtype)
    time = torch.zeros(1, dtype=torch.long, device=base.device)
    channels = base.latent_channels
    return Costs(
        sample=sample,
        prompts=step - sample,
        picture=picture,
        forward=_counted(lambda: base.unet(latents, time, prompts)),
        decode=_counted(lambda: base.autoencoder.decode(latents[:, :channels])),
    )


def _of_training(base: Base, scene: Scene, *, steps: int, batch: int, pool: int) -> int:
    config = preset("paper", steps=steps, batch=batch, pool=pool)
    return _counted(lambda: list(train(base, scene, config)), gradients=True)


def _counted(work: Callable[[], object], *, gradients: bool = False) -> int:
    # The counter does not know the CPU's fused attention, only the products that it is made of.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients), plain:
        work()
    return int(counter.get_total_flops())
