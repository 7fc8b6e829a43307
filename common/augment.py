"""Augmentation of training batches: DSA, IDC's for ImageNet, CutMix. Every draw comes from the generator given."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Draw(NamedTuple):
    """One draw of differentiable siamese augmentation, shared by a batch (or by a real and a synthetic one)."""

    flip: bool
    brightness: float
    saturation: float
    contrast: float
    geometry: str
    x: float  # two numbers in [-1, 1] that the geometry reads
    y: float


def draw_dsa(generator, flip=True):
    """Draw DSA (Zhao & Bilen 2021): flip and colour always, one of crop, scale and rotate."""
    u = torch.rand(7, generator=generator).tolist()
    return Draw(flip and u[0] < .5, u[1] - .5, 2 * u[2], .5 + u[3], ("crop", "scale", "rotate")[int(3 * u[4])],
                2 * u[5] - 1, 2 * u[6] - 1)


def dsa(images, draw):
    """Apply `draw` to normalised images [N, C, H, W], differentiably; ranges as IDC's (12.5%, 1.2, 15 degrees)."""
    images = (images.flip(3) if draw.flip else images) + draw.brightness
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey, images, draw.saturation) if images.shape[1] > 1 else images
    centre = images.mean((1, 2, 3), keepdim=True)
    images = torch.lerp(centre, images, draw.contrast)
    size = images.shape[-1]
    if draw.geometry == "crop":
        pad = round(.125 * size)
        dx, dy = (min(int((v + 1) / 2 * (2 * pad + 1)), 2 * pad) for v in (draw.x, draw.y))
        return F.pad(images, [pad] * 4)[:, :, dy:dy + size, dx:dx + size]
    if draw.geometry == "scale":
        lowest, highest = 1 / 1.2, 1.2
        sx, sy = (lowest + (v + 1) / 2 * (highest - lowest) for v in (draw.x, draw.y))
        transform = [[sx, 0, 0], [0, sy, 0]]
    else:
        angle = math.radians(15) * draw.x
        transform = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]
    grid = F.affine_grid(images.new_tensor([transform]).expand(len(images), 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def imagenet_augment(images, generator):
    """IDC's for ImageNet: random resized crop (area 0.5-1), flip, colour jitter 0.4, lighting 0.1, drawn per image."""
    n = len(images)
    u = torch.rand(n, 7, generator=generator).to(images.device)
    side = torch.sqrt(.5 + .5 * u[:, 0])
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3)).sqrt()
    sx, sy = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    transform = images.new_zeros(n, 2, 3)
    transform[:, 0, 0], transform[:, 1, 1] = torch.where(u[:, 2] < .5, -sx, sx), sy
    transform[:, 0, 2], transform[:, 1, 2] = (2 * u[:, 3] - 1) * (1 - sx), (2 * u[:, 4] - 1) * (1 - sy)
    grid = F.affine_grid(transform, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    jitter = .6 + .8 * torch.rand(n, 3, 1, 1, 1, generator=generator).to(images.device)
    images = images * jitter[:, 0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, jitter[:, 1])
    images = torch.lerp(images.mean(1, keepdim=True), images, jitter[:, 2])
    if images.shape[1] != 3:
        return images
    # Principal axes of ImageNet's colours (Krizhevsky et al. 2012), in units of its standard deviation.
    axes = images.new_tensor([[-.5675, .7192, .4009], [-.5808, -.0045, -.8140], [-.5836, -.6948, .4203]])
    scale = images.new_tensor([.2175, .0188, .0045]) * .1 / .225
    shift = (torch.randn(n, 3, generator=generator).to(images) * scale) @ axes.T
    return images + shift[:, :, None, None]


def cutmix(images, labels, generator):
    """CutMix with beta = 1 (Yun et al. 2019): (images, labels of the pasted boxes, area fraction kept)."""
    u, size = torch.rand(3, generator=generator).tolist(), images.shape[-1]
    half = size * math.sqrt(1 - u[0]) / 2
    (x0, x1), (y0, y1) = ([int(min(max(c * size + d, 0), size)) for d in (-half, half)] for c in u[1:])
    other = torch.randperm(len(images), generator=generator).to(images.device)
    images = images.clone()
    images[:, :, y0:y1, x0:x1] = images[other][:, :, y0:y1, x0:x1]
    return images, labels[other], 1 - (x1 - x0) * (y1 - y0) / size ** 2


class Batch(NamedTuple):
    """Augmented images with two labels each: the loss is kept * loss(labels) + (1 - kept) * loss(pasted)."""

    images: torch.Tensor  # [N, C, H, W]
    labels: torch.Tensor  # [N]
    pasted: torch.Tensor  # [N], of the boxes that CutMix pasted
    kept: torch.Tensor  # scalar on the device, so that a compiled step need not know its value


def augmented(images, labels, recipe, generator):
    """The Batch that `recipe` (its augment, flip and cutmix) makes of normalised images [N, C, H, W]."""
    if recipe.augment == "dsa":
        images = dsa(images, draw_dsa(generator, recipe.flip))
    elif recipe.augment == "imagenet":
        images = imagenet_augment(images, generator)
    pasted, kept = labels, 1.
    if recipe.cutmix and torch.rand((), generator=generator) < recipe.cutmix:
        images, pasted, kept = cutmix(images, labels, generator)
    return Batch(images, labels, pasted, torch.tensor(kept, device=images.device))
