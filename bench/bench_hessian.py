"""The exact Hessian diagonal against one backward pass a weight, the released code's way, side by side in one run.

    python bench/bench_hessian.py                                    convnet3 of width 128, batch 64
    python bench/bench_hessian.py --model resnet18
    python bench/bench_hessian.py --width 32

Prints seconds and peak memory of the whole diagonal, the seconds of --rows rows of the loop, extrapolated to all
weights, and the ratio, in CPU time too, which counts on a busy machine; the rows are compared with the diagonal's
entries. Random images: the time does not depend on them.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hessian  # noqa: E402
from common.networks import build_network  # noqa: E402
from machine import describe, keep_freed_memory  # noqa: E402


def clocks():
    """Wall clock and CPU time of all threads, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet3", choices=("convnet3", "resnet18"))
    parser.add_argument("--width", type=int, help="(128, resnet18: 32)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=200, help="weights that get a backward pass each (200)")
    args = parser.parse_args()
    keep_freed_memory()
    print(describe(same_malloc=True))
    config = dict(model=args.model, width=args.width, norm=None, channels=3, image_size=32, num_classes=10)
    model = build_network(config).eval()
    images, labels = torch.randn(args.batch, 3, 32, 32), torch.arange(args.batch) % 10

    start = clocks()
    _, diagonal, method = hessian.exact_diagonal(model, images, labels, {})
    exact = clocks() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    diagonal = torch.cat([h.flatten() for h in diagonal.values()])
    print(f"{args.model} of width {args.width or 'default'}, batch {args.batch}, {torch.get_num_threads()} threads: "
          f"{method}")
    print(f"all {len(diagonal):,} entries: {exact[0]:.1f} s, {exact[1]:.1f} s of CPU time, "
          f"peak memory {memory:.2f} GiB")

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    chosen = torch.randperm(len(diagonal))[:args.rows].tolist()
    start = clocks()
    rows = []
    for i in chosen:
        row = torch.autograd.grad(gradient[i], parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in row])[i])
    loop = clocks() - start
    whole = loop / args.rows * len(diagonal)
    error = (torch.stack(rows) - diagonal[chosen]).abs().max() / diagonal.abs().max()
    print(f"{args.rows} rows of the loop: {loop[0]:.1f} s, {loop[1]:.1f} s of CPU time; "
          f"all rows: {whole[0] / 3600:.1f} h, {whole[1] / 3600:.1f} h of CPU time")
    print(f"ratio: {whole[0] / exact[0]:.0f} x, in CPU time {whole[1] / exact[1]:.0f} x")
    print(f"largest difference in these rows: {error:.1e} of the largest entry")


if __name__ == "__main__":
    main()
