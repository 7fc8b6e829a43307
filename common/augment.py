"""Augmentation of training batches: DSA, IDC's for ImageNet, CutMix. Every draw comes from the generator given.

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
    """Apply `draw` to normalised images [N, C, H, W], differentiably; by the op of that name where nobody differentiates.

    Op: dsa(images, colour [N, 3], transform [N, 6]), float32 on a CPU, at most 4 channels.
    """
    plain = images.dtype == torch.float32 and images.shape[1] <= 4 and draw.box is None and not images.requires_grad
    if plain and images.device.type == "cpu" and ops.runs_on("cpu"):
        colour = torch.stack(draw[1:4], 1).expand(len(images), 3)
        return torch.ops.lottery.dsa(images, colour, pixel_transform(draw, *images.shape[2:]).expand(len(images), 6))
    draw = Draw(*(part.to(images.device) if torch.is_tensor(part) else part for part in draw))
    images = recolour(images, draw)
    if draw.geometry == "crop":
        images = shift(images, draw)
    else:
        images = warp(images, draw)
    return images if draw.box is None else cut_out(images, draw.box)


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


def recolour(images, draw):
    """Brightness, then saturation about each pixel's grey, then contrast about each image's mean, as one sum."""
    brightness, saturation, contrast = (part.view(-1, 1, 1, 1) for part in draw[1:4])
    if images.shape[1] == 1:
        saturation = torch.ones_like(saturation)
    grey = images.mean(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)  # saturation does not change it
    rest = contrast * (1 - saturation) * grey + ((1 - contrast) * mean + brightness)
    return torch.addcmul(rest, images, contrast * saturation)


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


def imagenet_augment(images, generator, mean, std):
    """IDC's for ImageNet: random resized crop (area 0.5-1), flip, colour jitter 0.4, lighting 0.1, drawn per image.

    Images [N, C, H, W] are normalised by `mean` and `std` [C]; brightness works on values in [0, 1].
    """
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
    black = -(images.new_tensor(mean) / images.new_tensor(std)).view(-1, 1, 1)  # a raw value of 0
    images = torch.lerp(black, images, jitter[:, 0])
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, jitter[:, 1])
    images = torch.lerp(images.mean(1, keepdim=True), images, jitter[:, 2])
    return images + lighting(images, generator) if images.shape[1] == 3 else images


def lighting(images, generator):
    """Shifts [N, 3, 1, 1] along the principal axes of ImageNet's colours (Krizhevsky et al. 2012)."""
    axes = images.new_tensor([[-.5675, .7192, .4009], [-.5808, -.0045, -.8140], [-.5836, -.6948, .4203]])
    scale = images.new_tensor([.2175, .0188, .0045]) * .1 / .225  # in units of its standard deviation
    amounts = torch.randn(len(images), 3, generator=generator).to(images) * scale
    return (amounts @ axes.T)[:, :, None, None]


#############################################
#            CutMix, and a batch            #
#############################################


def cutmix(images, labels, generator):
    """CutMix with beta = 1 (Yun et al. 2019): (images, labels of the pasted boxes, area fraction kept)."""
    u, size = torch.rand(3, generator=generator).tolist(), images.shape[-1]
    half = int(size * math.sqrt(1 - u[0])) // 2
    (x0, x1), (y0, y1) = (edges(int(size * place), half, size) for place in u[1:])
    other = torch.randperm(len(images), generator=generator).to(images.device)
    images = images.clone()
    images[:, :, y0:y1, x0:x1] = images[other][:, :, y0:y1, x0:x1]
    return images, labels[other], 1 - (x1 - x0) * (y1 - y0) / size ** 2


def edges(centre, half, size):
    """Where a box begins and ends on an axis of `size` pixels."""
    return max(centre - half, 0), min(centre + half, size)


class Batch(NamedTuple):
    """Augmented images with two labels each: the loss is kept * loss(labels) + (1 - kept) * loss(pasted)."""

    images: torch.Tensor  # [N, C, H, W]
    labels: torch.Tensor  # [N], or soft ones [N, classes]
    pasted: torch.Tensor  # of the boxes that CutMix pasted
    kept: torch.Tensor  # scalar on the device, so that a compiled step need not know its value


def augmented(split, index, recipe, generator):
    """The Batch that `recipe` (its augment, flip and cutmix) makes of the images `index` of a split."""
    images, labels = split.batch(index)
    if recipe.augment == "dsa":
        images = dsa(images, draw_dsa(generator, len(images), recipe.flip))
    elif recipe.augment == "crop":
        images = dsa(images, draw_dsa(generator, len(images), flip=False, geometries=("crop",)))
    elif recipe.augment == "imagenet":
        images = imagenet_augment(images, generator, split.mean, split.std)
    pasted, kept = labels, 1.
    if recipe.cutmix and torch.rand((), generator=generator) < recipe.cutmix:
        images, pasted, kept = cutmix(images, labels, generator)
    return Batch(images, labels, pasted, torch.tensor(kept, device=images.device))
