"""The exact Hessian diagonal against one backward pass a weight, the released code's way, side by side in one run.

    python bench/bench_hessian.py                                    convnet3 of width 128, batch 64
    python bench/bench_hessian.py --model resnet18
    python bench/bench_hessian.py --width 32

Prints seconds and peak memory of the whole diagonal, the seconds of --rows rows of the loop, extrapolated to all
weights, and the ratio, in CPU time too, which counts on a busy machine; the rows are compared with the diagonal's
entries. Random images: the time does not depend on them.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hessian  # noqa: E402
import timing  # noqa: E402
from common.networks import build_network  # noqa: E402
from machine import describe, keep_freed_memory  # noqa: E402


def clocked(function, device):
    """Seconds of function() and of CPU time in all threads."""
    start = time.process_time()
    seconds = timing.seconds(function, device)
    return np.array([seconds, time.process_time() - start])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet3", choices=("convnet3", "resnet18"))
    parser.add_argument("--width", type=int, help="(128, resnet18: 32)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=200, help="weights that get a backward pass each (200)")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    args = parser.parse_args()
    device = timing.choose(args.device)
    keep_freed_memory()
    print(describe(same_malloc=True))
    config = dict(model=args.model, width=args.width, norm=None, channels=3, image_size=32, num_classes=10)
    model = build_network(config).eval().to(device)
    images = torch.randn(args.batch, 3, 32, 32, device=device)
    labels = torch.arange(args.batch, device=device) % 10
    results = []

    def whole_diagonal():
        results[:] = hessian.exact_diagonal(model, images, labels, {})

    exact = clocked(whole_diagonal, device)
    _, diagonal, method = results
    diagonal = torch.cat([h.flatten() for h in diagonal.values()])
    print(f"{args.model} of width {args.width or 'default'}, batch {args.batch}, {torch.get_num_threads()} threads: "
          f"{method}")
    print(f"all {len(diagonal):,} entries: {exact[0]:.1f} s, {exact[1]:.1f} s of CPU time, "
          f"peak memory {timing.peak_memory(device) / 1024:.2f} GiB{timing.floor(whole_diagonal, exact[0], device)}")

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    chosen = torch.randperm(len(diagonal))[:args.rows].tolist()
    rows = []

    def some_rows():
        for i in chosen:
            row = torch.autograd.grad(gradient[i], parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in row])[i])

    loop = clocked(some_rows, device)
    whole = loop / args.rows * len(diagonal)
    error = (torch.stack(rows) - diagonal[chosen]).abs().max() / diagonal.abs().max()
    print(f"{args.rows} rows of the loop: {loop[0]:.1f} s, {loop[1]:.1f} s of CPU time; "
          f"all rows: {whole[0] / 3600:.1f} h, {whole[1] / 3600:.1f} h of CPU time")
    print(f"ratio: {whole[0] / exact[0]:.0f} x, in CPU time {whole[1] / exact[1]:.0f} x")
    print(f"largest difference in these rows: {error:.1e} of the largest entry")


if __name__ == "__main__":
    main()
