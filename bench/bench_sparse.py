"""Sparse against dense masked training on the CPU: one convolution, whole steps, points of weight space.

    OMP_NUM_THREADS=2 python bench/bench_sparse.py [--data-dir data] [--only conv convnet3 resnet18 points auto]

Dense is eager PyTorch in the better of its two memory layouts, with freed memory kept in the process for both sides.
Masks are global magnitude masks of networks trained for --steps steps, so that layers differ in density. The two sides
take turns in one run and the fastest of --repeats counts. "fused" is the project's own dense path (`--sparse off`).
"auto" holds `--sparse auto` against `--sparse off` where the choice is close: medians of the ratios of neighbouring
steps; between equal code they are 0.97 to 1.02.
With one thread, thread CPU time is measured, which other work on the machine disturbs less.
"""
import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import Split, load_real  # noqa: E402
from common.evaluation import combine, evaluate_points  # noqa: E402
from common.kernels import ops, sparse, views  # noqa: E402
from common.networks import blocks_of, build_network, prunable  # noqa: E402
from common.streams import random_stream  # noqa: E402
from common.training import Recipe, train  # noqa: E402
from machine import describe, keep_freed_memory  # noqa: E402

SPARSITIES = (.5, .8, .9, .95, .98, .996)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BATCH = 64


def fastest(functions, repeats):
    """The least time in ms of each function, taking turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(functions)
    for turn in range(repeats + 1):  # the first turn warms up
        for i, function in enumerate(functions):
            start = clock()
            function()
            best[i] = min(best[i], clock() - start) if turn else best[i]
    return [1e3 * seconds for seconds in best]


def median_ratio(one, other, turns):
    """How many times as long as one() other() takes: median over pairs, whose order alternates."""
    ratios = []
    for turn in range(turns + 1):
        seconds = {}
        for function in (one, other) if turn % 2 else (other, one):
            start = time.perf_counter()
            function()
            seconds[function] = time.perf_counter() - start
        ratios.append(seconds[other] / seconds[one])
    return statistics.median(ratios[1:])


def report(name, sparsity, dense, mine, fused=None):
    also = f"   fused {fused:7.1f} ms {fused / mine:6.2f}x" if fused else ""
    print(f"{name:22} {sparsity:6.1%}   dense {dense:7.1f} ms   sparse {mine:7.1f} ms {dense / mine:6.2f}x{also}",
          flush=True)


def bench_convolution(args):
    """128 -> 128, 3x3, 16 x 16: forward and both gradients, activations already in each side's layout."""
    for sparsity in SPARSITIES:
        mask = torch.rand(128, 128, 3, 3) >= sparsity
        x, weight, dy = torch.randn(BATCH, 128, 16, 16), torch.randn(mask.shape) * mask, torch.randn(BATCH, 128, 16, 16)
        plan = torch.classes.lottery.SparseConv(mask, 16, 16, 1, 1, 1)
        blocks, gradient = sparse.blocked(x, 1), sparse.blocked(dy, 1).data
        blocks = blocks._replace(data=blocks.data.requires_grad_())
        mine = weight.clone().requires_grad_()

        def on_blocks():
            torch.autograd.grad(sparse.sparse_conv(plan, blocks, mine)[0].data, [blocks.data, mine], gradient)

        def dense(layout):
            tensors = [t.contiguous(memory_format=layout) for t in (x, weight, dy)]
            inputs = [t.requires_grad_() for t in tensors[:2]]
            return lambda: torch.autograd.grad(F.conv2d(*inputs, padding=1), inputs, tensors[2])

        *dense, mine = fastest([*map(dense, LAYOUTS), on_blocks], args.repeats)
        report("conv 128-128 16x16", sparsity, min(dense), mine)


def trained(args, name):
    """A network trained for a few steps, and its config."""
    config = dict(model=name, dataset="cifar10", width=128 if name == "convnet3" else None, norm=None,
                  channels=3, image_size=32, num_classes=10, train_images=BATCH * args.steps)
    real, _ = load_real(config, args.data_dir)
    model = build_network(config)
    train(model, real, Recipe(1), random_stream(0))
    return model, config


def pruned(model, config, sparsity):
    """A copy of `model` pruned globally by magnitude, and the mask."""
    size = torch.cat([weight.abs().flatten() for weight in prunable(model).values()])
    threshold = size.sort().values[int(sparsity * len(size))]
    mask = {name: weight.abs() >= threshold for name, weight in prunable(model).items()}
    copy = build_network(config)
    copy.load_state_dict(combine([model.state_dict()], [1.], mask))
    return copy.train(), mask


def training_step(model, mask, network, images, labels, step_):
    names, params = zip(*model.named_parameters())
    momenta, masks = [torch.zeros_like(p) for p in params], [mask.get(name) for name in names]

    def step():
        loss = F.cross_entropy(network(images), labels)
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        step_(params, grads, momenta, masks, 1e-4, .9, 5e-4)

    return step


def fused_step(source, config, sparsity, choice, images, labels):
    """A training step of the pruned network as the scripts do it with --sparse `choice`."""
    model, mask = pruned(source, config, sparsity)
    views.skip_zeros.set(choice)
    return training_step(model, mask, views.view(model, mask), images, labels, ops.masked_sgd_)


def bench_step(args, name):
    """Forward, loss, backward, masked SGD on a batch of 64."""
    source, config = trained(args, name)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    for sparsity in SPARSITIES:
        steps = []
        for layout in LAYOUTS:
            model, mask = pruned(source, config, sparsity)
            steps.append(training_step(model.to(memory_format=layout), mask, model, images.to(memory_format=layout),
                                       labels, ops.masked_sgd_reference))
        steps += [fused_step(source, config, sparsity, choice, images, labels) for choice in ("auto", "off")]
        *dense, mine, fused = fastest(steps, args.repeats)
        report(f"step {name}", sparsity, min(dense), mine, fused)


def first_sparse(model, mask):
    """The block from which on --sparse auto is sparse; None where it is dense throughout."""
    views.skip_zeros.set("auto")
    return views.dense_blocks(model, mask)


def bench_auto(args):
    """Steps with --sparse auto against off, from sparsities where auto is dense to those where it is not."""
    for name, turns in (("convnet3", 60), ("resnet18", 24)):
        source, config = trained(args, name)
        images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
        for sparsity in (.2, .5, .6, .65, .7, .75, .8, .85, .9):
            steps = [fused_step(source, config, sparsity, choice, images, labels) for choice in ("auto", "off")]
            begins = first_sparse(*pruned(source, config, sparsity))
            way = "dense" if begins is None else f"sparse from block {begins} of {len(blocks_of(source))}"
            print(f"auto {name:17} {sparsity:6.1%}   {median_ratio(*steps, turns):.3f}x   {way}", flush=True)


def bench_points(args):
    """11 points on a line between two networks that share a mask, convnet3 width 128, evaluated on --images images."""
    source, config = trained(args, "convnet3")
    split = Split(torch.randn(args.images, 3, 32, 32), torch.randint(0, 10, (args.images,)))
    coefficients = [(1 - k / 10, k / 10) for k in range(11)]
    for sparsity in SPARSITIES:
        model, mask = pruned(source, config, sparsity)
        a = {name: value.clone() for name, value in model.state_dict().items()}
        b = {name: .9 * value for name, value in a.items()}

        @torch.no_grad()
        def eager(layout):
            model.to(memory_format=layout).eval()
            for weights in coefficients:
                model.load_state_dict(combine([a, b], weights, mask))
                for images in split.images.split(BATCH):
                    F.cross_entropy(model(images.to(memory_format=layout)), split.labels[:len(images)])

        def points(choice):
            views.skip_zeros.set(choice)
            evaluate_points(model, [a, b], coefficients, [split], mask)

        ways = [functools.partial(eager, layout) for layout in LAYOUTS]
        ways += [functools.partial(points, choice) for choice in ("auto", "off")]
        *dense, mine, fused = fastest(ways, max(1, args.repeats // 2))
        report("11 points convnet3", sparsity, min(dense), mine, fused)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="where cifar10/{train,test}.npz are")
    parser.add_argument("--steps", type=int, default=30, help="training steps before pruning")
    parser.add_argument("--images", type=int, default=256, help="images that the points are evaluated on")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=("conv", "convnet3", "resnet18", "points", "auto"),
                        default=("conv", "convnet3", "resnet18", "points", "auto"))
    args = parser.parse_args()
    keep_freed_memory()
    print(describe(same_malloc=True))
    ops.load()
    torch.manual_seed(0)
    benches = dict(conv=bench_convolution, convnet3=lambda a: bench_step(a, "convnet3"),
                   resnet18=lambda a: bench_step(a, "resnet18"), points=bench_points, auto=bench_auto)
    for name in args.only:
        benches[name](args)


if __name__ == "__main__":
    main()
