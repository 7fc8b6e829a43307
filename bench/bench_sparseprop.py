"""SparseProp (Nikdan et al., ICML 2023), sparse backpropagation on CPUs, beside our sparse convolution.

    pip install scipy wheel && pip install --no-build-isolation sparseprop
    OMP_NUM_THREADS=1 python bench/bench_sparseprop.py

One 3x3 convolution of a batch of 64, forward and both gradients, random masks. Theirs is the faster of its two ways;
ours on activations that stay in our layout, as between sparse layers, and with the change of layout at both ends, as of
a sparse layer alone between dense ones. The sides take turns and the fastest of --repeats counts; with one thread by
its own clock. Exits with 2 where sparseprop is not there.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.kernels import ops, sparse  # noqa: E402
from bench_sparse import fastest  # noqa: E402
from machine import describe, keep_freed_memory  # noqa: E402

BATCH = 64
SHAPES = ((64, 32), (128, 16), (256, 8), (256, 4))  # channels, side
SPARSITIES = (.8, .9, .95, .98)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    try:
        from sparseprop.modules.conv2d import SparseConv2d
    except ImportError as error:
        print(f"sparseprop is not there ({error}): pip install scipy wheel, then "
              "pip install --no-build-isolation sparseprop", file=sys.stderr)
        sys.exit(2)
    keep_freed_memory()
    ops.load()
    print(describe(same_malloc=True))
    print(f"{'channels, pixels, sparsity':<28}{'theirs':>10}{'ours':>10}{'':>8}{'both ends':>12}")
    for channels, side in SHAPES:
        for sparsity in SPARSITIES:
            print(row(SparseConv2d, channels, side, sparsity, args.repeats), flush=True)


def row(SparseConv2d, channels, side, sparsity, repeats):
    """A line of the table: milliseconds, and how many times as long as ours theirs takes."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    mask = torch.rand(conv.weight.shape, generator=generator) >= sparsity
    conv.weight.data *= mask
    images = torch.randn(BATCH, channels, side, side, generator=generator)
    theirs = [their_step(SparseConv2d.from_dense(conv, over_pixels), images) for over_pixels in (False, True)]
    *two_ways, inside, alone = fastest([*theirs, our_step(conv, mask, images), our_lone_step(conv, mask, images)],
                                       repeats)
    best = min(two_ways)
    shape = f"{channels:>4} {side:>3}x{side:<3} {sparsity:>6.0%}"
    return f"{shape:<28}{best:>10.2f}{inside:>10.2f}{best / inside:>7.2f}x{alone:>9.2f}{best / alone:>7.2f}x"


def their_step(layer, images):
    images = images.clone().requires_grad_()
    inputs, gradient = [images, layer.W_val], torch.ones_like(layer(images))
    return lambda: torch.autograd.grad(layer(images), inputs, gradient)


def our_step(conv, mask, images):
    """On activations in our layout, before and after."""
    x = sparse.blocked(images, sparse.HALO)
    x = x._replace(data=x.data.requires_grad_())
    stage = plain_stage(conv, mask)
    inputs, gradient = [x.data, conv.weight], torch.ones_like(stage(x).data)
    return lambda: torch.autograd.grad(stage(x).data, inputs, gradient)


def our_lone_step(conv, mask, images):
    """Between dense layers, whose activations are channels last."""
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    stage = plain_stage(conv, mask)

    def forward():
        return sparse.unblocked(stage(images))

    inputs, gradient = [images, conv.weight], torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def plain_stage(conv, mask):
    return sparse.Stage(conv, nn.Identity(), mask, {}, relu=False)


if __name__ == "__main__":
    main()
