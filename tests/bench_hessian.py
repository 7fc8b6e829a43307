"""The exact Hessian diagonal against one backward pass a weight, the released code's way, side by side in one run.

    python tests/bench_hessian.py                                    convnet3 of width 128, batch 64
    python tests/bench_hessian.py --model resnet18
    python tests/bench_hessian.py --width 32

Prints seconds and peak memory of the whole diagonal, the seconds of --rows rows of the loop, extrapolated to all
weights, and the ratio; the rows are also compared with the diagonal's entries. Random images: time does not depend on them.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import hessian


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet3", choices=("convnet3", "resnet18"))
    parser.add_argument("--width", type=int, help="(128, resnet18: 32)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=200, help="weights that get a backward pass each (200)")
    args = parser.parse_args()
    common.keep_freed_memory()
    config = dict(model=args.model, width=args.width, norm=None, channels=3, image_size=32, num_classes=10)
    model = common.build_network(config).eval()
    images, labels = torch.randn(args.batch, 3, 32, 32), torch.arange(args.batch) % 10

    start = time.perf_counter()
    _, diagonal, method = hessian.exact_diagonal(model, images, labels, {})
    exact = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    diagonal = torch.cat([h.flatten() for h in diagonal.values()])
    print(f"{args.model} of width {args.width or 'default'}, batch {args.batch}, {torch.get_num_threads()} threads: {method}")
    print(f"all {len(diagonal):,} entries     {exact:10.1f} s     peak memory {memory:.2f} GiB")

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    chosen = torch.randperm(len(diagonal))[:args.rows].tolist()
    start = time.perf_counter()
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(gradient[i], parameters, retain_graph=True)])[i] for i in chosen]
    seconds = time.perf_counter() - start
    loop = seconds / args.rows * len(diagonal)
    error = (torch.stack(rows) - diagonal[chosen]).abs().max() / diagonal.abs().max()
    print(f"{args.rows} rows of the loop    {seconds:10.1f} s     all of them: {loop / 3600:.1f} h, {loop / exact:.0f} x")
    print(f"largest difference in these rows: {error:.1e} of the largest entry")


if __name__ == "__main__":
    main()
