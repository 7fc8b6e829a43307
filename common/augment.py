"""Augmentation of training batches: DSA, IDC's for ImageNet, CutMix. Every draw comes from the generator given.

What is random is drawn on the CPU, as tensors, and applied on the images' device, which is never waited for.

Formulas and ranges are those of IDC's code (Kim et al. 2022), which the paper trains with.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .kernels import ops

#############################################
#     Differentiable siamese augmentation   #
#############################################

SCALE, ANGLE, CROP, CUTOUT = 1.2, math.radians(15), .125, .5  # largest scale, angle, shift and box; of the side
TRAINING = ("crop", "scale", "rotate")  # one of them for a batch; the numbers differ from image to image


class Draw(NamedTuple):
    """Draws of differentiable siamese augmentation: tensors [N], one number an image, or [1], one for all images."""

    flip: torch.Tensor  # bool
    brightness: torch.Tensor  # added
    saturation: torch.Tensor  # factor of the distance from grey
    contrast: torch.Tensor  # factor of the distance from the image's mean
    geometry: str  # what x and y, in [-1, 1], mean: crop, scale or rotate
    x: torch.Tensor
    y: torch.Tensor
    box: torch.Tensor = None  # [N, 2] in [0, 1]: centres of the boxes that cutout makes grey


def draw_dsa(generator, count=1, flip=True, geometries=TRAINING, cutout=False):
    """Draw DSA (Zhao & Bilen 2021) for `count` images: colour always, a flip if `flip`, and one of the geometries.

    In training every image has its own numbers; images that are matched share one draw (count 1).
    """
    u = torch.rand(count, 7, generator=generator).unbind(1)
    choice = geometries[int(len(geometries) * u[4][0])]
    box = torch.rand(count, 2, generator=generator) if cutout else None
    return Draw((u[0] < .5) & flip, u[1] - .5, 2 * u[2], .5 + u[3], choice, 2 * u[5] - 1, 2 * u[6] - 1, box)


def dsa(images, draw):
    """Apply `draw` to normalised images [N, C, H, W], differentiably; by its op where nobody differentiates."""
    if draw.box is None and not images.requires_grad:
        parts = colour_and_transform(draw, *images.shape[2:])
        return recoloured_and_moved(images, *(part.to(images.device).expand(len(images), -1) for part in parts))
    draw = Draw(*(part.to(images.device) if torch.is_tensor(part) else part for part in draw))
    images = ops.recolour(images, torch.stack(draw[1:4], 1))
    if draw.geometry == "crop":
        images = shift(images, draw)
    else:
        images = warp(images, draw)
    return images if draw.box is None else cut_out(images, draw.box)


def recoloured_and_moved(images, colour, transform):
    """ops.dsa_reference, by the op where it takes the images."""
    if ops.runs_on(images.device.type) and images.dtype == torch.float32 and images.shape[1] <= 4:
        return torch.ops.lottery.dsa(images, colour, transform)
    return ops.dsa_reference(images, colour, transform)


def colour_and_transform(draw, height, width):
    """What the op takes of a draw: [N or 1, 3] and [N or 1, 6]."""
    return torch.stack(draw[1:4], 1), pixel_transform(draw, height, width)


def pixel_transform(draw, height, width):
    """[N, 6]: pixel (i, j) of the result is the image at column a j + b i + c, row d j + e i + f."""
    one, zero = torch.ones_like(draw.x), torch.zeros_like(draw.x)
    if draw.geometry == "crop":
        top, left = offsets(draw, height)
        a, b, d, e = one, zero, zero, one
        c, f = left.float(), top.float()
    else:
        (a, b), (d, e) = linear_map(draw)
        middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
        b, d = b * width / height, d * height / width
        c = middle_column - a * middle_column - b * middle_row
        f = middle_row - d * middle_column - e * middle_row
    a, b, c = (torch.where(draw.flip, flipped, own) for flipped, own in ((-a, a), (-b, b), (width - 1 - c, c)))
    return torch.stack([a, b, c, d, e, f], 1)


def offsets(draw, size):
    """(rows, columns) [N] by which crop moves images: -pad ... pad, all equally likely."""
    pad = int(CROP * size + .5)
    return [((place + 1) / 2 * (2 * pad + 1)).long().clamp(max=2 * pad) - pad for place in (draw.y, draw.x)]


def linear_map(draw):
    """((a, b), (d, e)) [N] of scale and rotate: about the centre, (x, y) is read at (a x + b y, d x + e y)."""
    if draw.geometry == "scale":
        sx, sy = ((place + 1) / 2 * (SCALE - 1 / SCALE) + 1 / SCALE for place in (draw.x, draw.y))
        return (sx, torch.zeros_like(sx)), (torch.zeros_like(sx), sy)
    sine, cosine = torch.sin(ANGLE * draw.x), torch.cos(ANGLE * draw.x)
    return (cosine, -sine), (sine, cosine)


def shift(images, draw):
    """Flip, then move every image by whole pixels, at most CROP of its side; what comes in is 0."""
    height, width = images.shape[2:]
    images = torch.where(draw.flip[:, None, None, None], images.flip(3), images)
    pad = int(CROP * height + .5)
    top, left = (offset + pad for offset in offsets(draw, height))
    images = F.pad(images, [pad] * 4)
    if len(top) == 1:  # a view, whose gradient costs nothing
        return images[:, :, top[0]:top[0] + height, left[0]:left[0] + width]
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view [N, C, 2 pad + 1, 2 pad + 1, H, W]
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def warp(images, draw):
    """Flip and scale or rotate every image about its centre, bilinearly."""
    transform = images.new_zeros(len(draw.x), 2, 3)
    for row, values in enumerate(linear_map(draw)):
        transform[:, row, 0], transform[:, row, 1] = values
    # A flipped image read at x is the image read at -x.
    transform[:, 0] = torch.where(draw.flip[:, None], -transform[:, 0], transform[:, 0])
    grid = F.affine_grid(transform.expand(len(images), 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def cut_out(images, centre):
    """Make a box of CUTOUT of the side 0 around centre [N, 2] (y, x; of the side); it may reach over the edge."""
    height, width = images.shape[2:]
    boxes = []
    for size, place in zip((height, width), centre.unbind(1)):
        length = int(CUTOUT * size + .5)
        middle = (place * (size + 1 - length % 2)).long()[:, None]
        pixels = torch.arange(size, device=centre.device)
        boxes.append((pixels >= middle - length // 2) & (pixels < middle - length // 2 + length))
    hidden = boxes[0][:, :, None] & boxes[1][:, None, :]
    return images * ~hidden[:, None]


#############################################
#                 ImageNet                  #
#############################################


def draw_imagenet(generator, n, channels):
    """Draw IDC's augmentation for `n` images of ImageNet: (where they are read [N, 2, 3], as F.affine_grid takes it;
    factors of brightness, contrast and saturation [N, 3]; shifts of their three colours [N, 3], or None)."""
    u = torch.rand(n, 7, generator=generator)
    side = torch.sqrt(.5 + .5 * u[:, 0])
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3)).sqrt()
    sx, sy = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0], place[:, 1, 1] = torch.where(u[:, 2] < .5, -sx, sx), sy
    place[:, 0, 2], place[:, 1, 2] = (2 * u[:, 3] - 1) * (1 - sx), (2 * u[:, 4] - 1) * (1 - sy)
    jitter = .6 + .8 * torch.rand(n, 3, 1, 1, 1, generator=generator).view(n, 3)
    return place, jitter, draw_lighting(generator, n) if channels == 3 else None


def draw_lighting(generator, n):
    """Shifts [N, 3] along the principal axes of ImageNet's colours (Krizhevsky et al. 2012)."""
    axes = torch.tensor([[-.5675, .7192, .4009], [-.5808, -.0045, -.8140], [-.5836, -.6948, .4203]])
    scale = torch.tensor([.2175, .0188, .0045]) * .1 / .225  # in units of its standard deviation
    return torch.randn(n, 3, generator=generator) * scale @ axes.T


def imagenet_augment(images, black, place, jitter, light):
    """IDC's for ImageNet: random resized crop (area 0.5-1), flip, colour jitter 0.4, lighting 0.1, as drawn.

    Images [N, C, H, W] are normalised; `black` [C, 1, 1] is what they are where the raw value is 0.
    """
    grid = F.affine_grid(place.to(images.dtype), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    jitter = jitter.to(images.dtype)[:, :, None, None, None]
    images = torch.lerp(black, images, jitter[:, 0])
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, jitter[:, 1])
    images = torch.lerp(images.mean(1, keepdim=True), images, jitter[:, 2])
    return images if light is None else images + light.to(images.dtype)[:, :, None, None]


def usual_augmentation(image_size):
    """Kim et al.'s augmentation of images of so many pixels a side, and their probability of CutMix."""
    return {"augment": "imagenet", "cutmix": 1.} if image_size > 64 else {"augment": "dsa", "cutmix": .5}


#############################################
#                  CutMix                   #
#############################################


def draw_cutmix(generator, n, size):
    """Draw CutMix with beta = 1 (Yun et al. 2019) for a batch of `n` images of `size` pixels.

    (the image whose box each gets [N], the box's rows and columns, bool [size] each, the area fraction kept).
    """
    u = torch.rand(3, generator=generator).tolist()
    half = int(size * math.sqrt(1 - u[0])) // 2
    (x0, x1), (y0, y1) = (edges(int(size * place), half, size) for place in u[1:])
    pixels = torch.arange(size)
    other = torch.randperm(n, generator=generator)
    return other, (pixels >= y0) & (pixels < y1), (pixels >= x0) & (pixels < x1), 1 - (x1 - x0) * (y1 - y0) / size ** 2


def edges(centre, half, size):
    """Where a box begins and ends on an axis of `size` pixels."""
    return max(centre - half, 0), min(centre + half, size)


def cutmix(images, labels, other, rows, columns):
    """(images with the boxes of other images pasted in, labels of what was pasted)."""
    return torch.where(rows[:, None] & columns, images[other], images), labels[other]


#############################################
#                 A batch                   #
#############################################


class Draws(NamedTuple):
    """All that changes from one training step to the next, drawn on the CPU; None where the recipe does not use it."""

    index: torch.Tensor  # of the images, [N]
    lr: torch.Tensor  # learning rate, []
    kept: torch.Tensor = None  # weight of an image's own label, []; that of the pasted one is 1 - kept
    other: torch.Tensor = None  # of cutmix,
    rows: torch.Tensor = None
    columns: torch.Tensor = None
    colour: torch.Tensor = None  # of DSA,
    transform: torch.Tensor = None
    place: torch.Tensor = None  # and of imagenet_augment
    jitter: torch.Tensor = None
    light: torch.Tensor = None


class Batch(NamedTuple):
    """Augmented images with two labels each: the loss is kept * loss(labels) + (1 - kept) * loss(pasted)."""

    images: torch.Tensor  # [N, C, H, W]
    labels: torch.Tensor  # [N], or soft ones [N, classes]
    pasted: torch.Tensor = None  # of the boxes that CutMix pasted; None without one
    kept: torch.Tensor = None


def draw_batch(index, lr, split, recipe, generator):
    """The Draws of the images `index` of a split, as `recipe` (its augment, flip and cutmix) says."""
    n, (channels, height, width) = len(index), split.images.shape[1:]
    drawn = {}
    if recipe.augment in ("dsa", "crop"):
        options = {"flip": recipe.flip} if recipe.augment == "dsa" else {"flip": False, "geometries": ("crop",)}
        names, values = ("colour", "transform"), colour_and_transform(draw_dsa(generator, n, **options), height, width)
        drawn.update(zip(names, values))
    elif recipe.augment == "imagenet":
        drawn.update(zip(("place", "jitter", "light"), draw_imagenet(generator, n, channels)))
    if recipe.cutmix and torch.rand((), generator=generator) < recipe.cutmix:
        *box, kept = draw_cutmix(generator, n, width)
        drawn.update(zip(("other", "rows", "columns"), box), kept=torch.tensor(kept))
    return Draws(index, torch.tensor(lr), **drawn)


def even(draws, recipe, split):
    """Draws that have the same parts in every batch: where CutMix pastes nothing, an empty box."""
    if not recipe.cutmix or draws.other is not None:
        return draws
    nothing = torch.zeros(split.images.shape[3], dtype=torch.bool)
    return draws._replace(other=draws.index.new_zeros(len(draws.index)), rows=nothing, columns=nothing,
                          kept=torch.ones(()))


def augmented(split, draws):
    """The Batch that `draws`, on the split's device, make of its images."""
    images, labels = split.batch(draws.index)
    if draws.colour is not None:
        images = recoloured_and_moved(images, draws.colour, draws.transform)
    if draws.place is not None:
        images = imagenet_augment(images, split.black, draws.place, draws.jitter, draws.light)
    if draws.other is None:
        return Batch(images, labels)
    images, pasted = cutmix(images, labels, draws.other, draws.rows, draws.columns)
    return Batch(images, labels, pasted, draws.kept)
