"""The compiled ops against PyTorch, side by side in one run: python bench/bench_ops.py [--device cuda] [--images 200]

Medians of interleaved repetitions; a ratio above 1 means the ops are faster. On a CPU eager PyTorch is measured twice:
as it is, and with cli.keep_freed_memory(), which the scripts switch on for everything and which helps it most.
On a GPU the floor stands beside each number (timing.py), the step is a CUDA graph as in training, and the memory-bound
kernels are timed too.
"""
import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import timing  # noqa: E402
from common import captured  # noqa: E402
from common.data import Split  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.evaluation import combine, evaluate_points  # noqa: E402
from common.kernels import ops  # noqa: E402
from common.kernels.views import view  # noqa: E402
from common.networks import build_network, prunable  # noqa: E402
from machine import describe, keep_freed_memory  # noqa: E402

CONVNET3 = dict(model="convnet3", channels=3, image_size=32, num_classes=10, width=128)
RESNET18 = dict(model="resnet18", channels=3, image_size=32, num_classes=10)


def medians(functions, repetitions, device):
    """Median seconds of each function {name: function}, in turns; the first turn warms up."""
    times = {name: [] for name in functions}
    for _ in range(repetitions + 1):
        for name, function in functions.items():
            times[name].append(timing.seconds(function, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def row(what, ours, other, target=None, floor=""):
    wanted = f"wanted {target}" if target else ""
    print(f"{what:<66} {ours * 1e3:9.2f} ms {other * 1e3:9.2f} ms  x {other / ours:5.2f}  {wanted}{floor}", flush=True)


def random_mask(model, kept=.5):
    return {name: torch.rand_like(w) < kept for name, w in prunable(model).items()}


#############################################
#                 Optimizer                 #
#############################################


def bench_sgd(device):
    model = build_network(RESNET18).to(device)
    mask = random_mask(model)
    names, params = zip(*model.named_parameters())
    masks = [mask.get(name) for name in names]
    grads, momenta = [torch.randn_like(p) for p in params], [torch.zeros_like(p) for p in params]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, grad in zip(theirs, grads):
        p.grad = grad
    optimizer = torch.optim.SGD(theirs, lr=.01, momentum=.9, weight_decay=5e-4, fused=True)
    masked = [p for p, m in zip(theirs, masks) if m is not None]
    float_masks = [m.float() for m in masks if m is not None]

    @torch.no_grad()
    def torch_step():
        optimizer.step()
        torch._foreach_mul_(masked, float_masks)

    def ours():
        ops.masked_sgd_(params, grads, momenta, masks, .01, .9, 5e-4)

    with torch.no_grad():
        time = medians({"ours": ours, "torch": torch_step}, 50, device)
    floor = timing.floor(ours, time["ours"], device)
    row("masked_sgd_, ResNet-18 | SGD(fused=True) and _foreach_mul_", time["ours"], time["torch"], 1.3, floor)

    size = 30_000_000  # out of any cache
    p, g, m = (torch.randn(size, device=device) for _ in range(3))
    keep, copied = torch.rand(size, device=device) < .5, torch.empty(size, device=device)
    time = medians({"ours": lambda: ops.masked_sgd_([p], [g], [m], [keep], .01, .9, 5e-4),
                    "copy": lambda: copied.copy_(p)}, 10, device)
    ours, copy_ = 21 * size / time["ours"] / 1e9, 8 * size / time["copy"] / 1e9
    print(f"masked_sgd_ out of cache {ours:.1f} GB/s, a copy {copy_:.1f} GB/s: x {ours / copy_:.2f}  wanted 0.8")


#############################################
#          Points of weight space           #
#############################################


def eager_point(model, state, images, labels):
    model.load_state_dict(state)
    for start in range(0, len(labels), 500):
        logits = model(images[start:start + 500])
        F.cross_entropy(logits, labels[start:start + 500], reduction="sum").item()
        (logits.argmax(1) == labels[start:start + 500]).sum().item()


def bench_points(device, config, name, targets, count, repetitions=2):
    states = [build_network(config, seed).to(device).state_dict() for seed in (0, 1)]
    line = [(1 - a / 10, a / 10) for a in range(11)]
    split = Split(torch.randn(count, 3, 32, 32, device=device), torch.randint(10, (count,), device=device))
    model = build_network(config).to(device).eval()

    def eager(layout):
        network = copy.deepcopy(model).to(memory_format=layout)
        images = split.images.contiguous(memory_format=layout)

        @torch.no_grad()
        def evaluate():
            for weights in line:
                eager_point(network, combine(states, weights), images, split.labels)

        return evaluate

    def released():
        for weights in line:
            eager_point(copy.deepcopy(model), combine(states, weights), split.images, split.labels)

    def ours():
        evaluate_points(model, states, line, [split])

    time = medians({"ours": ours, "nchw": eager(torch.contiguous_format),
                    "nhwc": eager(torch.channels_last), "released": released}, repetitions, device)
    eager_time = min(time["nchw"], time["nhwc"])
    row(f"11 points of {name} | eager, eval mode, no_grad, better layout", time["ours"], eager_time, targets[0],
        timing.floor(ours, time["ours"], device))
    row(f"11 points of {name} | a deep copy per point, autograd on", time["ours"], time["released"], targets[1])


#############################################
#               Training step               #
#############################################


def bench_step(device, config, name, target, repetitions=9):
    base = build_network(config).to(device)
    mask = random_mask(base, 1.)
    images, labels = torch.randn(64, 3, 32, 32, device=device), torch.randint(10, (64,), device=device)

    def ours():
        model = copy.deepcopy(base)
        network, (names, params) = view(model), zip(*model.named_parameters())
        momenta, masks = [torch.zeros_like(p) for p in params], [mask.get(n) for n in names]
        lr = torch.tensor(.01, device=device)

        def step():
            loss = F.cross_entropy(network(images), labels)
            grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            ops.masked_sgd_(params, grads, momenta, masks, lr, .9, 5e-4)
            return loss.detach()

        return step

    def eager(layout):
        model, pixels = copy.deepcopy(base).to(memory_format=layout), images.contiguous(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9, weight_decay=5e-4, fused=True)
        pairs = [(p, mask[n].float()) for n, p in model.named_parameters() if n in mask]
        params, masks = zip(*pairs)

        def step():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels), labels)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_mul_(params, masks)
            return loss.detach()

        return step

    time = medians({"ours": as_trained(ours(), device), "nchw": eager(torch.contiguous_format),
                    "nhwc": eager(torch.channels_last)}, repetitions, device)
    eager_time = min(time["nchw"], time["nhwc"])
    row(f"training step of {name}, batch 64 | eager, better layout", time["ours"], eager_time, target,
        timing.floor(ours(), time["ours"], device))
    return ours(), eager(torch.contiguous_format)


def as_trained(step, device):
    """The step as training makes it: on a GPU it is replayed as a CUDA graph."""
    if device.type == "cpu":
        return step
    captured.warm_up_cuda(lambda _: step(), None)
    return captured.CudaGraph(step)


def bench_curve(ours, eager, steps=50):
    differences = []
    for _ in range(steps):
        mine, theirs = ours().item(), eager().item()
        differences.append(abs(mine - theirs) / theirs)
    print(f"loss curve over {steps} steps: largest relative difference {max(differences):.1e}, "
          f"the last loss {mine:.5f} | {theirs:.5f}")


def bench_bandwidth(device):
    """The memory-bound kernels on a GPU, against the floor, at which a copy moves their bytes."""
    x = torch.randn(512, 128, 32, 32, device=device)
    weight, bias, y = torch.ones(128, device=device), torch.zeros(128, device=device), torch.empty_like(x)
    pooled, mean, rstd = torch.ops.lottery.norm_relu_pool(x, weight, bias, 1e-5)
    last, pooled_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, pooled))
    states, coefficients = torch.randn(2, 1 << 22, device=device), torch.randn(16, 2, device=device)
    points = torch.empty(16, 1 << 22, device=device)
    images, colour, transform = torch.randn(512, 3, 32, 32, device=device), torch.rand(512, 3), torch.rand(512, 6)
    drawn = images, colour.to(device), transform.to(device)
    logits, labels = torch.randn(4, 10_000, 10, device=device), torch.randint(10, (10_000,), device=device)
    cases = {
        "copy": lambda: y.copy_(x),
        "norm_relu_pool": lambda: torch.ops.lottery.norm_relu_pool(x, weight, bias, 1e-5),
        "norm_relu_pool_backward": lambda: torch.ops.lottery.norm_relu_pool_backward(
            pooled, x, weight, bias, mean, rstd),
        "norm_relu_pool, NHWC": lambda: torch.ops.lottery.norm_relu_pool(last, weight, bias, 1e-5),
        "norm_relu_pool_backward, NHWC": lambda: torch.ops.lottery.norm_relu_pool_backward(
            pooled_last, last, weight, bias, mean, rstd),
        "bias_relu_": lambda: torch.ops.lottery.bias_relu_(y, bias, x),
        "combine_": lambda: torch.ops.lottery.combine_(points, states, coefficients, None),
        "dsa": lambda: torch.ops.lottery.dsa(*drawn),
        "cross_entropy_top1": lambda: torch.ops.lottery.cross_entropy_top1(logits, labels),
    }
    for name, took in medians(cases, 20, device).items():
        print(f"{name:<30} {took * 1e3:9.3f} ms{timing.floor(cases[name], took, device)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2000, help="evaluated at each of 11 points (2000: minutes)")
    args = parser.parse_args()
    device = timing.choose(args.device)
    torch.manual_seed(0)
    if not ops.load():
        raise UserError("the extension is not built: python setup.py build_ext --inplace")
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{describe(same_malloc=False)}; {name}\n{'':<66} {'ops':>12} {'PyTorch':>12}")
    bench_sgd(device)
    for kept in (False, True) if device.type == "cpu" else (False,):
        if kept:
            keep_freed_memory()
            print(describe(same_malloc=True))
        bench_points(device, CONVNET3, "convnet3 width 128", (2, 3), args.images)
        steps = bench_step(device, CONVNET3, "convnet3 width 128", 1.5)
        bench_step(device, RESNET18, "ResNet-18", None, repetitions=5)
    bench_points(device, RESNET18, "ResNet-18", (None, None), args.images)
    bench_curve(*steps)
    if device.type == "cuda":
        bench_bandwidth(device)


if __name__ == "__main__":
    main()
