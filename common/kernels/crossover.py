"""Where a network turns sparse: its own blocks timed on this machine, dense against sparse, once.

The times are kept in torch's extension cache, one file for each processor, instruction set, version of the kernels and
shape of network. They decide how fast a network runs, never what it computes beyond rounding; with the file in place a
choice depends on the mask alone. Who deletes it has it measured again. One thread is timed, by its own clock: other
work on the machine hardly disturbs that, and bits stay those of any number of threads.
"""
import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from ..files import locked
from ..networks import ConvNet3, blocks_of
from . import build
from .dense import Fused
from .sparse import SparseNetwork, blocked

IMAGES = 32  # in a timed batch: with fewer the weights count too much, with more ResNet-18 takes too long
TURNS = 2  # at least, of which the fastest counts
SECONDS = .1  # for further turns with a block
DENSITIES = (.05, .25)  # timed; a sparse block's time is linear in its density
UNPRUNED = .5  # above this density no processor gains, and nothing is timed
# Of the dense network's time, that a sparse one must gain: two threads run dense layers 1.8 times as fast and sparse
# ones, which wait for each other more often, 1.6 times, on a machine with other work less.
MARGIN = .25


def first_sparse_block(model, mask):
    """The block from which on a network is sparse; the number of its blocks where that does not pay."""
    densities = densities_of(model, mask)
    if min(densities) > UNPRUNED:
        return len(densities)
    return best_start(costs_of(model), densities)


def densities_of(model, mask):
    """The fraction of surviving weights in the convolutions of each block."""
    densities = []
    for block in blocks_of(model):
        layers = [*block.layers, *([block.shortcut] if block.shortcut else [])]
        masks = [mask[f"{layer.conv}.weight"] for layer in layers]
        densities.append(sum(int(kept.sum()) for kept in masks) / sum(kept.numel() for kept in masks))
    return densities


def best_start(costs, densities):
    """The start with the least time, given rows (dense, change of layout, sparse at density 0, and per density).

    All dense unless a start gains more than MARGIN.
    """
    dense = [row[0] for row in costs]
    sparse = [fixed + slope * density for (_, _, fixed, slope), density in zip(costs, densities)]
    times = [sum(dense[:start]) + costs[start][1] + sum(sparse[start:]) for start in range(len(costs))]
    start = min(range(len(times)), key=times.__getitem__)
    return start if times[start] < (1 - MARGIN) * sum(dense) else len(costs)


#############################################
#                  The cache                #
#############################################


def costs_of(model):
    """Seconds of each block of `model`, rows as `best_start` wants them; measured where the cache has none."""
    about = this_machine() | {"network": str(model)}
    return kept_costs(json.dumps(about), lambda: measured(model))


@functools.cache
def this_machine():
    """What times depend on besides the network; the lanes tell the instruction set."""
    return {"processor": processor(), "lanes": torch.ops.lottery.sparse_lanes(), "torch": torch.__version__,
            "kernels": build.sources_hash()}


memory = {}  # {description: costs} of this process


def kept_costs(about, measure):
    """The costs in the file of the description `about`, or those that `measure()` returns, kept there from now on.

    Of several processes one measures and the others wait for it. A damaged file is made again.
    """
    if about not in memory:
        name = hashlib.sha256(about.encode()).hexdigest()[:16]
        path = build.cache_folder() / f"{build.NAME}-crossover" / f"{name}.json"
        try:
            with locked(path.with_suffix(".lock"), wait=True):
                memory[about] = read(path, about) or measure_and_write(path, about, measure)
        except (OSError, UserError):  # a folder that cannot be written
            memory[about] = measure()
    return memory[about]


def read(path, about):
    """The costs in a file; None where it is missing, damaged, or of something else."""
    try:
        kept = json.loads(path.read_text())
        rows = [tuple(map(float, row)) for row in kept["costs"]]
        return rows if kept["about"] == json.loads(about) and {len(row) for row in rows} == {4} else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def measure_and_write(path, about, measure):
    """Write measured costs atomically, whichever of several ranks this is."""
    costs = measure()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": json.loads(about), "costs": costs}, indent=1))
    os.replace(temporary, path)
    return costs


def processor():
    """What Linux calls the processor, else what Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


#############################################
#               The measurement             #
#############################################


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
@torch.enable_grad()
def measured(model):
    """Time forward and backward pass of each block of a copy of `model`, on random images and random masks."""
    began = time.perf_counter()
    model, costs, known = copy.deepcopy(model).train().requires_grad_(), [], {}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, model.conv1.in_channels, *[image_side(model)] * 2, generator=generator)
    for number, block in enumerate(blocks_of(model)):
        modules = nn.Sequential(*map(model.get_submodule, block.modules()))
        shape = f"{modules} {images.shape} {number > 0}"
        if shape not in known:
            known[shape] = times_of(model, block, Fused(modules), images.requires_grad_(number > 0), generator)
        costs.append(known[shape])
        with torch.no_grad():
            images = modules(images).detach()
    print(f"csrc: timed where sparse layers pay, {time.perf_counter() - began:.1f} s, once", file=sys.stderr)
    return costs


def times_of(model, block, dense, images, generator):
    """(dense, change of layout, sparse at density 0, sparse per density) of one block, in seconds."""
    halo = model.get_submodule(block.layers[0].conv).padding[0]
    x = blocked(images.detach(), halo)
    x = x._replace(data=x.data.requires_grad_(images.requires_grad))
    steps = [step_of(dense.run, images, list(dense.model[0].parameters())),
             step_of(lambda data: blocked(data, halo).data, images, [])]
    steps += [sparse_step(model, block, density, x, generator) for density in DENSITIES]
    whole, change, low, high = fastest(steps)
    slope = max(high - low, 0.) / (DENSITIES[1] - DENSITIES[0])
    return whole, change, low - DENSITIES[0] * slope, slope


def sparse_step(model, block, density, x, generator):
    """step_of a block with random masks of a density."""
    mask = {f"{name}.weight": torch.rand(module.weight.shape, generator=generator) < density
            for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    parts = SparseNetwork(model, mask).parts_of(block)

    def run(data):
        y = x._replace(data=data)
        for part in parts:
            y = part(y)
        return y.data

    names = block.modules()
    return step_of(run, x.data, [p for name in names for p in model.get_submodule(name).parameters()])


def step_of(run, x, parameters):
    """A function that computes run(x) and its gradients, warmed up by one pass forward."""
    inputs = [*parameters, *([x] if x.requires_grad else [])]
    gradient = torch.ones_like(run(x))

    def step():
        y = run(x)
        if inputs:
            torch.autograd.grad(y, inputs, gradient, allow_unused=True)

    return step


def fastest(steps):
    """The least seconds of each step, taken in turns."""
    turns, end = [], time.thread_time() + SECONDS
    while len(turns) < TURNS or time.thread_time() < end:
        turns.append([seconds_of(step) for step in steps])
    return [min(seconds) for seconds in zip(*turns)]


def seconds_of(step):
    began = time.thread_time()
    step()
    return time.thread_time() - began


def image_side(model):
    """Pixels of the images that a network was built for; of a ResNet, whose weights do not tell, 28, 32 or 96."""
    if hasattr(model, "pool1") and not isinstance(model, ConvNet3):
        return 96
    width, padding = model.conv1.out_channels, model.conv1.padding[0]
    last = round((model.linear.in_features / width) ** .5) if isinstance(model, ConvNet3) else 4
    return 8 * last - 2 * (padding - 1)
