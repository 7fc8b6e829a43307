"""One round of Distilled Pruning against the same round written as the paper's released code is.

    python bench/bench_prune.py [--width 32] [--epochs 20] [--repeats 3]

Their way: a DataLoader with per-sample transforms, torch.nn.utils.prune hooks that multiply weight and mask at every
forward pass, torch.optim.SGD. Both train convnet3 on the same 400 images (10 a class, four tiles each) for the same
steps, and prune 20%. Every run is a process of its own; prints seconds of the round (medians, runs taken in turn),
peak memory of the process, and the ratios.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import timing  # noqa: E402
from machine import describe  # noqa: E402


def ours(network, split, epochs, device):
    from common.masks import dense_mask, magnitude_mask
    from common.networks import prunable
    from common.streams import random_stream
    from common.training import Recipe, train

    mask = dense_mask(network)
    train(network, split, Recipe(epochs), random_stream(0), mask)
    return magnitude_mask(prunable(network), mask, .2)


def theirs(network, split, epochs, device):
    import torch
    import torch.nn.functional as F
    from torch.nn.utils import prune
    from torchvision import transforms

    class Samples(torch.utils.data.Dataset):
        augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                      transforms.ColorJitter(.5, .5, .5),
                                      transforms.Normalize((.49, .48, .45), (.2, .2, .2))])

        def __len__(self):
            return len(split)

        def __getitem__(self, i):
            return self.augment(split.images[i]), split.labels[i]

    layers = [(m, "weight") for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer, name in layers:
        prune.identity(layer, name)
    optimizer = torch.optim.SGD(network.parameters(), .01, .9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=64, shuffle=True)
    network.train()
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    prune.global_unstructured(layers, prune.L1Unstructured, amount=.2)


def round_of(way, width, epochs, device):
    """Print seconds of one round, peak memory in MiB, and on a GPU the floor."""
    from common import captured
    from common.cli import keep_freed_memory
    from common.data import DATASETS
    from common.distilled import embedded_distilled, load_distilled
    from common.networks import build_network

    if way == "ours":
        keep_freed_memory()
    split = load_distilled(embedded_distilled("cifar10", 10), DATASETS["cifar10"], 10,
                           device=device if way == "ours" else "cpu")

    def one_round(epochs):
        network = build_network(dict(model="convnet3", channels=3, image_size=32, num_classes=10, width=width))
        {"ours": ours, "theirs": theirs}[way](network.to(device), split, epochs, device)

    one_round(1)  # warm-up, compiles on first use
    took = timing.seconds(lambda: one_round(epochs), device)
    memory = timing.peak_memory(device)
    captured.GRAPHS.clear()  # a replay cannot be counted
    print(json.dumps([took, memory, timing.floor(lambda: one_round(epochs), took, device)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--way", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return round_of(args.way, args.width, args.epochs, timing.choose(args.device))
    measured, floors = {"theirs": [], "ours": []}, {}
    for _ in range(args.repeats):
        for way in measured:
            command = [sys.executable, __file__, "--way", way, "--width", str(args.width), "--epochs", str(args.epochs),
                       "--device", args.device]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            *numbers, floors[way] = json.loads(output.splitlines()[-1])  # behind what the loader says
            measured[way].append(numbers)
    print(describe(same_malloc=False))
    print(f"convnet3 width {args.width}, {args.epochs} epochs of 400 images, medians of {args.repeats}")
    medians = {way: [statistics.median(column) for column in zip(*runs)] for way, runs in measured.items()}
    for way, (seconds, memory) in medians.items():
        print(f"{way:>7}: {seconds:7.2f} s  {memory:7.0f} MiB{floors[way]}")
    (slow, much), (fast, little) = medians["theirs"], medians["ours"]
    print(f"  ratio: {slow / fast:7.2f} x  {little / much:7.2f} of their memory")


if __name__ == "__main__":
    main()
