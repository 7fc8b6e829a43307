"""Training steps of several networks together, as on a GPU: python bench/bench_together.py [--device cuda] [--width 32]

Microseconds of a step and network, medians of --repeats, for epochs of 100 steps, of 100 without augmentation, which
need no draws, and of the 2 that a distilled set of 10 images a class has; on a GPU with the floor behind the last. On a
CPU a graph that does nothing stands in for CUDA's: what is left is the host's part.
"""
import argparse
import contextlib
import io
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import timing  # noqa: E402
from common import captured, together  # noqa: E402
from common.augment import Draws  # noqa: E402
from common.data import Split  # noqa: E402
from common.networks import build_network  # noqa: E402
from common.streams import random_stream  # noqa: E402
from common.training import Recipe, make_step, train_with_bar  # noqa: E402
from machine import describe  # noqa: E402

COUNTS = (1, 2, 4, 8)
CASES = {"100 steps an epoch": (6400, {}), "without draws": (6400, dict(augment="none", cutmix=0.)),
         "2 steps an epoch": (128, {})}  # images, settings of the recipe


class Nothing:
    """For captured.CudaGraph: nothing is done."""

    def __init__(self, function):
        self.results = torch.zeros(()), torch.zeros((), dtype=torch.long)

    def __call__(self):
        return self.results


def train_all(count, split, config, recipe):
    """Train `count` networks together, which say nothing."""
    def train_one(seed):
        model = build_network(config, seed).to(split.labels.device)
        train_with_bar(f"seed {seed}", model, split, recipe, random_stream(seed))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        together.each(train_one, range(count), split.labels.device, "networks")


def seconds_of_a_step(count, split, config, settings):
    """Of each network: the difference of 1,200 and 400 steps, in which captures cancel."""
    epoch, device = len(split) // 64, split.labels.device
    short, long = (timing.seconds(lambda: train_all(count, split, config, Recipe(steps // epoch, **settings)), device)
                   for steps in (400, 1200))
    return (long - short) / 800 / count


def plain_step(split, config):
    """A function that makes a step without augmentation, to be counted."""
    model = build_network(config).to(split.labels.device)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    step = make_step(model, split, None, momenta, Recipe(1, augment="none", cutmix=0.))
    index = torch.arange(64, device=split.labels.device)
    return lambda: step(Draws(index, torch.tensor(.01, device=index.device)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--width", type=int, default=32, help="(32)")
    parser.add_argument("--repeats", type=int, default=3, help="(3)")
    args = parser.parse_args()
    device = timing.choose(args.device)
    if device.type == "cpu":
        captured.GRAPHS["cpu"] = Nothing
    size = 32 if device.type == "cuda" else 8  # nothing is done to the images
    config = dict(model="convnet3", width=args.width, channels=3, image_size=size, num_classes=10)
    print(describe(same_malloc=False))
    print(f"{'networks':<20}" + "".join(f"{count:>8}" for count in COUNTS))
    for name, (images, settings) in CASES.items():
        split = Split(torch.randn(images, 3, size, size, device=device), torch.randint(10, (images,), device=device))
        took = {count: [] for count in COUNTS}
        for _ in range(args.repeats):
            for count in COUNTS:
                took[count].append(seconds_of_a_step(count, split, config, settings))
        medians = [statistics.median(values) for values in took.values()]
        floor = timing.floor(plain_step(split, config), medians[-1], device)
        print(f"{name:<20}" + "".join(f"{median * 1e6:>8.0f}" for median in medians) + floor, flush=True)


if __name__ == "__main__":
    main()
