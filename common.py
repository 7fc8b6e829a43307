"""What the scripts share: files, networks, augmentation, training, evaluation. Importing it does nothing.

The vocabulary, used by every script:

    split     images [N, C, H, W] and labels [N], in memory on the training device
    mask      {parameter name: bool tensor}, True = the weight survives
    state     a state dict: parameters and buffers
    sparsity  the fraction of prunable weights removed
    config    a flat dict of plain values, saved with every result

Prunable are the weights of every Conv2d and Linear, first and last layer included. "Paper" is
"On Synthetic Data and Iterative Magnitude Pruning: a Linear Mode Connectivity Study", "IDC" is
Kim et al. 2022, whose augmentation and distilled data the paper uses.
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import importlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ranks

#############################################
#             Errors and files              #
#############################################


class UserError(Exception):
    """A mistake the user can mend: one clear line on stderr, exit code 2."""


def keep_freed_memory():
    """Let glibc reuse large blocks: given back to the system, their page faults take a third of convnet3's CPU time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def run(main):
    """Call a script's main() and turn a UserError into exit code 2, Ctrl-C into 130."""
    keep_freed_memory()
    try:
        with ranks.all_ranks():
            main()
    except UserError as error:
        ranks.print_once(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        ranks.print_once("\nstopped: the same command goes on from the last finished step")
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Help made of the script's docstring; a wrong flag is one line, like every other mistake."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def at_least(least):
    """argparse type: a whole number, `least` or more."""
    def number(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


positive = at_least(1)


def within(least, most=math.inf):
    """argparse type: a finite number from `least` to `most`."""
    def parsed(text):
        value = float(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} to {most:g}")
        return value

    return parsed


def folder(text):
    """argparse type: the path of a folder that is there or can be made."""
    path = Path(text)
    if any(place.is_file() for place in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{text} is not a folder's path: a file is in its place")
    return path


def choose_device(name=None):
    """The torch.device that --device names; CUDA when there is one, else the CPU. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not a device of this machine's PyTorch") from error
    return device


def write_atomically(path, content):
    """Write bytes to `path` so that a reader, or a power cut, sees the old file or the new one.

    Of several ranks that work together, the first one writes.
    """
    if ranks.together.get().rank:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save(path, value):
    """Save `value` atomically in the format of the suffix: .json, .npz (a dict), .png (a figure) or .pt."""
    buffer = io.BytesIO()
    suffix = Path(path).suffix
    if suffix == ".json":
        buffer.write(json.dumps(value, indent=2).encode() + b"\n")
    elif suffix == ".npz":
        np.savez_compressed(buffer, **value)
    elif suffix == ".png":
        value.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    else:
        torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


def save_csv(path, rows):
    """Save a list of dicts with the same keys as a table, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def load(path, device="cpu"):
    """Read a .pt, .json or .npz file. No code in it is ever run. UserError when missing or damaged."""
    path = Path(path)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays}
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch.load and np.load raise almost any type on a damaged file
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"{path}: damaged, or not a {path.suffix or '.pt'} file of plain tensors ({reason})") from None


def random_stream(seed, *purpose):
    """A CPU generator for one purpose, e.g. random_stream(3, "order", round).

    Streams of different purposes are independent, so a resumed round draws what it would have drawn.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@functools.cache
def compiled_ops():
    """The compiled kernels, or None for plain PyTorch. ops.py chooses once and says so."""
    try:
        import ops
    except ModuleNotFoundError:  # a script and common.py were copied alone
        return None
    return ops if ops.load() else None


#############################################
#                 Networks                  #
#############################################


def norm_layer(kind, channels):
    """`instance` is GroupNorm with one channel a group: instance norm with affine (paper's code)."""
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels, channels)


def first_padding(image_size):
    return 3 if image_size == 28 else 1  # pads MNIST's 28 pixels to 32, as IDC does


class ConvNet3(nn.Sequential):
    """Three blocks [conv3x3, norm, ReLU, average pool 2] and a linear layer (Gidaris & Komodakis 2018)."""

    def __init__(self, channels, image_size, num_classes, width=128, norm="instance"):
        super().__init__()
        size, padding = image_size, first_padding(image_size)
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=padding))
            self.add_module(f"norm{i}", norm_layer(norm, width))
            self.add_module(f"relu{i}", nn.ReLU())
            self.add_module(f"pool{i}", nn.AvgPool2d(2))
            size, channels, padding = (size + 2 * padding - 2) // 2, width, 1
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(width * size * size, num_classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = norm_layer(norm, width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut.add_module("conv", nn.Conv2d(channels, width, 1, stride, bias=False))
            self.shortcut.add_module("norm", norm_layer(norm, width))

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Sequential):
    """ResNet of basic blocks; 7x7/2 stem and max pooling above 64 pixels, else a 3x3 stem (paper's code)."""

    def __init__(self, blocks, channels, image_size, num_classes, width, norm="batch"):
        super().__init__()
        large = image_size > 64
        stem = (dict(kernel_size=7, stride=2, padding=3) if large
                else dict(kernel_size=3, padding=first_padding(image_size)))
        self.conv1 = nn.Conv2d(channels, width, bias=False, **stem)
        self.norm1 = norm_layer(norm, width)
        self.relu1 = nn.ReLU()
        if large:
            self.pool1 = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            out = width << stage
            for i in range(count):
                stride = 2 if stage and not i else 1
                self.add_module(f"stage{stage + 1}_{i + 1}", BasicBlock(channels, out, stride, norm))
                channels = out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))


def build_network(config, seed=0):
    """The network that `config` names (model, width, norm, channels, image_size, num_classes), drawn from `seed`.

    A model `package.module:callable` is called with `num_classes=`. Raises UserError.
    """
    name, shape = config["model"], [config["channels"], config["image_size"], config["num_classes"]]
    options = {key: config[key] for key in ("width", "norm") if config.get(key)}
    blocks = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "convnet3":
            return ConvNet3(*shape, **options)
        if name in blocks:
            return ResNet(blocks[name], *shape, **{"width": 64 if config["image_size"] > 64 else 32} | options)
        module, _, attribute = name.partition(":")
        if not attribute:
            raise UserError(f"unknown model {name!r}: convnet3, resnet10, resnet18 or package.module:callable")
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), attribute)(num_classes=config["num_classes"])
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"cannot build model {name!r}: {error}") from error
        finally:
            sys.path.remove(os.getcwd())


def prunable(model):
    """{name: weight parameter} of every Conv2d and Linear, in the network's order."""
    return {f"{name}.weight" if name else "weight": module.weight
            for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


#############################################
#          Data and augmentation            #
#############################################


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8, or float that is already normalised) and labels [N] on one device."""

    images: torch.Tensor
    labels: torch.Tensor
    mean: tuple = ()
    std: tuple = ()

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Normalised float32 images and labels of `index` (a tensor or a slice)."""
        index = index.to(self.labels.device) if torch.is_tensor(index) else index
        images, labels = self.images[index], self.labels[index]
        if images.dtype != torch.uint8:
            return images, labels
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.float().sub_(mean * 255).div_(std * 255), labels

    def subset(self, index):
        return replace(self, images=self.images[index], labels=self.labels[index])


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


#############################################
#          Training and evaluation          #
#############################################


class Recipe(NamedTuple):
    """How a network is trained: SGD, learning rate times 0.2 at 2/3 and 5/6 of the epochs (paper's code)."""

    epochs: int
    lr: float = .01
    momentum: float = .9
    weight_decay: float = 5e-4
    batch_size: int = 64
    augment: str = "dsa"
    cutmix: float = .5
    flip: bool = True
    sparse: str = "auto"  # "auto", "on" or "off": skip pruned weights on a CPU where that pays (sparse.py)
    amp: bool = False  # train in bfloat16
    compile: bool = False  # run the step through torch.compile

    @property
    def skipping(self):
        """`sparse`, but "off" where the training step has no sparse form."""
        return "off" if self.amp or self.compile else self.sparse

    def learning_rate(self, epoch):
        return self.lr * .2 ** ((epoch >= 2 * self.epochs // 3) + (epoch >= 5 * self.epochs // 6))


def recipe_of(config, epochs):
    """The recipe that `config` holds, for a number of epochs."""
    return Recipe(epochs, **{field: config[field] for field in Recipe._fields[1:] if field in config})


@torch.no_grad()
def masked_sgd_(params, grads, momenta, masks, lr, momentum=0., weight_decay=0., dampening=0., nesterov=False):
    """One SGD step in place, equal to torch.optim.SGD followed by multiplying with the masks.

    Lists of tensors of equal length; a mask is a bool tensor or None. A pruned weight and its momentum are
    exactly 0 afterwards. (torch dampens from the second step on: pass dampening=0 in the first.) The compiled op
    of the same name does this in one pass over memory.
    """
    grads = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads, alpha=1 - dampening)
    steps = torch._foreach_add(grads, momenta, alpha=momentum) if nesterov else momenta
    torch._foreach_add_(params, steps, alpha=-lr)
    for param, velocity, mask in zip(params, momenta, masks):
        if mask is not None:
            param.mul_(mask)
            velocity.mul_(mask)


def sum_gradients(grads, sent):
    """Gradients summed over the ranks in one message, of the entries `sent` (indices into all, laid end to end).

    DistributedDataParallel is no way here: it hooks into backward(), which torch.autograd.grad does not call, waits
    for parameters that fused kernels give no gradient, and would send the pruned weights too.
    """
    flat = torch.cat([g.flatten() for g in grads])
    flat[sent] = ranks.sum_over_ranks_(flat[sent])
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)]


class Trained(NamedTuple):
    loss: float  # mean over the last epoch, on augmented batches
    accuracy: float
    points: int  # training images seen
    momenta: list


def train(model, split, recipe, generator, mask=None, span=None, momenta=None, progress=None):
    """Train `model` in place on `split` and return Trained.

    Weights outside `mask` are set to 0 and stay exactly 0. `span` = (first, last) runs only those epochs of the
    recipe's schedule, with `momenta` carried over. `progress(epoch, loss, accuracy)` is called after each epoch.
    Every random draw (order, augmentation) comes from `generator`. Raises UserError on a loss that is not finite.
    Ranks that work together train one network on the same batches: each computes the gradient of its slice.
    """
    ops = compiled_ops()
    step_, network = (ops.masked_sgd_, ops.fused(model, mask, recipe.skipping)) if ops else (masked_sgd_, model)
    apply_mask(model, mask or {})
    names, params = zip(*model.named_parameters())
    masks = [mask.get(name) if mask else None for name in names]
    momenta = momenta or [torch.zeros_like(p) for p in params]
    rank, size = ranks.together.get()[:2]
    sent = torch.cat([torch.ones_like(p, dtype=torch.bool).flatten() if m is None else m.flatten()
                      for p, m in zip(params, masks)]).nonzero().squeeze(1) if size > 1 else None
    first, last = span or (0, recipe.epochs)
    loss, accuracy, points = math.nan, math.nan, 0

    def step(images, labels, pasted, kept, lr):
        """One update; the loss on `labels` (weight `kept`) and `pasted` (the rest), and how many labels were hit."""
        n = len(labels)
        images, labels, pasted = (part.tensor_split(size)[rank] for part in (images, labels, pasted))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.amp):
            logits = network(images)
        losses = [F.cross_entropy(logits.float(), y, reduction="sum") / n for y in (labels, pasted)]
        batch_loss = kept * losses[0] + (1 - kept) * losses[1]
        grads = torch.autograd.grad(batch_loss, params, allow_unused=True, materialize_grads=True)
        if size > 1:
            grads = sum_gradients(grads, sent)
        step_(params, grads, momenta, masks, lr, recipe.momentum, recipe.weight_decay)
        return batch_loss.detach(), (logits.argmax(1) == labels).sum()

    if recipe.compile:
        import torch._dynamo.config as dynamo
        if hasattr(dynamo, "trace_autograd_ops"):  # in an older torch the graph ends at torch.autograd.grad
            dynamo.trace_autograd_ops = True
        step = torch.compile(step, dynamic=False, mode="reduce-overhead")
    model.train()
    for epoch in range(first, last):
        lr = recipe.learning_rate(epoch)
        losses, hits = [], 0
        for index in torch.randperm(len(split), generator=generator).split(recipe.batch_size):
            images, labels = split.batch(index)
            if recipe.augment == "dsa":
                images = dsa(images, draw_dsa(generator, recipe.flip))
            elif recipe.augment == "imagenet":
                images = imagenet_augment(images, generator)
            pasted, kept = labels, 1.
            if recipe.cutmix and torch.rand((), generator=generator) < recipe.cutmix:
                images, pasted, kept = cutmix(images, labels, generator)
            batch_loss, hit = step(images, labels, pasted, torch.tensor(kept, device=images.device), lr)
            losses.append(batch_loss.clone())  # a CUDA graph writes the next step's to the same place
            hits += hit
        losses = torch.stack(losses)
        if size > 1:
            ranks.sum_over_ranks_(losses), ranks.sum_over_ranks_(hits)
        losses = losses.tolist()  # the only wait for a GPU in an epoch
        broken = next((step for step, value in enumerate(losses) if not math.isfinite(value)), None)
        if broken is not None:
            raise UserError(f"the loss became {losses[broken]} at epoch {epoch}, step {broken}; "
                            f"try a lower --lr than {recipe.lr}")
        loss, accuracy, points = sum(losses) / len(losses), float(hits) / len(split), points + len(split)
        if progress:
            progress(epoch, loss, accuracy)
    broken = next((name for name, p in zip(names, params) if not p.isfinite().all()), None)
    if broken:
        raise UserError(f"{broken} became infinite or NaN in epoch {last - 1}; try a lower --lr than {recipe.lr}")
    return Trained(loss, accuracy, points, momenta)


class Score(NamedTuple):
    loss: float  # mean cross-entropy
    accuracy: float
    loss_error: float  # standard error of the mean loss over images


@torch.no_grad()
def evaluate(model, split, batch_size=500, sparse="auto"):
    """Loss and accuracy on `split` without augmentation, in eval mode; sums in float64."""
    ops = compiled_ops()
    network = ops.fused(model, surviving(model), sparse) if ops else model
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(split), batch_size):
        images, labels = split.batch(slice(start, start + batch_size))
        logits = network(images)
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        total += torch.stack([losses.sum(), losses.square().sum(), (logits.argmax(1) == labels).sum().double()]).cpu()
    return score(*total.tolist(), len(split))


def score(loss_sum, loss_square_sum, correct, n):
    """Score of `n` images from three sums over them."""
    mean = loss_sum / n
    variance = max(loss_square_sum / n - mean * mean, 0.) * n / max(n - 1, 1)
    return Score(mean, correct / n, math.sqrt(variance / n))


def combine(states, weights, mask=None):
    """The weight-space point sum_m weights[m] * states[m], parameters and buffers, with `mask` applied."""
    point = {}
    for name, value in states[0].items():
        if value.is_floating_point():
            value = sum(w * state[name] for w, state in zip(weights, states))
            value = value * mask[name] if mask and name in mask else value
        point[name] = value
    return point


def refresh_batchnorm(model, split, batch_size=500):
    """Re-estimate BatchNorm's running statistics as plain averages over one pass through `split`."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    kept = [m.momentum for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
        model.train()
        with torch.no_grad():
            for start in range(0, len(split), batch_size):
                model(split.batch(slice(start, start + batch_size))[0])
    finally:
        for m, momentum in zip(norms, kept):
            m.momentum = momentum
        model.eval()


def evaluate_points(model, states, coefficients, splits, mask=None, refresh=None, progress=None, sparse="auto"):
    """Scores [K][len(splits)] of the K points combine(states, coefficients[k], mask), each on all `splits`.

    `model` is scratch space: it ends at the last point. `refresh`, a split, re-estimates BatchNorm statistics at
    every point; without it the statistics are combined like the weights. `progress()` is called after each point.
    """
    ops = compiled_ops()
    if ops and not refresh and ops.can_batch(model):
        return ops.evaluate_points(model, states, coefficients, splits, mask, progress, sparse)
    scores = []
    for weights in coefficients:
        model.load_state_dict(combine(states, weights, mask))
        if refresh:
            refresh_batchnorm(model, refresh)
        scores.append([evaluate(model, split, sparse=sparse) for split in splits])
        if progress:
            progress()
    return scores


#############################################
#                   Masks                   #
#############################################


def dense_mask(model):
    """The mask that keeps every prunable weight."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


def surviving(model):
    """The mask of the prunable weights that are not 0."""
    return {name: weight != 0 for name, weight in prunable(model).items()}


def sparsity(mask):
    """Fraction of prunable weights removed."""
    return 1 - sum(int(m.sum()) for m in mask.values()) / sum(m.numel() for m in mask.values())


@torch.no_grad()
def apply_mask(model, mask):
    """Set the weights outside `mask` to 0."""
    for name, kept in mask.items():
        model.get_parameter(name).mul_(kept)


def mean_and_std(values):
    """Mean and standard deviation (over n - 1; 0 of a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.
