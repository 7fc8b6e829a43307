"""Eleven points on the line between two trained networks: stability.py's evaluation against the released code's loop.

    python tests/bench_stability.py [--images 1000]

The released loop makes a fresh network and a deep copy of the interpolated state for each alpha, leaves autograd on and
passes once over the data for each alpha, in batches of 64 in eval mode; here it also gets its batches already in
memory. Both evaluate the same end points on the same images in one run, taking turns; the fastest of --repeats counts.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def released_loop(config, a, b, coefficients, split, batch_size=64):
    """One fresh network, deep copy and pass over the data per alpha, autograd on; losses and accuracies."""
    scores = []
    for one, other in coefficients:
        model = common.build_network(config)
        state = copy.deepcopy(a)
        for name in state:
            if state[name].is_floating_point():
                state[name] = one * a[name] + other * b[name]
        model.load_state_dict(state)
        model.eval()
        loss, correct = 0., 0
        for start in range(0, len(split), batch_size):
            images, labels = split.batch(slice(start, start + batch_size))
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
        scores.append((loss / len(split), correct / len(split)))
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet3")
    parser.add_argument("--width", type=int)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--sparsity", type=float, default=0., help="fraction of weights set to 0 at random (0)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config = dict(model=args.model, width=args.width, norm=None, channels=3, image_size=32, num_classes=10)
    generator = common.random_stream(0)
    a, b = (common.build_network(config, seed).state_dict() for seed in (1, 2))
    model = common.build_network(config)
    mask = {name: torch.rand(w.shape, generator=generator) >= args.sparsity for name, w in common.prunable(model).items()}
    a, b = (common.combine([state], [1.], mask) for state in (a, b))
    images = torch.randint(0, 256, (args.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = common.Split(images, torch.randint(0, 10, (args.images,), generator=generator), *common.CIFAR)
    coefficients = [(1 - alpha, alpha) for alpha in np.linspace(0, 1, 11).tolist()]
    runs = {"released loop": lambda: released_loop(config, a, b, coefficients, split),
            "common.evaluate_points": lambda: [row[0][:2] for row in common.evaluate_points(
                model, [a, b], coefficients, [split], mask)]}
    results, seconds = {}, {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    theirs, ours = (np.array(result) for result in results.values())
    assert np.allclose(theirs, ours, rtol=1e-4, atol=1e-3), abs(theirs - ours).max()
    print(f"{args.model}, 11 alphas, {args.images} images, sparsity {args.sparsity:.0%}, {torch.get_num_threads()} threads, "
          f"compiled ops: {'yes' if common.compiled_ops() else 'no'}")
    slowest = min(seconds["released loop"])
    for name, times in seconds.items():
        print(f"{name:<24} {min(times):8.2f} s {11 * args.images / min(times):10.0f} images/s {slowest / min(times):6.2f}x")


if __name__ == "__main__":
    common.run(main)
