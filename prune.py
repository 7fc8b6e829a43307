"""Find lottery tickets by pruning on distilled data: the masks of Figures 2 and 7 of the paper.

    python prune.py --data distilled --ipc 10        Distilled Pruning: train on a few synthetic images a class
    python prune.py --data real                      IMP: the same loop on real data
    python prune.py --data subset                    control: as few random real images as the distilled set has
    python prune.py --data random                    control: random masks of the same sparsities, no training

Train, remove the 20% of the remaining weights that are smallest, rewind the rest to initialisation, repeat.
Every round leaves a mask in --out (r0.pt is the dense network) that stability.py, landscape.py and hessian.py read;
--evaluate trains every round's subnetwork on real data and reports its test accuracy. Without a GPU the `quick`
preset runs: convnet3 of width 32, 10 rounds (89% sparsity) in about a minute on 2 cores.

    python prune.py --plot masks_distilled masks_real          accuracy and training points against sparsity
    python prune.py --compare masks_distilled masks_real       per-layer sparsity and overlap of two runs (Sec. 6)

The same command again goes on where an interrupted run stopped and ends with the same masks.
"""
import csv
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common
import ranks
import splits
import tickets
from common import UserError, at_least, positive, prunable, random_stream, within

PRESETS = {
    "paper": dict(model="resnet18", width=None, train_images=None, lr=.01, epochs=None, eval_epochs=None),
    "quick": dict(model="convnet3", width=32, train_images=10_000, lr=.02, epochs=None, eval_epochs=None),
}
EPOCHS = {"distilled": 1000, "subset": 1000, "real": 300, "random": 0}  # of the paper
QUICK_IMAGES = {"distilled": 24_000, "subset": 24_000, "real": 120_000, "random": 0}  # shown in quick's epochs
COLUMNS = ("round", "sparsity", "remaining", "training_points", "train_loss", "train_accuracy",
           "test_loss", "test_accuracy", "seconds")

#############################################
#          Pruning and rewinding            #
#############################################


def magnitude_mask(weights, mask, rate, scope="global"):
    """Remove the `rate` of the surviving weights that is smallest in magnitude: round(rate * remaining) of them.

    weights {name: tensor}, mask {name: bool tensor} -> a new mask, nested in the old one. `scope` "global" ranks
    all layers together, "layer" each by itself. Equal to torch.nn.utils.prune's global_unstructured/l1_unstructured.
    """
    groups = [list(mask)] if scope == "global" else [[name] for name in mask]
    new = {name: kept.clone() for name, kept in mask.items()}
    for names in groups:
        survivors = torch.cat([weights[name].detach()[mask[name]].abs() for name in names])
        keep = torch.ones_like(survivors, dtype=torch.bool)
        keep[survivors.topk(round(rate * len(survivors)), largest=False).indices] = False
        for name, part in zip(names, keep.split([int(mask[name].sum()) for name in names])):
            new[name][mask[name]] = part
    return new


def rewound(trained, init, weights, what):
    """The state to start the next round from: everything as in `init`, or only the prunable `weights`."""
    state = init if what == "all" else trained | {name: init[name] for name in weights}
    return {name: value.detach().clone() for name, value in state.items()}


#############################################
#                 The search                #
#############################################


def find_masks(model, config, out, data, real=None, start=None, evaluate=()):
    """Iterative magnitude pruning, Algorithm 1 of the paper. Writes r<n>.pt and results.csv after every round.

    `data` is the split trained on (None draws random masks), `real` the (train, test) pair, `start` a mask file's dict
    to go on from, `evaluate` the rounds whose subnetworks are trained on real data. Finished rounds in `out` are taken
    as they are. Returns the rows of results.csv.
    """
    rows, seconds, first = [], read_seconds(out), start["round"] if start else 0
    for number in range(first, config["rounds"] + 1):
        path, began = out / f"r{number}.pt", time.perf_counter()
        finished = ranks.first_says(path.exists())
        if finished:
            ticket = tickets.load_mask(path, device=next(model.parameters()).device)
        elif number > first:
            ticket = next_ticket(model, ticket, config, data)
        else:
            ticket = first_ticket(model, config, real, start)
        if not finished:
            common.save(path, ticket)
            seconds[number] = time.perf_counter() - began
        if number in evaluate and "test_accuracy" not in ticket["results"]:
            ticket["results"] |= evaluate_ticket(model, ticket, config, *real)
            common.save(path, ticket)
        rows.append(row_of(ticket, seconds.get(number, math.nan)))
        common.save_csv(out / "results.csv", rows)
        ranks.together.get().step()
    return rows


def next_ticket(model, ticket, config, data):
    """Train, prune, rewind: the ticket of the following round."""
    number = ticket["round"] + 1
    stream = random_stream(config["seed"], "round", number)
    if data is None:
        scores = {name: torch.rand(m.shape, generator=stream).to(m.device) for name, m in ticket["masks"].items()}
        results = {"training_points": 0}
    else:
        model.load_state_dict(ticket["init"])
        recipe = common.recipe_of(config, config["epochs"])
        trained = train_with_bar(f"round {number}", model, data, recipe, stream, ticket["masks"])
        scores = prunable(model)
        results = {"training_points": ticket["results"]["training_points"] + trained.points,
                   "train_loss": trained.loss, "train_accuracy": trained.accuracy}
    masks = magnitude_mask(scores, ticket["masks"], config["rate"], config["scope"])
    init = rewound(model.state_dict(), ticket["init"], masks, config["rewind_what"])
    return make_ticket(number, masks, init, config, results)


def first_ticket(model, config, real, start):
    """Round 0: all weights survive, at initialisation or after `rewind` epochs on real data; or the `start` mask."""
    if start:
        points = start["results"].get("training_points", 0)
        return make_ticket(start["round"], start["masks"], start["init"], config, {"training_points": points})
    points = 0
    if config["rewind"]:
        recipe = common.recipe_of(config, config["eval_epochs"])
        points = train_with_bar("rewind point", model, real[0], recipe, random_stream(config["seed"], "rewind"),
                                span=(0, config["rewind"])).points
    init = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return make_ticket(0, common.dense_mask(model), init, config, {"training_points": points})


def make_ticket(number, masks, init, config, results):
    return {"format": tickets.MASK_FORMAT, "round": number, "sparsity": common.sparsity(masks),
            "masks": masks, "init": init, "config": config, "results": results}


def evaluate_ticket(model, ticket, config, train_split, test_split):
    """Train the masked initial network on real data; loss and accuracy of the final epoch on the test set."""
    model.load_state_dict(ticket["init"])
    recipe = common.recipe_of(config, config["eval_epochs"])
    train_with_bar(f"evaluate r{ticket['round']}", model, train_split, recipe,
                   random_stream(config["seed"], "evaluate", ticket["round"]), ticket["masks"])
    score = common.evaluate(model, test_split, sparse=recipe.skipping)
    return {"test_loss": score.loss, "test_accuracy": score.accuracy}


def train_with_bar(title, model, split, recipe, stream, mask=None, span=None):
    """common.train under a progress bar; an error says which round it came from."""
    first, last = span or (0, recipe.epochs)
    ops = common.compiled_ops()
    path = ops.path(model, mask, recipe.skipping) if ops else "dense"
    with tqdm(total=last - first, desc=f"{title} ({path})", unit="epoch", disable=None, leave=False) as bar:
        def progress(epoch, loss, accuracy):
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
            bar.update()

        try:
            return common.train(model, split, recipe, stream, mask, span, progress=progress)
        except UserError as error:
            raise UserError(f"{title}: {error}") from error


def random_subset(split, ipc, num_classes, stream):
    """`ipc` random images of each class."""
    labels = split.labels.cpu()
    fewest = int(torch.bincount(labels, minlength=num_classes).min())
    if fewest < ipc:
        raise UserError(f"--ipc {ipc}: a class has only {fewest} images")
    order = torch.randperm(len(split), generator=stream)
    chosen = torch.cat([order[labels[order] == c][:ipc] for c in range(num_classes)])
    return split.subset(chosen.to(split.labels.device))


#############################################
#            Results and folders            #
#############################################


def row_of(ticket, seconds):
    remaining = sum(int(kept.sum()) for kept in ticket["masks"].values())
    known = ticket["results"] | {"round": ticket["round"], "sparsity": ticket["sparsity"], "remaining": remaining,
                                 "seconds": round(seconds, 2)}
    return {column: known.get(column, "") for column in COLUMNS}


def read_csv(path):
    """Rows of a results file, numbers as floats, empty cells left out."""
    try:
        with open(path, newline="") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a results file of prune.py ({error})") from error


def read_seconds(out):
    """{round: seconds} of an earlier run in `out`. Only results.csv holds times: mask files are reproducible."""
    path = out / "results.csv"
    return {int(row["round"]): row["seconds"] for row in read_csv(path) if "seconds" in row} if path.exists() else {}


def print_table(rows):
    form = "{:>5} {:>8} {:>10} {:>12} {:>10} {:>9} {:>8}"
    print(form.format("round", "sparsity", "remaining", "points seen", "train loss", "train acc", "test acc"))
    for row in rows:
        loss, *percent = (format(row[key], style) if row[key] != "" else "" for key, style in (
            ("train_loss", ".3f"), ("train_accuracy", ".2%"), ("test_accuracy", ".2%")))
        print(form.format(row["round"], f"{row['sparsity']:.2%}", f"{row['remaining']:,}",
                          f"{row['training_points']:,}", loss, *percent))


def prepare_folder(out, config, overwrite):
    """Make `out` ready: empty, or holding an earlier part of this very run. Raises UserError naming the difference."""
    path, other = out / "config.json", ""
    if path.exists():
        earlier = common.load(path)
        # More rounds continue a run: they do not change the ones that are there.
        keys = sorted((config.keys() | earlier.keys()) - {"rounds"})
        other = ", ".join(f"{key} {earlier.get(key)} -> {config.get(key)}" for key in keys
                          if config.get(key) != earlier.get(key))
    elif round_files(out):
        other = "without a config.json"
    if other and not overwrite:
        raise UserError(f"{out} holds another run ({other}); choose another --out, or --overwrite")
    if other:
        for old in round_files(out) + [out / "results.csv"]:
            old.unlink(missing_ok=True)
    common.save(path, config)
    ranks.wait()


def round_files(folder):
    return [path for path in folder.glob("r*.pt") if path.stem[1:].isdigit()]


def run_folders(folder):
    """The folders with results.csv of one run: the seeds' below it, or itself. Raises UserError."""
    folder = Path(folder)
    found = [p.parent for p in (*folder.glob("results.csv"), *sorted(folder.glob("seed*/results.csv")))]
    if not found:
        raise UserError(f"{folder}: no results.csv of prune.py in it, nor in seed folders below")
    return found


#############################################
#                 Pictures                  #
#############################################


def draw_runs(folders, path):
    """Fig. 2: accuracy (mean and standard deviation over seeds) and training points against sparsity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = [[read_csv(f / "results.csv") for f in run_folders(folder)] for folder in folders]
    tested = any("test_accuracy" in row for run in runs for rows in run for row in rows)
    measure = "test_accuracy" if tested else "train_accuracy"
    for i, (run, folder) in enumerate(zip(runs, folders)):
        label = tickets.family(common.load(run_folders(folder)[0] / "config.json"))
        label += f" ({len(run)} seeds)" if len(run) > 1 else ""
        style = dict(color=f"C{i}", ls=("-", "--", "-.", ":")[i % 4], marker="os^DvPX*"[i % 8], label=label)
        numbers = sorted({row["round"] for row in run[0]})
        by_round = [[row for rows in run for row in rows if row["round"] == number] for number in numbers]
        scores = [(1 - rows[0]["sparsity"], *common.mean_and_std([100 * row[measure] for row in rows]))
                  for rows in by_round if all(measure in row for row in rows)]
        if scores:
            left.errorbar(*zip(*scores), capsize=3, **style)
        seen = [(1 - row["sparsity"], row["training_points"]) for row, *_ in by_round if row["training_points"]]
        if seen:
            right.plot(*zip(*seen), **style)
    left.set_ylabel("test accuracy after training on real data (%)" if tested else "accuracy on the pruning data (%)")
    right.set_ylabel("training points seen to reach the mask")
    right.set_yscale("log")
    lowest = min(1 - row["sparsity"] for run in runs for rows in run for row in rows)
    for axes in (left, right):
        remaining_axis(axes, lowest)
        axes.grid(alpha=.3)
        if axes.has_data():
            axes.legend(fontsize=8)
    common.save(path, figure)


def remaining_axis(axes, lowest):
    """A logarithmic axis of the fraction of weights remaining, dense at the left, labelled as the field does."""
    ticks = [.8 ** n for n in range(1 + round(math.log(lowest, .8)))]
    ticks = ticks[::math.ceil(len(ticks) / 11)]
    axes.set_xscale("log")
    axes.set_xlim(1.08, lowest * .92)
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{100 * t:.3g}" for t in ticks])
    axes.set_xlabel("weights remaining (%)")


#############################################
#             Comparing two runs            #
#############################################


def overlap(a, b):
    """Surviving weights shared by two masks of one layer against independent masks of the same densities.

    Returns (n, survivors of a, of b, shared, expected, variance); the last two are the hypergeometric ones.
    """
    n, k, m = a.numel(), int(a.sum()), int(b.sum())
    variance = k * m * (n - k) * (n - m) / (n * n * max(n - 1, 1))
    return n, k, m, int((a & b).sum()), k * m / n, variance


def compare_rounds(one, other):
    """Rows, one a layer and one in all, of two mask files' sparsities and overlap. Raises UserError."""
    if {n: m.shape for n, m in one["masks"].items()} != {n: m.shape for n, m in other["masks"].items()}:
        raise UserError(f"the two runs prune different networks: {one['config']['model']}, {other['config']['model']}")
    counts = {name: overlap(one["masks"][name].cpu(), other["masks"][name].cpu()) for name in one["masks"]}
    counts["all"] = tuple(map(sum, zip(*counts.values())))
    rows = []
    for name, (n, k, m, shared, expected, variance) in counts.items():
        rows.append({"round": one["round"], "layer": name, "weights": n, "sparsity_a": 1 - k / n,
                     "sparsity_b": 1 - m / n, "shared": shared, "expected": round(expected, 2),
                     "ratio": shared / expected if expected else math.nan,
                     "z": (shared - expected) / math.sqrt(variance) if variance else 0.})
    return rows


def compare(folder_a, folder_b, out):
    """Sec. 6: overlap of two runs' masks in all rounds they share: compare.csv, compare.png, a table of the last."""
    folders = Path(folder_a), Path(folder_b)
    numbers = [{int(path.stem[1:]) for path in round_files(folder)} for folder in folders]
    shared = sorted((numbers[0] & numbers[1]) - {0})
    if not shared:
        raise UserError(f"{folder_a} and {folder_b} have no pruning round in common (r1.pt, r2.pt, ...)")
    rows = [row for n in shared for row in compare_rounds(*(tickets.load_mask(f / f"r{n}.pt") for f in folders))]
    common.save_csv(out / "compare.csv", rows)
    last = [row for row in rows if row["round"] == shared[-1]]
    draw_comparison(rows, last, (folder_a, folder_b), out / "compare.png")
    print(f"round {shared[-1]}; A = {folder_a}, B = {folder_b}")
    print("layer                       weights sparsity A sparsity B    shared    expected  ratio        z")
    for row in last:
        print("{layer:<24} {weights:>10,} {sparsity_a:>10.2%} {sparsity_b:>10.2%} {shared:>9,} {expected:>11,.1f} "
              "{ratio:>6.3f} {z:>8.1f}".format(**row))
    print(f"written: {out / 'compare.csv'}, {out / 'compare.png'}")


def draw_comparison(rows, last, folders, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [row["layer"].removesuffix(".weight") for row in last]
    positions = range(len(layers))
    remaining = {row["round"]: 1 - row["sparsity_a"] for row in rows if row["layer"] == "all"}
    for side, column, folder, hatch in ((-.2, "sparsity_a", folders[0], ""), (.2, "sparsity_b", folders[1], "//")):
        heights = [100 * row[column] for row in last]
        left.bar([p + side for p in positions], heights, .4, label=str(folder), hatch=hatch, edgecolor="white")
    left.set_xticks(positions, layers, rotation=45 if len(layers) < 8 else 90, ha="right", fontsize=8)
    left.set_ylabel(f"sparsity in round {last[0]['round']} (%)")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(.5, 1), ncols=2)
    for layer, style in zip([row["layer"] for row in last], ("-", "--", "-.", ":") * len(last)):
        series = [(remaining[row["round"]], row["ratio"]) for row in rows if row["layer"] == layer]
        total = layer == "all"
        right.plot(*zip(*series), "ko-" if total else style, lw=2 if total else 1, label=layer.removesuffix(".weight"))
    right.axhline(1, color="grey", lw=.8)
    remaining_axis(right, min(remaining.values()))
    right.set_ylabel("shared survivors / expected if independent")
    if len(layers) < 12:
        right.legend(fontsize=8)
    common.save(path, figure)


#############################################
#                Command line               #
#############################################


def rate(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"--rate {text}: must lie between 0 and 1, both excluded")
    return value


def parse(argv=None):
    parser = common.Parser(__doc__)
    flag = parser.add_argument_group("data").add_argument
    flag("--data", choices=("distilled", "real", "subset", "random"), default="distilled", help="pruned on (distilled)")
    flag("--dataset", help=f"{', '.join(splits.DATASETS)}, or a folder with {{train,test}}.npz or "
                           "{train,val}/<class>/ images (cifar10)")
    flag("--data-dir", default="data", help="folder searched for <dataset>/, and downloaded to (data)")
    flag("--image-size", type=positive, help="side in pixels of images in class folders (the dataset's)")
    flag("--train-images", type=positive, help="use only so many real training images (paper: all, quick: 10000)")
    flag("--ipc", type=positive, default=10, help="images a class in the distilled set, or drawn for the subset (10)")
    flag("--distilled", metavar="PATH", help="distilled set: EDC, DSA/DC/DM, KIP, MTT, PNG class folders or contact "
                                             "sheet (the embedded one)")
    flag("--factor", type=positive, help="tiles along a side of a distilled image (as the file beside it says, or 1)")
    flag = parser.add_argument_group("network").add_argument
    flag("--model", help="convnet3, resnet10, resnet18 or package.module:callable (paper: resnet18, quick: convnet3)")
    flag("--width", type=positive, help="channels of the first layer, scales all (convnet3: 128, in quick 32; resnets: "
                                        "32, above 64 pixels 64)")
    flag("--norm", choices=("instance", "batch", "none"), help="normalisation (convnet3: instance, resnets: batch)")
    flag = parser.add_argument_group("pruning").add_argument
    flag("--rounds", type=positive, default=10, help="the last round; those of a --start mask count (10)")
    flag("--rate", type=rate, default=.2, help="fraction of the remaining weights removed in a round (0.2)")
    flag("--scope", choices=("global", "layer"), default="global", help="rank weights over all layers or in each")
    flag("--rewind", type=at_least(0), default=0, metavar="K",
         help="rewind to epoch K of dense training on real data (0: initialisation)")
    flag("--rewind-what", choices=("all", "weights"), default="all",
         help="everything, or only conv and linear weights as the paper's code does (all)")
    flag("--start", metavar="MASK", help="go on from this mask file, e.g. IMP from a distilled mask (Fig. 7)")
    flag("--evaluate", nargs="*", type=at_least(0), metavar="ROUND",
         help="train the subnetworks, of these rounds or of all, on real data and report their test accuracy")
    flag = parser.add_argument_group("training").add_argument
    flag("--preset", choices=PRESETS, help="the paper's settings, or a scaled-down run (paper with CUDA, else quick)")
    flag("--epochs", type=positive, help="of a pruning round (paper: 1000 distilled and subset, 300 real; quick: as "
                                         "many as show 24000 images, 120000 real ones)")
    flag("--eval-epochs", type=positive, help="of a subnetwork on real data (paper: 300; quick: 120000 images)")
    flag("--lr", type=within(0),
         help="learning rate, times 0.2 at 2/3 and 5/6 of the epochs (paper: 0.01, quick: 0.02)")
    flag("--momentum", type=within(0, 1), default=.9, help="(0.9)")
    flag("--weight-decay", type=within(0), default=5e-4, help="(0.0005)")
    flag("--batch-size", type=positive, default=64, help="(64)")
    flag("--augment", choices=("dsa", "imagenet", "none"), help="augmentation (dsa; imagenet above 64 pixels)")
    flag("--cutmix", type=within(0, 1), help="probability of CutMix (0.5; 1 above 64 pixels)")
    flag("--sparse", choices=("auto", "on", "off"), default="auto",
         help="skip pruned weights on a CPU: where it is faster, always or never (auto)")
    flag("--amp", action="store_true", help="train in bfloat16")
    flag("--compile", action="store_true", help="run the training step through torch.compile")
    flag("--seed", type=int, default=0, help="fixes initialisation, order and augmentation (0)")
    flag("--seeds", type=int, nargs="+", help="several runs, each in its own folder <out>/seed<S>")
    flag("--device", help="(cuda when there is one, else cpu)")
    flag("--parallel", choices=("seeds", "data"), default="seeds",
         help="under torchrun: ranks run different seeds, or train together, each on a slice of every batch (seeds)")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=common.folder, default=Path("masks"),
         help="folder of masks, results.csv, config.json, prune.png (masks)")
    flag("--overwrite", action="store_true", help="replace another run in --out")
    flag("--plot", nargs="+", metavar="DIR", help="draw finished runs together in <out>/prune.png, without training")
    flag("--compare", nargs=2, metavar="DIR", help="overlap of two finished runs' masks in <out>/compare.csv and .png")
    return parser.parse_args(argv)


def settings(args, preset):
    """The config of a run: flags, else those of the --start mask for the network, else the preset."""
    config = dict(PRESETS[preset], dataset="cifar10", norm=None, image_size=None)
    started = common.load(args.start) if args.start else {}
    if isinstance(started, dict) and "config" in started:
        config |= {key: started["config"].get(key) for key in ("model", "width", "norm", "dataset", "image_size")}
    config |= {key: getattr(args, key) for key in config if getattr(args, key) is not None}
    config |= {key: getattr(args, key) for key in (
        "data", "ipc", "factor", "distilled", "rounds", "rate", "scope", "rewind", "rewind_what", "start", "momentum",
        "weight_decay", "batch_size", "augment", "cutmix", "sparse", "amp", "compile")}
    if config["start"] and config["rewind"]:
        raise UserError("--rewind with --start: the mask file already holds its rewind point")
    return config


def load_data(config, data_dir, device, needs_real):
    """(distilled split or None, real (train, test) or None); fills in the config's image shape and augmentation."""
    known = splits.DATASETS.get(config["dataset"])
    real = splits.load_real(config, data_dir, device) if needs_real or not known else None
    if not real:
        config |= {key: getattr(known, key) for key in ("channels", "num_classes", "flip")}
        config["image_size"] = config["image_size"] or known.image_size
    large = config["image_size"] > 64
    config["augment"] = config["augment"] or ("imagenet" if large else "dsa")
    config["cutmix"] = (1. if large else .5) if config["cutmix"] is None else config["cutmix"]
    if config["data"] != "distilled":
        return None, real
    path = config["distilled"] or splits.embedded_distilled(config["dataset"], config["ipc"])
    statistics = (real[0].mean, real[0].std) if real else (known.mean, known.std)
    shape = splits.Dataset(config["channels"], config["image_size"], config["num_classes"], *statistics)
    return splits.load_distilled(path, shape, config["ipc"], config["factor"], device), real


def fill_in_epochs(config, preset, distilled, real):
    """The preset's epochs where no flag names them: the paper's, or as many as show QUICK_IMAGES images."""
    trained = len(real[0]) if real else splits.DATASETS[config["dataset"]].train_size
    trained = min(config["train_images"] or trained, trained)
    subset = config["ipc"] * config["num_classes"]
    searched = {"distilled": len(distilled or ()), "real": trained}.get(config["data"], subset)
    for key, data, images in (("epochs", config["data"], searched), ("eval_epochs", "real", trained)):
        if config[key] is None:
            config[key] = EPOCHS[data] if preset == "paper" else math.ceil(QUICK_IMAGES[data] / images)
    if config["rewind"] > config["eval_epochs"]:
        raise UserError(f"--rewind {config['rewind']}: real training has only {config['eval_epochs']} epochs")


def with_global_batchnorm(model):
    """`model` with the statistics of BatchNorm over the batches of all ranks. Raises UserError on a CPU."""
    found = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if found and next(model.parameters()).device.type == "cpu":
        raise UserError("--parallel data: BatchNorm over several processes needs GPUs; on a CPU take --norm instance")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def run_seed(config, out, args, distilled, real, device):
    """One run of one seed, from the checks to the picture."""
    data = {"distilled": distilled, "real": real and real[0]}.get(config["data"])
    if config["data"] == "subset":
        data = random_subset(real[0], config["ipc"], config["num_classes"], random_stream(config["seed"], "subset"))
    model = common.build_network(config, config["seed"]).to(device)
    if ranks.together.get().size > 1:
        model = with_global_batchnorm(model)
    start = tickets.load_mask(args.start, config, device) if args.start else None
    if start and {n: m.shape for n, m in start["masks"].items()} != {n: w.shape for n, w in prunable(model).items()}:
        raise UserError(f"{args.start}: its masks are of another network than {config['model']}")
    prepare_folder(out, config, args.overwrite)
    evaluate = range(config["rounds"] + 1) if args.evaluate == [] else args.evaluate or ()
    rows = find_masks(model, config, out, data, real, start, evaluate)
    if ranks.together.get().rank == 0:
        print_table(rows)
        draw_runs([out], out / "prune.png")


def main(argv=None):
    args = parse(argv)
    if args.plot:
        draw_runs(args.plot, args.out / "prune.png")
        return print(f"written: {args.out / 'prune.png'}")
    if args.compare:
        return compare(*args.compare, args.out)
    device = common.choose_device(args.device)
    preset = args.preset or ("paper" if device.type == "cuda" else "quick")
    config = settings(args, preset)
    needs_real = args.evaluate is not None or config["data"] in ("real", "subset") or config["rewind"]
    distilled, real = load_data(config, args.data_dir, device, needs_real)
    fill_in_epochs(config, preset, distilled, real)
    if args.parallel == "data" and args.compile:
        raise UserError("--parallel data with --compile: the ranks meet in the middle of a step; choose one of them")
    print(f"preset {preset} ({'as asked' if args.preset else f'device {device.type}'}): {config['model']} on "
          f"{config['dataset']}, {config['data']} data, {config['rounds']} rounds of {config['epochs']} epochs")
    seeds = args.seeds or [args.seed]
    for seed in seeds if args.parallel == "data" else ranks.share(seeds, "rounds of all seeds", config["rounds"] + 1):
        out = args.out / f"seed{seed}" if args.seeds else args.out
        run_seed(config | {"seed": seed}, out, args, distilled, real, device)
    print(f"written: masks, results.csv, config.json and prune.png in {args.out}")


if __name__ == "__main__":
    common.run(main)
