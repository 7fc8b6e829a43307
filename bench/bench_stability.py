"""Eleven points on the line between two networks: stability.py's evaluation against the released code's loop.

    python bench/bench_stability.py --images 1000

The released loop builds a fresh network and deep-copies a state for each alpha, leaves autograd on and passes over the
data once per alpha, in eval mode and batches of 64; to its favour the images are in memory here. All ways evaluate the
same points on the same images in one run; the fastest of --repeats counts. The second line is the released loop with
cli.run's setting of the memory allocator, which the third has too.
"""
import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import timing  # noqa: E402
from common.data import CIFAR, Split  # noqa: E402
from common.evaluation import combine, evaluate_points  # noqa: E402
from common.kernels import ops  # noqa: E402
from common.networks import build_network, prunable  # noqa: E402
from common.streams import random_stream  # noqa: E402
from machine import describe, keep_freed_memory  # noqa: E402


def released_loop(config, states, coefficients, split, batch_size=64):
    """A fresh network, a deep copy and a pass over the data for each point, autograd on: [(loss, accuracy)]."""
    scores = []
    for weights in coefficients:
        model, point = build_network(config).to(split.labels.device), copy.deepcopy(states[0])
        for name, value in point.items():
            if value.is_floating_point():
                point[name] = sum(weight * state[name] for weight, state in zip(weights, states))
        model.load_state_dict(point)
        model.eval()
        loss, correct = 0., 0
        for start in range(0, len(split), batch_size):
            images, labels = split.batch(slice(start, start + batch_size))
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
        scores.append((loss / len(split), correct / len(split)))
    return scores


def compare(args, count, coefficients):
    """Time both ways on `count` random networks under one mask, check that they agree and print the ratio."""
    config = dict(model=args.model, width=args.width, norm=None, channels=3, image_size=32, num_classes=10)
    device, generator = timing.choose(args.device), random_stream(0)
    model = build_network(config).to(device)
    mask = {name: (torch.rand(weight.shape, generator=generator) >= args.sparsity).to(device)
            for name, weight in prunable(model).items()}
    states = [combine([build_network(config, seed).to(device).state_dict()], [1.], mask) for seed in range(count)]
    images = torch.randint(0, 256, (args.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (args.images,), generator=generator)
    split = Split(images.to(device), labels.to(device), *CIFAR)
    ways = {"released loop": lambda: released_loop(config, states, coefficients, split),
            "released loop, our malloc": lambda: released_loop(config, states, coefficients, split),
            "evaluate_points": lambda: [
                row[0][:2] for row in evaluate_points(model, states, coefficients, [split], mask)]}
    scores, seconds = {}, {name: [] for name in ways}
    for name, way in ways.items():
        for _ in range(args.repeats):
            seconds[name].append(timing.seconds(lambda: scores.update({name: np.array(way())}), device))
        keep_freed_memory()
    theirs, ours = scores["released loop"], scores["evaluate_points"]
    assert np.allclose(theirs[:, 0], ours[:, 0], rtol=1e-4) and abs(theirs - ours)[:, 1].max() < .01
    print(describe(same_malloc=True))
    print(f"{args.model}, {args.images} images, sparsity {args.sparsity:.0%}, {torch.get_num_threads()} threads, "
          f"{'compiled ops' if ops.load() else 'PyTorch fallback'}")
    for name, times in seconds.items():
        print(f"{name:<26} {min(times):8.2f} s {len(coefficients) / min(times):8.2f} points/s "
              f"{min(seconds['released loop']) / min(times):6.2f}x{timing.floor(ways[name], min(times), device)}")


def parse(doc):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet3", help="(convnet3)")
    parser.add_argument("--width", type=int, help="(the model's)")
    parser.add_argument("--images", type=int, default=1000, help="(1000)")
    parser.add_argument("--sparsity", type=float, default=0., help="fraction of weights set to 0, at random (0)")
    parser.add_argument("--repeats", type=int, default=3, help="(3)")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    return parser.parse_args()


if __name__ == "__main__":
    line = [(1 - alpha, alpha) for alpha in np.linspace(0, 1, 11).tolist()]
    compare(parse(__doc__), 2, line)
