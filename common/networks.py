"""The paper's networks, and those of users: built by name, drawn from a seed, and what of them can be pruned."""
import importlib
import math
import os
import sys
from typing import NamedTuple

import torch
from torch import nn

from .errors import UserError

#############################################
#             The paper's networks          #
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


#############################################
#          What they are made of            #
#############################################


class Layer(NamedTuple):
    """A convolution and what follows it, by the names of the modules; "" where there is none."""

    conv: str
    norm: str
    relu: str = ""
    pool: str = ""


class Block(NamedTuple):
    """Layers one after the other. A residual block adds its input (through `shortcut`, if any) before the last ReLU."""

    layers: tuple
    residual: str = ""  # name of the module that is the whole residual block
    shortcut: Layer = None

    def modules(self):
        """The names of the network's children that make up the block."""
        if self.residual:
            return [self.residual]
        return [name for layer in self.layers for name in layer if name]


def blocks_of(model):
    """The Blocks of a ConvNet3 or ResNet, from the images to the classifier `linear`; None for another network."""
    if type(model) is ConvNet3:
        return [Block((Layer(f"conv{i}", f"norm{i}", f"relu{i}", f"pool{i}"),)) for i in (1, 2, 3)]
    if type(model) is not ResNet:
        return None
    stem = Layer("conv1", "norm1", "relu1", "pool1" if hasattr(model, "pool1") else "")
    return [Block((stem,))] + [residual_block(name, module) for name, module in model.named_children()
                               if isinstance(module, BasicBlock)]


def residual_block(name, module):
    """The Block that the BasicBlock called `name` is."""
    layers = tuple(Layer(f"{name}.conv{i}", f"{name}.norm{i}", f"{name}.relu{i}") for i in (1, 2))
    shortcut = Layer(f"{name}.shortcut.conv", f"{name}.shortcut.norm") if len(module.shortcut) else None
    return Block(layers, name, shortcut)


#############################################
#             By name, and pruned           #
#############################################


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
