"""Distil a dataset into a few synthetic images a class, and measure what such a set is worth.

    python distill.py --dataset cifar10 --ipc 10           -> distilled/cifar10_ipc10/{data.pt, sheet.png, config.json}
    python distill.py --evaluate PATH --ipc 10 --repeats 3    accuracy of networks trained from scratch on a set

A stored image holds factor x factor tiles (multi-formation), so --ipc 10 --factor 2 trains on 40 images a class. Every
method starts from real images, chosen, made small and tiled; --method says what then becomes of them:

    select   nothing
    dm       distribution matching (Zhao & Bilen 2023): the mean embeddings of real and synthetic images are made equal,
             in networks drawn at random; the default on a CPU
    idm      the same in networks on their way through training on real data, which must also recognise the synthetic
             images (improved distribution matching, Zhao et al. 2023)
    idc      the gradients of real and synthetic images are made equal, in networks on their way through training
             (Kim et al. 2022), as the paper's data was made; the default with CUDA, days on a CPU

For CIFAR-10 on one core, choosing the images takes 45 s and an iteration of dm half a second at ipc 10.

data.pt, for prune.py --distilled, holds [images in [0, 1], labels]; sheet.png shows the same images, a row a class, and
is read just as well. The same command again goes on where an interrupted run stopped and ends with the same set.
"""
if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while PyTorch is imported

import math
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import cli, curves, files, ranks
from common.augment import draw_dsa, dsa, usual_augmentation
from common.bars import Bar
from common.cli import at_least, positive, within
from common.data import load_real, set_aside
from common.distilled import contact_sheet, decode_tiles, distilled_of, encode_tiles
from common.errors import UserError
from common.evaluation import evaluate
from common.networks import build_network
from common.streams import random_stream
from common.training import Training, recipe_of, train, train_with_bar

SETTINGS = {  # of the methods; idc: Kim et al.'s for CIFAR
    "select": dict(outer=0, inner=1),
    "dm": dict(outer=300, inner=1, synthetic_images=64, image_lr=.3, width=32),
    "idm": dict(outer=20, inner=30, network_images=256, cross_entropy=.1, synthetic_images=64, image_lr=.3, width=32),
    "idc": dict(outer=2000, inner=100, network_images=2000, image_lr=.005, metric="mse"),
}
IDC_IMAGENET = dict(outer=500, inner=100, network_images=500, image_lr=.003, metric="l1", pretrain=10,
                    model="resnet10ap")
DEFAULTS = dict(model="convnet3", width=None, norm="instance", real_images=64, synthetic_images=128, network_images=0,
                pretrain=0, cross_entropy=0., metric="mse", image_lr=0.)

#############################################
#             Synthetic images              #
#############################################


def decode(images, real, factor):
    """What a network sees of the stored images [ipc, C, H, W] of one class: [ipc * factor**2, C, H, W], normalised."""
    mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (real.mean, real.std))
    tiles, _ = decode_tiles(images, torch.zeros(len(images), dtype=torch.long), factor)
    return (tiles - mean) / std


def class_members(real, config):
    """Indices of the real images of every class. Raises UserError when a class has too few."""
    ipc, factor, size = config["ipc"], config["factor"], config["image_size"]
    if factor > size:
        raise UserError(f"--factor {factor} cuts images of {size} pixels into tiles of less than one")
    members = [(real.labels == label).nonzero().squeeze(1) for label in range(config["num_classes"])]
    needed = ipc * factor ** 2
    for label, own in enumerate(members):
        if len(own) < needed:
            raise UserError(f"class {label} has {len(own)} training images; --ipc {ipc} --factor {factor} starts from "
                            f"{needed}")
    return members


def select(real, members, config):
    """Real images of every class, as tiles: [classes, ipc, C, H, W] in [0, 1].

    A network trained for one epoch tells which half of a class it is surest of (images that look like their class, Sun
    et al. 2024), and herding takes from that half.
    """
    count = config["ipc"] * config["factor"] ** 2
    network = build_network(config, config["seed"]).to(real.images.device)
    train_network(network, real, config, random_stream(config["seed"], "select"))
    embed, classify = embedding_and_classifier(network)
    images = torch.zeros(len(members), config["ipc"], *real.images.shape[1:], device=real.images.device)
    for label in ranks.share(range(len(members)), "selecting"):
        own = members[label]
        with torch.no_grad():
            embeddings = torch.cat([embed(real.batch(index)[0]) for index in own.split(250)])
            certainty = classify(embeddings).log_softmax(1)[:, label]
        surest = certainty.topk(max(count, len(own) // 2)).indices
        chosen = own[surest[herd(embeddings[surest], count)]]
        images[label] = encode_tiles(real.images[chosen].float() / 255, config["factor"])
    return ranks.sum_over_ranks_(images)


def herd(embeddings, count):
    """Indices of `count` of the embeddings [N, D] whose mean direction stays closest to that of all (Welling 2009)."""
    embeddings = F.normalize(embeddings)
    mean = embeddings.mean(0)
    total = torch.zeros_like(mean)  # of those chosen
    chosen = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
    for n in range(1, count + 1):
        closeness = embeddings @ (n * mean - total)
        best = int(closeness.masked_fill(chosen, -math.inf).argmax())
        total += embeddings[best]
        chosen[best] = True
    return chosen.nonzero().squeeze(1)


#############################################
#                 Networks                  #
#############################################


def embedding_and_classifier(network):
    """(all layers but the last, the last one), sharing the network's weights. Raises UserError."""
    if not isinstance(network, nn.Sequential):
        raise UserError(f"matching embeddings needs an nn.Sequential with its classifier last, not a "
                        f"{type(network).__name__}")
    *layers, classifier = network.children()
    return nn.Sequential(*layers), classifier


def train_network(network, split, config, stream, epochs=1, momenta=None):
    """Train on `split` at the constant learning rate that a schedule three times as long begins with; the momenta.

    idc trains its networks under colour and crop alone (Kim et al.'s code).
    """
    recipe = recipe_of(config, 3 * epochs)
    if config["method"] == "idc" and recipe.augment == "dsa":
        recipe = recipe._replace(augment="crop")
    return train(network, split, recipe, stream, until=epochs, training=Training(momenta=momenta)).momenta


#############################################
#                 Matching                  #
#############################################


def gradient_distance(network, real, synthetic, label, metric="mse"):
    """Distance of the loss gradients of two batches [N, C, H, W] and [M, C, H, W] of one class (Kim et al. 2022).

    Over the weights of the convolutions, as in their code; `metric` mse sums squared differences, l1 absolute ones.
    """
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]

    def gradient(images, create_graph=False):
        labels = torch.full((len(images),), label, device=images.device)
        return torch.autograd.grad(F.cross_entropy(network(images), labels), weights, create_graph=create_graph)

    differences = torch._foreach_sub(gradient(synthetic, create_graph=True), gradient(real))
    if metric == "l1":
        return sum(difference.abs().sum() for difference in differences)
    return sum(difference.square().sum() for difference in differences)


def embedding_distance(network, real, synthetic, label, cross_entropy=0.):
    """Squared distance of the mean embeddings of two batches of one class (Zhao & Bilen 2023, Eq. 5), and
    `cross_entropy` times the loss of the network on the synthetic one (Zhao et al. 2023, Eq. 8)."""
    embed, classify = embedding_and_classifier(network)
    with torch.no_grad():
        goal = embed(real).mean(0)
    embeddings = embed(synthetic)
    distance = (embeddings.mean(0) - goal).square().sum()
    if cross_entropy:
        labels = torch.full((len(synthetic),), label, device=synthetic.device)
        distance = distance + cross_entropy * F.cross_entropy(classify(embeddings), labels)
    return distance


def match(network, images, real, members, config, stream):
    """Add the gradient of the matching loss to images.grad, class by class, and return the mean loss of a class.

    The batches of a class share one draw of the augmentation (Zhao & Bilen 2021): DSA, or for idc colour, crop and
    cutout (Kim et al.'s code). Of several ranks each matches its own classes, after all draws of all classes.
    """
    if config["method"] == "idc":
        augmentation = dict(flip=False, geometries=("crop",), cutout=True)
    else:
        augmentation = dict(flip=config["flip"])
    group = ranks.current()
    losses = torch.zeros(len(members), dtype=torch.float64)
    for label, own in enumerate(members):
        chosen = own[torch.randint(len(own), (config["real_images"],), generator=stream)]
        shuffled = torch.randperm(len(images[label]) * config["factor"] ** 2, generator=stream)
        draw = draw_dsa(stream, **augmentation)
        if label % group.size != group.rank:
            continue
        batch, _ = real.batch(chosen)
        synthetic = decode(images[label], real, config["factor"])[shuffled[:config["synthetic_images"]]]
        pair = dsa(batch, draw), dsa(synthetic, draw)
        if config["method"] == "idc":
            loss = gradient_distance(network, *pair, label, config["metric"])
        else:
            loss = embedding_distance(network, *pair, label, config["cross_entropy"])
        loss.backward(inputs=[images])
        losses[label] = loss.item()
    if images.grad is None:  # more ranks than classes
        images.grad = torch.zeros_like(images)
    ranks.sum_over_ranks_(images.grad)  # the gradient of a class is on one rank, so its bits stay the same
    return sum(ranks.sum_over_ranks_(losses).tolist()) / len(members)


#############################################
#               Distillation                #
#############################################


@dataclass
class Run:
    """What a run goes on from."""

    images: torch.Tensor  # [classes, ipc, C, H, W] in [0, 1]
    optimizer: torch.optim.Optimizer
    network: nn.Module = None  # matched in at present, with the momenta of its training
    momenta: list = None
    losses: list = field(default_factory=list)  # one an iteration
    minutes: float = 0.


def begin(real, members, config, saved=None):
    """A run at its first iteration, or at the checkpoint `saved`.

    The learning rate of the images grows with their number, as each has that much less of the mean to answer for.
    """
    images = saved["images"] if saved else select(real, members, config)
    images.requires_grad_()
    run = Run(images, torch.optim.SGD([images], lr=config["image_lr"] * config["ipc"] / 10, momentum=.5))
    if saved:
        run.optimizer.load_state_dict(saved["optimizer"])
        run.losses, run.minutes, run.momenta = saved["losses"], saved["minutes"], saved["momenta"]
        if saved["network"]:
            run.network = build_network(config, 0).to(images.device)
            run.network.load_state_dict(saved["network"])
    return run


def iterate(run, real, members, config):
    """One iteration: a new network every `inner` of them, the images a step closer, the network a step further."""
    number = len(run.losses)
    stream = random_stream(config["seed"], "iteration", number)
    if number % config["inner"] == 0:
        seed = config["seed"] * 1_000_003 + number // config["inner"]
        run.network = build_network(config, seed).to(run.images.device)
        run.momenta = None
        if config["pretrain"]:
            run.momenta = train_network(run.network, real, config, stream, config["pretrain"])
    run.optimizer.zero_grad()
    loss = match(run.network, run.images, real, members, config, stream)
    if not (math.isfinite(loss) and run.images.grad.isfinite().all()):
        raise UserError(f"the matching loss became {loss} at iteration {number}; the set before it is kept; "
                        f"try a lower --image-lr than {config['image_lr']:g}")
    run.optimizer.step()
    run.images.data.clamp_(0, 1)
    if config["network_images"]:
        batch = real.subset(torch.randint(len(real), (config["network_images"],), generator=stream))
        run.momenta = train_network(run.network, batch, config, stream, momenta=run.momenta)
    run.losses.append(loss)


def distill(real, config, out, budget=math.inf):
    """Distil the split `real` into config["ipc"] images a class; returns the Run.

    Every minute the set so far goes to the folder `out`, from where the same call goes on. `budget`: minutes, of this
    call and those it goes on from. Raises UserError on a loss that is not finite; the last good set stays in `out`.
    """
    members = class_members(real, config)
    run = begin(real, members, config, load_checkpoint(out, config, real.images.device))
    total = config["outer"] * config["inner"]
    started = time.monotonic() - 60 * run.minutes
    autosave = files.Autosave(seconds=60)
    epoch = len(run.losses) // config["inner"]
    rows = curves.Curve(out / "curves.csv", config["method"], epoch)
    with rows as curve, Bar(config["method"], total, len(run.losses), "iteration", leave=True) as bar:
        first = len(run.losses), time.monotonic()  # of the epoch
        while len(run.losses) < total and run.minutes < budget:
            try:
                iterate(run, real, members, config)
            except UserError:
                save_run(run, out, config)
                raise
            run.minutes = float(ranks.broadcast((time.monotonic() - started) / 60))
            bar.total = int(min(total, len(run.losses) * budget / run.minutes))  # what will be done, for the time left
            bar.update(loss=f"{run.losses[-1]:.4g}")
            if len(run.losses) % config["inner"] == 0:
                curve.add(**curve_row(run, config, *first))
                first = len(run.losses), time.monotonic()
            if autosave.due():
                curve.flush()
                save_run(run, out, config)
        bar.say()
    save_run(run, out, config)
    return run


def curve_row(run, config, first, began):
    """The row of curves.csv of the iterations from `first` on, since the time `began`; images are real ones matched."""
    step, inner = len(run.losses), config["inner"]
    images = (step - first) * config["real_images"] * len(run.images)
    return {"step": step, "epoch": step // inner, "loss": statistics.mean(run.losses[-inner:]),
            "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_second": round(images / (time.monotonic() - began), 1)}


#############################################
#                   Files                   #
#############################################


def save_run(run, out, config):
    """The set as data.pt and sheet.png, both 8 bits deep, and checkpoint.pt to go on from."""
    images = run.images.detach().cpu()
    labels = torch.arange(len(images)).repeat_interleave(config["ipc"])
    files.save(out / "checkpoint.pt", {  # first: without it the others are not this run's
        "config": config, "images": images, "optimizer": run.optimizer.state_dict(), "momenta": run.momenta,
        "network": run.network.state_dict() if run.network else None, "losses": run.losses, "minutes": run.minutes})
    files.save(out / "data.pt", [(images * 255).round().div(255).flatten(0, 1), labels])
    files.write_atomically(out / "sheet.png", contact_sheet(images))


def load_checkpoint(out, config, device):
    """What save_run left in `out`, or None. Raises UserError when it is of another run, --outer apart."""
    path = out / "checkpoint.pt"
    if not path.exists():
        others = [name for name in ("data.pt", "sheet.png", "config.json") if (out / name).exists()]
        if others:
            raise UserError(f"{out} holds {others[0]} of no run that could go on; give another --out")
        return None
    saved = files.load(path, device)
    different = files.difference(saved["config"], config, ignored=["outer"])
    if different:
        raise UserError(f"{out} holds a run with another {different}; give another --out")
    return saved


#############################################
#             Measuring a set               #
#############################################


def measure(path, real, test, config, args):
    """Print the row of the distilled set in `path` and return what config.json keeps of it."""
    named = config | {"distilled": path, "factor": args.factor}
    distilled = distilled_of(named, real.mean, real.std, test.images.device)
    affordable = 1000 if test.images.device.type == "cuda" else max(1, 60_000 // len(distilled))
    recipe = recipe_of(config, args.epochs or min(1000, affordable))
    accuracies = accuracies_on(distilled, test, config | {"width": args.eval_width}, recipe, args.repeats)
    mean = statistics.mean(accuracies)
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.
    network = f"{config['model']}, width {args.eval_width or 'full'}"
    print(f"{'set':<40} {'images':>7} {'network':<22} {'epochs':>6}  test accuracy")
    print(f"{str(path):<40} {len(distilled):>7} {network:<22} {recipe.epochs:>6}  "
          f"{100 * mean:.2f} +- {100 * std:.2f}% of {len(accuracies)}")
    return {"mean": mean, "std": std, "values": accuracies, "network": network, **recipe._asdict()}


def accuracies_on(distilled, test, config, recipe, repeats):
    """Test accuracies of `repeats` networks trained from scratch on a distilled split: the measure of such a set."""
    accuracies = torch.zeros(repeats, dtype=torch.float64)
    for repeat in ranks.share(range(repeats), "evaluating"):
        network = build_network(config, repeat).to(distilled.images.device)
        train_with_bar(f"network {repeat}", network, distilled, recipe, random_stream(repeat, "evaluate"))
        accuracies[repeat] = evaluate(network, test).accuracy
    return ranks.sum_over_ranks_(accuracies).tolist()


#############################################
#                   Main                    #
#############################################


def parse(argv=None):
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("--dataset", default="cifar10", help="name or folder, as in prune.py (cifar10)")
    cli.place_flags(parser)
    flag("--ipc", type=positive, default=10, help="stored images per class (10)")
    flag("--factor", type=positive, help="tiles along a side of a stored image (2; digits 1, imagenet10 3)")
    flag("--method", choices=SETTINGS, help="(idc with CUDA, else dm)")
    flag("--seed", type=cli.seed, default=0)
    flag("--out", type=cli.folder, help="folder (distilled/<dataset>_ipc<ipc>)")
    flag("--budget", type=within(0), default=math.inf, metavar="MINUTES", help="stop then, keeping the set so far")
    cli.machine_flags(parser)
    flag = parser.add_argument_group("settings of the method", "the defaults are the method's; idc: those of its paper "
                                     "for CIFAR, and for ImageNet-10 on images above 64 pixels").add_argument
    flag("--outer", type=positive, help="networks matched in, one after the other")
    flag("--inner", type=positive, help="iterations with each")
    flag("--image-lr", type=within(0), help="learning rate of the images; multiplied by ipc / 10")
    flag("--metric", choices=("mse", "l1"), help="between gradients (idc)")
    flag("--cross-entropy", type=within(0), help="weight of the loss on synthetic images (idm)")
    flag("--real-images", type=positive, help="real images of a class matched in an iteration (64)")
    flag("--synthetic-images", type=positive, help="decoded images matched likewise, at most (dm, idm: 64; idc: 128)")
    flag("--network-images", type=at_least(0), help="real images the network is trained on after every iteration")
    flag("--pretrain", type=at_least(0), help="epochs of training on real data before the first iteration")
    flag("--model", help="network: convnet3, resnet10, resnet18, resnet10ap with IDC's average pooling, or "
                         "package.module:callable that returns an nn.Sequential")
    flag("--width", type=cli.width, help="its channels in the first layer (idc: full; dm, idm: 32)")
    flag("--norm", choices=("instance", "batch", "none"), help="its normalisation (instance)")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--evaluate", type=Path, metavar="PATH", help="only measure this set: any format prune.py --distilled reads")
    flag("--repeats", type=at_least(0), default=2, help="networks trained from scratch on the set; 0: none (2)")
    flag("--hold-out", type=positive, metavar="N",
         help="set N training images aside and score on these, not on the test set: for tuning (none)")
    flag("--epochs", type=positive, help="of their training (1000; on a CPU what sees 60,000 images, at most 1000)")
    flag("--eval-width", type=cli.width, help="their channels in the first layer (full)")
    return parser.parse_args(argv)


def settings(args, image_size):
    """The settings of the method on images of this size, and the flags given over them."""
    published = IDC_IMAGENET if args.method == "idc" and image_size > 64 else SETTINGS[args.method]
    config = DEFAULTS | published
    config |= {key: value for key, value in vars(args).items() if key in config and value is not None}
    factor = args.factor or {"digits": 1, "imagenet10": 3}.get(args.dataset, 2)
    return config | usual_augmentation(image_size) | {"factor": factor}


def main():
    args = parse()
    if args.evaluate and not args.repeats:
        raise UserError("--evaluate with --repeats 0 has nothing to do")
    device = cli.start(args)
    args.method = args.method or ("idc" if device.type == "cuda" else "dm")
    config = {key: getattr(args, key) for key in ("dataset", "image_size", "ipc", "method", "seed")}
    real, test = load_real(config, args.data_dir, device)
    args.dataset = config["dataset"]  # of a path, the name
    if args.hold_out:
        real, test = set_aside(real, args.hold_out)
    config |= settings(args, config["image_size"])
    if args.evaluate:
        measure(args.evaluate, real, test, config, args)
        return
    out = args.out or Path("distilled") / f"{args.dataset}_ipc{args.ipc}"
    run = distill(real, config, out, args.budget)
    result = config | {"command": shlex.join(["python", *sys.argv]), "iterations": len(run.losses),
                       "minutes": round(run.minutes, 1)}
    files.save(out / "config.json", result)
    ranks.wait()  # for the first one's files
    if args.repeats:
        accuracy = measure(out / "data.pt", real, test, config, args)
        files.save(out / "config.json", result | {"accuracy": accuracy})


if __name__ == "__main__":
    cli.run(main)
