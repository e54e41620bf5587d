"""The demonstration of DDAE++: does a summary of the middle layers change the loss, and what a linear probe reads?

Images hold one of eight binary templates at a random place and brightness. A small diffusion transformer denoises them,
with and without the summary; a ridge probe then reads the template from the pooled features of each block. Controls:
the same network without the summary, on the same batches and noise; and, after training, the summary of another image
in the place of one's own, at nearly the same time (`held_out_loss(..., exchanged=True)`): is it used at all?
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .ddae_pp import SelfConditionedDenoiser, interpolate, ridge_probe, velocity_loss


@dataclass(frozen=True)
class Settings:
    """Sizes of the toy; defaults take some seconds for each network."""

    side: int = 9
    patch: int = 3
    template: int = 5
    classes: int = 8
    images: int = 2000
    held_out: int = 1000
    noise: float = 0.2
    width: int = 32
    layers: int = 4
    after: int = 2
    steps: int = 350
    batch: int = 64
    learning_rate: float = 3e-3
    probe_time: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side % self.patch or not 1 <= self.template <= self.side:
            raise UserError("side must be a multiple of patch, and template at most side")
        if min(self.classes, self.images, self.held_out, self.steps, self.batch) < 2:
            raise UserError("classes, images, held_out, steps and batch must be at least 2")
        if not 0 <= self.probe_time <= 1:
            raise UserError(f"probe_time must lie in [0, 1], got {self.probe_time}")

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.side // self.patch) ** 2


@dataclass(frozen=True)
class Data:
    """Patches [n, N, P] and the template of each image [n]."""

    patches: Tensor
    labels: Tensor


def data(settings: Settings, count: int, generator: torch.Generator) -> Data:
    """Images with one template each; the templates are the same for every seed."""
    s, k = settings.side, settings.template
    templates = (torch.rand(settings.classes, k, k, generator=torch.Generator().manual_seed(7)) < 0.5).float()
    labels = torch.randint(settings.classes, (count,), generator=generator)
    corner = torch.randint(s - k + 1, (count, 2), generator=generator)
    bright = 1 + torch.rand(count, 1, 1, generator=generator)
    rows = (corner[:, :1] + torch.arange(k))[:, :, None].expand(-1, -1, k)
    columns = (corner[:, 1:] + torch.arange(k))[:, None].expand(-1, k, -1)
    images = settings.noise * torch.randn(count, s, s, generator=generator) - 0.3
    images[torch.arange(count)[:, None, None], rows, columns] += bright * templates[labels]
    p = settings.patch
    patches = images.view(count, s // p, p, s // p, p).transpose(2, 3).reshape(count, -1, p * p)
    return Data(patches, labels)


def train(settings: Settings, known: Data, after: int) -> SelfConditionedDenoiser:
    """A denoiser whose summary is taken after block `after` (0: none); both draw the same batches, times and noise."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SelfConditionedDenoiser(
            settings.tokens, settings.patch**2, settings.width, settings.layers, after=after
        )
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    for _ in range(settings.steps):
        x = known.patches[torch.randint(len(known.patches), (settings.batch,), generator=generator)]
        t, eps = torch.rand(len(x), generator=generator), torch.randn(x.shape, generator=generator)
        loss = velocity_loss(model(interpolate(x, eps, t), t), x, eps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


@torch.no_grad()
def held_out_loss(model: SelfConditionedDenoiser, tested: Data, settings: Settings, exchanged: bool = False) -> float:
    """Velocity loss on images that were not trained on, at evenly spaced times.

    `exchanged`: each image gets the summary of its neighbour, whose time differs by one part in the number of images.
    """
    generator = torch.Generator().manual_seed(settings.seed + 2)
    x = tested.patches
    t = (torch.arange(len(x)) + 0.5) / len(x)
    eps = torch.randn(x.shape, generator=generator)
    others = torch.arange(len(x)).roll(1) if exchanged else None
    return float(velocity_loss(model(interpolate(x, eps, t), t, others), x, eps))


def probe(model: SelfConditionedDenoiser, known: Data, tested: Data, settings: Settings, time: float) -> list[float]:
    """Accuracy of a linear probe for the template on the features of each block, at one noise level."""
    generator = torch.Generator().manual_seed(settings.seed + 3)

    def read(part: Data) -> list[Tensor]:
        t = torch.full((len(part.patches),), time)
        eps = torch.randn(part.patches.shape, generator=generator)
        return model.features(interpolate(part.patches, eps, t), t)

    blocks = zip(read(known), read(tested), strict=True)
    guesses = [ridge_probe(a, known.labels, b) for a, b in blocks]
    return [float((guess == tested.labels).double().mean()) for guess in guesses]
