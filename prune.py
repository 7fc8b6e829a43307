"""Find lottery tickets by pruning on distilled data: the masks of Figures 2 and 7 of the paper.

    python prune.py --data distilled --ipc 10        Distilled Pruning: train on a few synthetic images a class
    python prune.py --data real                      IMP: the same loop on real data
    python prune.py --data subset                    control: as few random real images as the distilled set has
    python prune.py --data random                    control: random masks of the same sparsities, no training
    python prune.py --score snip --rounds 1 --sparsity .9      at initialisation, by one look at the same images

Train, remove the 20% of the remaining weights that are smallest, rewind the rest to initialisation, repeat.
Every round leaves a mask in --out (r0.pt is the dense network) that stability.py, landscape.py and hessian.py read;
--evaluate trains every round's subnetwork on real data and reports its test accuracy.

The first command takes about a minute on 2 cores without a GPU, where the `quick` preset runs: convnet3 of width 32,
10 rounds. Expect 20.00, 36.00, 48.80, ... 89.26% sparsity, 24,000 images seen a round, and 48 to 70% of the augmented
distilled images recognised in its last epoch. Trained on 10,000 real images for 8 epochs such subnetworks reach 60.1
and 58.0% on CIFAR-10's test set at 59 and 87% sparsity, with the published MTT set 63.9 and 61.6% (docs/study.md).
`--preset paper` is ResNet-18, meant for a GPU.

    python prune.py --plot masks_distilled masks_real          accuracy and images seen against sparsity
    python prune.py --compare masks_distilled masks_real       per-layer sparsity and overlap of two runs (Sec. 6)

The same command again goes on where an interrupted run stopped, at most half a minute back, and ends with the same
masks. For a network and images of your own: find_masks(model, Split(images, labels), rounds=5, epochs=100).
"""
if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while PyTorch is imported

import copy
import fnmatch
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

from common import cli, evaluation, files, ranks, together, training
from common.augment import usual_augmentation
from common.cli import at_least, positive, within
from common.data import DATASETS, load_real, random_subset
from common.distilled import distilled_of
from common.endpoints import check_apart, real_recipe
from common.errors import UserError
from common.figures import draw_runs
from common.masks import dense_mask, magnitude_mask, pruned, shuffled
from common.networks import aliases, build_network, check_network, print_parameters, prunable
from common.overlap import compare
from common.runs import prepare_folder, print_table, read_seconds, row_of
from common.scores import PASSES, SCORES, scores_of
from common.streams import random_stream
from common.tickets import changed_setting, export, fingerprint, load_ticket, make_ticket, tensors_sha

DEFAULTS = dict(rounds=10, rate=.2, scope="global", rewind=0, rewind_what="all", seed=0, epochs=300, eval_epochs=300,
                eval_lr=None, eval_batch_size=None, score=None, shuffle=None, keep=None,
                **training.Recipe._field_defaults)  # the paper's, on real data
PRESETS = {
    "paper": dict(model="resnet18", width=None, train_images=None, lr=.01),
    "quick": dict(model="convnet3", width=32, train_images=10_000, lr=.02),
}
PAPER_EPOCHS = {"distilled": 1000, "subset": 1000, "real": 300, "random": 0}
QUICK_IMAGES = {"distilled": 24_000, "subset": 24_000, "real": 120_000, "random": 0}  # shown in quick's epochs

#############################################
#                 The search                #
#############################################


def search(model, data, config, out, real=None, start=None, evaluate=()):
    """Iterative magnitude pruning, Algorithm 1 of the paper: train, prune, rewind, repeat.

    `data` is the split trained on (None draws random masks), `real` the (train, test) pair, `start` a ticket to go on
    from, `evaluate` the rounds whose subnetworks are trained on real data. The folder `out` gets r<n>.pt and
    results.csv after every round; finished rounds in it are taken as they are. Returns the rows of results.csv.
    """
    rows, seconds = [], read_seconds(out)
    total = sum(p.numel() for p in model.parameters())
    first = start["round"] if start else 0
    for number in range(first, config["rounds"] + 1):
        began = time.perf_counter()
        path = out / f"r{number}.pt"
        if path.exists():
            ticket = load_ticket(path, device=next(model.parameters()).device, model=model)
        else:
            if number == first:
                ticket = first_ticket(path, model, config, real, start)
            else:
                ticket = pruning_round(path, model, as_found(ticket), config, data)
            ticket = sanity_checked(ticket, config)
            files.save(path, ticket)
            seconds[number] = time.perf_counter() - began
        if number in evaluate and "test_accuracy" not in ticket["results"]:
            ticket["results"] |= evaluate_ticket(path, model, ticket, config, *real)
            files.save(path, ticket)
        unfinished(path).unlink(missing_ok=True)
        rows.append(row_of(ticket, seconds.get(number, math.nan), total))
        files.save_csv(out / "results.csv", rows)
        ranks.current().step()
    return rows


def pruning_round(path, model, ticket, config, data):
    """The ticket of the next round: train the one before, remove the smallest weights, rewind the others."""
    number, before = ticket["round"] + 1, ticket["masks"]
    model.load_state_dict(ticket["init"])
    masks, results = next_masks(path, model, ticket, config, data)
    say_what_is_gone(number, before, masks)
    init = rewound(model, ticket["init"], prunable(model), config["rewind_what"])
    return make_ticket(number, masks, init, config, results)


def next_masks(path, model, ticket, config, data):
    """(masks, results) of the next round: by the weights of the network trained, or their scores untrained.

    Without data the weights are ranked at random.
    """
    number, before = ticket["round"] + 1, ticket["masks"]
    stream = random_stream(config["seed"], "round", number)
    how = config["rate"], config["scope"]
    if data is None:
        drawn = {name: torch.rand(kept.shape, generator=stream).to(kept.device) for name, kept in before.items()}
        return pruned(drawn, before, *how), {"training_points": 0}
    images_seen = ticket["results"]["training_points"]
    if config["score"]:
        scores = scores_of(config["score"], model, before, data)
        return pruned(scores, before, *how), {"training_points": images_seen + PASSES[config["score"]] * len(data)}
    recipe = training.recipe_of(config, config["epochs"])
    trained = train(f"round {number}", path, model, data, config, recipe, stream, before)
    results = {"training_points": images_seen + trained.images_seen, "train_loss": trained.loss,
               "train_accuracy": trained.accuracy}
    return magnitude_mask(prunable(model), before, *how), results


def check_search(model, data, real, config, evaluate):
    """Try a step of the network, before anything is written. Raises UserError for what cannot be searched."""
    split = data if data is not None else real and real[0]
    if split:
        count = min(2, config["batch_size"], len(split))
        check_network(model, *split.batch(slice(0, count)), config.get("num_classes"))
    unknown = [pattern for pattern in config["keep"] or () if not fnmatch.filter(prunable(model), pattern)]
    if unknown:
        raise UserError(f"--keep {unknown[0]} fits none of the prunable weights: {', '.join(prunable(model))}")
    total = sum(weight.numel() for weight in prunable(model, config["keep"]).values())
    if total == 0:
        raise UserError(f"--keep {' '.join(config['keep'])} leaves nothing to prune")
    if config["score"] and data is None:
        raise UserError("--score with --data random: random masks have no score; give other data")
    if round(config["rate"] * total) == 0:
        raise UserError(f"--rate {config['rate']:g} of {total:,} weights removes none")
    late = [number for number in evaluate if number > config["rounds"]]
    if late:
        raise UserError(f"--evaluate {late[0]}: the last round is {config['rounds']} (--rounds)")


def say_what_is_gone(number, before, masks):
    """Name the layers that lost their last weight in this round. Raises UserError when no weight is left at all."""
    if not any(kept.any() for kept in masks.values()):
        raise UserError(f"round {number} would remove all weights; the rounds before it are kept: take a lower --rate, "
                        "or fewer --rounds")
    gone = [name for name, kept in masks.items() if before[name].any() and not kept.any()]
    if gone:
        print(f"round {number}: no weight is left in {', '.join(gone)}", file=sys.stderr)


def first_ticket(path, model, config, real, start):
    """Round 0: all weights survive, at initialisation or after `rewind` epochs on real data; or the `start` ticket."""
    dense = dense_mask(model, config["keep"])
    if start and start["masks"].keys() != dense.keys():
        raise UserError(f"--keep: the start mask prunes {', '.join(start['masks'])}; wanted {', '.join(dense)}")
    if start:
        images_seen = start["results"].get("training_points", 0)
        return make_ticket(start["round"], start["masks"], start["init"], config, {"training_points": images_seen})
    images_seen = 0
    if config["rewind"]:
        stream = random_stream(config["seed"], "rewind")
        trained = train("rewind point", path, model, real[0], config, real_recipe(config), stream,
                        until=config["rewind"])
        images_seen = trained.images_seen
    return make_ticket(0, dense, copied(model.state_dict()), config, {"training_points": images_seen})


def sanity_checked(ticket, config):
    """The ticket of Frankle et al. 2021's sanity checks: the mask permuted within each layer, the weights drawn anew.

    What was found instead, and is gone on from, stays in it as "found".
    """
    changed = {}
    if config["shuffle"]:
        changed["masks"] = shuffled(ticket["masks"], random_stream(config["seed"], "shuffle", ticket["round"]))
    if config.get("reinit") is not None:
        fresh = build_network(config, config["reinit"]).state_dict()
        changed["init"] = {name: fresh[name].to(value.device) for name, value in ticket["init"].items()}
    found = {"found": {key: ticket[key] for key in changed}} if changed else {}
    return ticket | changed | found


def as_found(ticket):
    """The ticket as it was before its sanity checks."""
    return ticket | ticket.get("found", {})


def rewound(model, init, weights, what):
    """The state to start the next round from: everything as in `init`, or only the prunable `weights`."""
    if what == "all":
        return copied(init)
    first_names = aliases(model)  # a weight of two names is rewound under both
    early = {name: value for name, value in init.items() if first_names.get(name, name) in weights}
    return copied(model.state_dict() | early)


def copied(state):
    return {name: value.detach().clone() for name, value in state.items()}


def evaluate_ticket(path, model, ticket, config, train_split, test_split):
    """Train the masked initial network on real data; loss and accuracy of the final epoch on the test set."""
    number = ticket["round"]
    stream = random_stream(config["seed"], "evaluate", number)
    model.load_state_dict(ticket["init"])
    train(f"evaluate r{number}", path, model, train_split, config, real_recipe(config), stream, ticket["masks"])
    score = evaluation.evaluate(model, test_split)
    evaluation.check_losses([score.loss], f"evaluate r{number}")
    files.save(path.with_name(f"trained_{path.name}"), model.state_dict())
    return {"test_loss": score.loss, "test_accuracy": score.accuracy}


def train(title, path, model, split, config, recipe, stream, mask=None, until=None):
    """training.train, saved beside the ticket's `path` every half a minute and gone on with from there."""
    saved = unfinished(path)
    begun = files.load(saved, split.labels.device) if saved.exists() else None
    if begun and (begun["title"] != title or changed_setting(begun["config"], config)):
        begun = None
    about = {"title": title, "config": config}
    return training.train_saved(saved, about, title, model, split, recipe, stream, mask, until, begun)


def unfinished(path):
    """Where a round, its rewind point or its evaluation is kept while it is trained: training_r<n>.pt."""
    return path.with_name(f"training_{path.name}")


def find_masks(model, data, out="masks", real=None, start=None, evaluate=(), overwrite=False, **settings):
    """The search for a network and images of your own, without the command line. Returns the rows of results.csv.

    model      nn.Module; the Conv2d and Linear weights of a copy of it are pruned
    data       Split(images [N, C, H, H], labels [N]) on the model's device, float images normalised; None: random masks
    out        folder of the tickets r<n>.pt, read by common.tickets.load_ticket(path, model=model)
    real       (train, test) Splits, for a rewind point and for the rounds in `evaluate`
    start      a ticket to go on from
    overwrite  whether another run in `out` may be deleted; this very run goes on where it stopped
    settings   replace those of DEFAULTS; --help explains them

    Other shapes of images need augment="none", cutmix=0. Raises UserError.
    """
    unknown = sorted(settings.keys() - DEFAULTS.keys())
    if unknown:
        raise UserError(f"no setting {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    config = DEFAULTS | settings
    config["keep"] = list(config["keep"]) if config["keep"] else None
    if real is None and (evaluate or config["rewind"]):
        raise UserError("to evaluate or to rewind, give real=(train, test)")
    images = {} if data is None else {"images": data.images, "labels": data.labels}
    config["network_sha"] = tensors_sha(model.state_dict())
    config["data_sha"] = tensors_sha(images)
    config["start_sha"] = fingerprint(start) if start else None
    model, out = copy.deepcopy(model), Path(out)
    return search_in(out, overwrite, model, data, config, real, start, evaluate)


def search_in(out, overwrite, model, data, config, real, start, evaluate):
    """`search`, after all checks, in a folder that no other process works in."""
    check_search(model, data, real, config, evaluate)
    with files.owned(out):
        prepare_folder(out, config, overwrite)
        return search(model, data, config, out, real, start, evaluate)


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = cli.Parser(__doc__)
    add_data_flags(parser)
    add_pruning_flags(parser)
    add_training_flags(parser)
    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=cli.folder, default=Path("masks"),
         help="folder of masks, results.csv, curves.csv, config.json, prune.png (masks)")
    flag("--overwrite", action="store_true", help="replace another run in --out")
    flag("--plot", nargs="+", metavar="DIR", help="draw finished runs together in <out>/prune.png, without training")
    flag("--compare", nargs=2, metavar="DIR", help="overlap of two finished runs' masks in <out>/compare.csv and .png")
    flag("--export", nargs=2, metavar=("TO", "FROM"),
         help="write a mask file as a torch.nn.utils.prune state dict, or an endpoint as a state dict")
    later = ("rate", "epochs", "eval_epochs", "lr", "augment", "cutmix")  # the preset and the images say
    parser.set_defaults(**DEFAULTS | dict.fromkeys(later))
    return parser.parse_args(argv)


def add_data_flags(parser):
    group = parser.add_argument_group("data")
    flag = group.add_argument
    flag("--data", choices=("distilled", "real", "subset", "random"), default="distilled", help="pruned on (distilled)")
    flag("--dataset", help=f"{', '.join(DATASETS)}, or a folder with {{train,test}}.npz or "
                           "{train,val}/<class>/ images (cifar10)")
    cli.place_flags(group)
    flag("--train-images", type=positive, help="use only so many real training images (paper: all, quick: 10000)")
    flag("--ipc", type=positive, default=10, help="images a class in the distilled set, or drawn for the subset (10)")
    flag("--distilled", metavar="PATH", help="distilled set: EDC, DSA/DC/DM, KIP, MTT, PNG class folders or contact "
                                             "sheet (the embedded one)")
    flag("--factor", type=positive, help="tiles along a side of a distilled image (as the file beside it says, or 1)")


def add_pruning_flags(parser):
    flag = parser.add_argument_group("network").add_argument
    flag("--model", help="convnet3, resnet10, resnet18 or package.module:callable (paper: resnet18, quick: convnet3)")
    flag("--width", type=cli.width, help="channels of the first layer, scales all (convnet3: 128, in quick 32; "
                                        "resnets: 32, above 64 pixels 64)")
    flag("--norm", choices=("instance", "batch", "none"), help="normalisation (convnet3: instance, resnets: batch)")
    flag = parser.add_argument_group("pruning").add_argument
    flag("--rounds", type=positive, help="the last round; those of a --start mask count (%(default)s)")
    flag("--rate", type=cli.share_of("--rate"), help="fraction of the remaining weights removed in a round (0.2)")
    flag("--sparsity", type=cli.share_of("--sparsity"),
         help="instead of --rate: fraction of all prunable weights removed after the last round")
    flag("--score", choices=SCORES,
         help="prune untrained, by a score at initialisation; snip and grasp look at all images of --data (the papers "
              "at ten a class, as a distilled set and --data subset have)")
    flag("--keep", nargs="+", metavar="PATTERN", help="weights to leave dense, by name: linear.weight, 'conv1*'")
    flag("--shuffle", action="store_true", help="sanity check: permute every round's mask within each layer")
    flag("--reinit", type=cli.seed, metavar="SEED", help="sanity check: masks with weights drawn anew")
    flag("--scope", choices=("global", "layer"), help="rank weights over all layers or in each (%(default)s)")
    flag("--rewind", type=at_least(0), metavar="K",
         help="rewind to epoch K of dense training on real data (0: initialisation)")
    flag("--rewind-what", choices=("all", "weights"),
         help="everything, or only conv and linear weights as the paper's code does (%(default)s)")
    flag("--start", metavar="MASK", help="go on from this mask file, e.g. IMP from a distilled mask (Fig. 7)")
    flag("--evaluate", nargs="*", type=at_least(0), metavar="ROUND",
         help="train the subnetworks, of these rounds or of all, on real data and report their test accuracy")


def add_training_flags(parser):
    group = parser.add_argument_group("training")
    flag = group.add_argument
    flag("--preset", choices=PRESETS, help="the paper's settings, or a scaled-down run (paper with CUDA, else quick)")
    flag("--epochs", type=positive, help="of a pruning round (paper: 1000 distilled and subset, 300 real; quick: as "
                                         "many as show 24000 images, 120000 real ones)")
    flag("--eval-epochs", type=positive, help="of a subnetwork on real data (paper: 300; quick: 120000 images)")
    flag("--eval-lr", type=within(0), help="learning rate of a subnetwork's training on real data (that of --lr)")
    flag("--eval-batch-size", type=positive, help="batch size of a subnetwork's training on real data (--batch-size)")
    flag("--lr", type=within(0),
         help="learning rate, times 0.2 at 2/3 and 5/6 of the epochs (paper: 0.01, quick: 0.02)")
    flag("--momentum", type=within(0, 1), help="(%(default)s)")
    flag("--weight-decay", type=within(0), help="(%(default)s)")
    flag("--batch-size", type=positive, help="(%(default)s)")
    flag("--augment", choices=("dsa", "imagenet", "none"), help="augmentation (dsa; imagenet above 64 pixels)")
    flag("--cutmix", type=within(0, 1), help="probability of CutMix (0.5; 1 above 64 pixels)")
    cli.sparse_flag(group)
    flag("--amp", action="store_true", help="train in bfloat16")
    flag("--seed", type=cli.seed, help="fixes initialisation, order and augmentation (%(default)s)")
    flag("--seeds", type=cli.seed, nargs="+",
         help="several runs, each in its own folder <out>/seed<S>; on a GPU together")
    cli.machine_flags(group)


def config_of(args, preset):
    """The config of a run: flags, else those of the --start mask for the network, else the preset."""
    elsewhere = {"data_dir", "evaluate", "preset", "sparse", "log", "sparsity", "seeds", "device", "out", "overwrite",
                 "plot", "compare", "export"}
    if not args.tf32:
        elsewhere.add("tf32")  # float32 needs no word
    config = {key: value for key, value in vars(args).items() if key not in elsewhere}
    unset = PRESETS[preset] | {"dataset": "cifar10", "rate": DEFAULTS["rate"]}
    started = files.load(args.start) if args.start else None
    started = started if isinstance(started, dict) and "config" in started else {}  # a bare state dict names nothing
    if args.sparsity:
        unset["rate"] = rate_to(args, started)
    if started:
        same = ("model", "width", "norm", "dataset", "image_size", "keep")
        unset |= {key: started["config"].get(key) for key in same}
        if ":" in str(unset["model"]) and config["model"] is None:
            raise UserError(f"{args.start}: its network is {unset['model']}; its code is run only when you name it: "
                            f"--model {unset['model']}")
    fill_in(config, unset)
    if config["start"] and config["rewind"]:
        raise UserError("--rewind with --start: the mask file already holds its rewind point")
    return config


def fill_in(config, values):
    """Give the settings that are None in a config their values."""
    config |= {key: value for key, value in values.items() if config[key] is None}


def rate_to(args, started):
    """The rate of a round after whose last one --sparsity is reached, from the dense network or a --start mask."""
    if args.rate:
        raise UserError("--rate with --sparsity: the sparsity to reach gives the rate of a round")
    begun = {"round": 0, "sparsity": 0.} | started
    rounds = args.rounds - begun["round"]
    if args.sparsity <= begun["sparsity"] or rounds < 1:
        raise UserError(f"--sparsity {args.sparsity:g}: {args.start} is {begun['sparsity']:.2%} sparse in round "
                        f"{begun['round']} already")
    return 1 - ((1 - args.sparsity) / (1 - begun["sparsity"])) ** (1 / rounds)


def load_data(config, data_dir, device, needs_real):
    """(distilled split or None, real (train, test) or None); fills in the config's image shape and augmentation."""
    known = DATASETS.get(config["dataset"])
    real = load_real(config, data_dir, device) if needs_real or not known else None
    if not real:
        config |= {key: getattr(known, key) for key in ("channels", "num_classes", "flip")}
        config["image_size"] = config["image_size"] or known.image_size
    fill_in(config, usual_augmentation(config["image_size"]))
    if config["data"] != "distilled":
        return None, real
    like = real[0] if real else known
    distilled = distilled_of(config, like.mean, like.std, device)
    config["distilled_fingerprint"] = distilled.fingerprint
    return distilled, real


def fill_in_epochs(config, preset, distilled, real):
    """The preset's epochs where no flag names them: the paper's, or as many as show QUICK_IMAGES images."""
    train_size = len(real[0]) if real else DATASETS[config["dataset"]].train_size
    images = {"distilled": len(distilled or ()), "real": min(config["train_images"] or train_size, train_size),
              "subset": config["ipc"] * config["num_classes"], "random": 1}
    for key, kind in (("epochs", config["data"]), ("eval_epochs", "real")):
        if config[key] is None:
            quick = math.ceil(QUICK_IMAGES[kind] / images[kind])
            config[key] = paper_epochs(config, kind, images[kind]) if preset == "paper" else quick
    if config["rewind"] > config["eval_epochs"]:
        raise UserError(f"--rewind {config['rewind']}: real training has only {config['eval_epochs']} epochs")


def paper_epochs(config, data, images):
    """The paper's epochs on `images` of a kind; few ImageNet images a class are seen more often (Kim et al.'s code)."""
    if config["image_size"] <= 64 or PAPER_EPOCHS[data] != 1000:
        return PAPER_EPOCHS[data]
    for most, epochs in ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500)):
        if images <= most * config["num_classes"]:
            return epochs
    return 300


def pruning_data(config, distilled, real):
    """The split that a search trains on; None for random masks."""
    if config["data"] == "real":
        return real[0]
    if config["data"] == "subset":
        stream = random_stream(config["seed"], "subset")
        return random_subset(real[0], config["ipc"], config["num_classes"], stream)
    return distilled


def run_seed(args, config, distilled, real, device, seed):
    """One run of one seed, from the checks to the picture."""
    out = args.out / f"seed{seed}" if args.seeds else args.out
    config = config | {"seed": seed}
    data = pruning_data(config, distilled, real)
    model = build_network(config, config["seed"]).to(device)
    start = load_ticket(args.start, config, device, model) if args.start else None
    config["start_fingerprint"] = fingerprint(start) if start else None
    if start and start["round"] > config["rounds"]:
        raise UserError(f"--rounds {config['rounds']}: {args.start} is of round {start['round']} already")
    evaluate = range(config["rounds"] + 1) if args.evaluate == [] else args.evaluate or ()
    check_apart(out, [args.start, config["distilled"]])
    print_table(search_in(out, args.overwrite, model, data, config, real, start, evaluate))
    draw_runs([out], out / "prune.png")


def main(argv=None):
    args = parse(argv)
    if args.plot:
        if not draw_runs(args.plot, args.out / "prune.png"):
            raise UserError("--plot: nothing was trained in these runs, so there is no accuracy to draw; --evaluate")
        print(f"written: {args.out / 'prune.png'}")
        return
    if args.compare:
        compare(*args.compare, args.out)
        return
    if args.export:
        export(*args.export)
        return
    device = cli.start(args)
    preset = args.preset or ("paper" if device.type == "cuda" else "quick")
    config = config_of(args, preset)
    needs_real = args.evaluate is not None or config["data"] in ("real", "subset") or config["rewind"]
    distilled, real = load_data(config, args.data_dir, device, needs_real)
    fill_in_epochs(config, preset, distilled, real)
    chosen = "as asked" if args.preset else f"device {device.type}"
    way = f"by {config['score']}" if config["score"] else f"of {config['epochs']} epochs"
    print(f"preset {preset} ({chosen}): {config['model']} on {config['dataset']}, {config['data']} data, "
          f"{config['rounds']} rounds {way}")
    print_parameters(build_network(config, config["seed"]), config["keep"])
    together.each(partial(run_seed, args, config, distilled, real, device), args.seeds or [args.seed], device,
                  "rounds of all seeds", config["rounds"] + 1)
    print(f"written: masks, tables and what there is to draw in {args.out}")


if __name__ == "__main__":
    cli.run(main)
