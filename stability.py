"""Linear mode connectivity of subnetworks: Figures 3, 4 and 6 of the paper.

    python stability.py --mask masks/r8.pt                                           one subnetwork
    python stability.py --mask masks_real/r*.pt --compare masks_distilled            IMP next to synthetic (Figs. 3, 4)
    python stability.py --summary runs/stability                                     Fig. 6, from these results
    python stability.py --dataset digits                                             offline demonstration, 2 minutes

Train a subnetwork on real data from its initial weights under two data orders, walk the straight line between the two
trained networks, (1 - alpha) A + alpha B in every parameter and buffer, and see whether the loss rises on the way. For
v(alpha), a loss or an error,

    barrier           max over alpha of v(alpha) - [(1 - alpha) v(0) + alpha v(1)]      Entezari et al. 2022, Def. 3.1
    midpoint_barrier  v(1/2) - [v(0) + v(1)] / 2                                        the paper, Fig. 6

and the verdict is `stable`, one basin whatever the order, when the barrier of the test error is under 2% (Frankle et
al. 2020, Sec. 2; they subtract the mean of the ends, the same when the ends are equal).

Written to --out: end points (landscape.py and hessian.py take them from there), a JSON a mask, stability.csv of all of
them, stability.png, stability_surface.png. The same command again goes on where it stopped, or only redraws.
"""
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import ranks
import splits
import tickets
from common import UserError, at_least, mean_and_std

FORMAT = "lottery-stability-1"

#############################################
#            Lines and barriers             #
#############################################


def barrier(values):
    """Height of a curve, given at equally spaced alphas, over its chord; 0 when it lies below."""
    values, alphas = np.asarray(values), np.linspace(0, 1, len(values))
    return float(np.max(values - ((1 - alphas) * values[0] + alphas * values[-1])))


def midpoint_barrier(values):
    """Value at alpha = 1/2 (between two neighbours when the number of points is even) minus the mean of the ends."""
    return float(np.interp(.5, np.linspace(0, 1, len(values)), values) - (values[0] + values[-1]) / 2)


def barriers(pair):
    """{barrier_train_loss, ..., midpoint_barrier_test_error}: both barriers of a pair's losses and errors."""
    return {f"{height.__name__}_{name}": height(pair[name]) for height in (barrier, midpoint_barrier)
            for name in ("train_loss", "train_error", "test_loss", "test_error")}


def walk(model, a, b, splits, points, mask=None, refresh=None, sparse="auto"):
    """{"<train|test>_<loss|loss_se|accuracy|error>": [points]} along the line from state `a` to state `b`.

    splits = (train, test); loss_se is the standard error of the mean loss. `mask` is applied at every point; None for
    end points that are masked already, each by its own. `refresh`, a split, re-estimates BatchNorm's statistics at
    every point. `model` is scratch space.
    """
    coefficients = [(1 - alpha, alpha) for alpha in np.linspace(0, 1, points)]
    with tqdm(total=points, desc="the line", unit="point", disable=None, leave=False) as bar:
        line = common.evaluate_points(model, [a, b], coefficients, splits, mask, refresh, bar.update, sparse)
    curves = defaultdict(list)
    for scores in line:
        for part, score in zip(("train", "test"), scores):
            curves[f"{part}_loss"].append(score.loss)
            curves[f"{part}_loss_se"].append(score.loss_error)
            curves[f"{part}_accuracy"].append(score.accuracy)
            curves[f"{part}_error"].append(1 - score.accuracy)
    return curves


#############################################
#      Weight matching by permutation       #
#############################################


def permutation_groups(model):
    """Lists of (tensor name, axis) whose units may be relabelled together without changing the network's function.

    Norms, ReLU and pooling act on each channel alone, so a group is what makes a channel (axis 0) and what reads it
    (axis 1); channels that a residual addition ties together form one group. Raises UserError for other networks.
    """
    state = model.state_dict()

    def units(conv, norm):
        parts = ("weight", "bias", "running_mean", "running_var")
        names = [f"{module}.{part}" for module in (conv, norm) for part in parts]
        return [(name, 0) for name in names if name in state]

    if isinstance(model, common.ConvNet3):
        readers = ("conv2.weight", "conv3.weight", "linear.weight")
        return [units(f"conv{i}", f"norm{i}") + [(reader, 1)] for i, reader in enumerate(readers, 1)]
    if not isinstance(model, common.ResNet):
        raise UserError("--align knows the units of convnet3, resnet10 and resnet18 only")
    groups, stream = [], units("conv1", "norm1")
    for name, block in model.named_children():
        if isinstance(block, common.BasicBlock):
            groups.append(units(f"{name}.conv1", f"{name}.norm1") + [(f"{name}.conv2.weight", 1)])
            stream.append((f"{name}.conv1.weight", 1))
            if len(block.shortcut):
                groups.append(stream + [(f"{name}.shortcut.conv.weight", 1)])
                stream = units(f"{name}.shortcut.conv", f"{name}.shortcut.norm")
            stream += units(f"{name}.conv2", f"{name}.norm2")
    return groups + [stream + [("linear.weight", 1)]]


def permute(state, group, order):
    """`state` with the units of `group` in a new order; an axis that flattens pixels moves them in blocks."""
    n, order = len(order), torch.as_tensor(order, device=state[group[0][0]].device)
    return state | {name: state[name].unflatten(axis, (n, -1)).index_select(axis, order).flatten(axis, axis + 1)
                    for name, axis in group}


def similarity(a, b, group):
    """Inner products [n, n] of all weights of unit i in `a` with those of unit j in `b`, float64."""
    n = len(a[group[0][0]])

    def rows(state, name, axis):
        return state[name].double().unflatten(axis, (n, -1)).movedim(axis, 0).reshape(n, -1)

    return sum(rows(a, name, axis) @ rows(b, name, axis).T for name, axis in group if "running" not in name)


def assignment(cost):
    """The column of each row that minimises the total of a square cost [n, n]: exact, O(n^3).

    Shortest augmenting paths with dual prices (Jonker & Volgenant 1987); SciPy's linear_sum_assignment is the same.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, int)  # of each column, rows counted from 1; column 0 holds the row to be placed
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        shortest, previous, done = np.full(n + 1, np.inf), np.zeros(n + 1, int), np.zeros(n + 1, bool)
        while row_of[column]:
            done[column] = True
            current = row_of[column]
            reduced = np.r_[np.inf, cost[current - 1] - row_price[current] - column_price[1:]]
            better = ~done & (reduced < shortest)
            shortest[better], previous[better] = reduced[better], column
            column = int(np.where(done, np.inf, shortest).argmin())
            step = shortest[column]
            row_price[row_of[done]] += step
            column_price[done] -= step
            shortest[~done] -= step
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return row_of[1:].argsort()


def match_weights(a, b, groups, generator):
    """State `b` with its units relabelled to lie near `a`: Ainsworth et al. 2023, Algorithm 1.

    One group at a time, in random order, gets its best permutation given the others, until none improves. Masked
    weights move with their units, so the mask of the result is the permuted mask.
    """
    improved = True
    while improved:
        improved = False
        for index in torch.randperm(len(groups), generator=generator).tolist():
            gains = similarity(a, b, groups[index]).cpu().numpy()
            order = assignment(-gains)
            if gains[np.arange(len(order)), order].sum() > np.trace(gains) + 1e-9 * np.abs(gains).max():
                b, improved = permute(b, groups[index], order), True
    return b


#############################################
#              The experiment               #
#############################################


def measure(path, subnetwork, train, test, settings, out, overwrite=False):
    """Train (or reuse) the end points of one subnetwork, walk between each pair; the result, saved as JSON.

    With settings["align"] the second end point of a pair is relabelled first. The two masks then differ, and a point
    on the line is a combination of two masked networks: its support is the union of theirs.
    """
    config, pairs = subnetwork["config"], []
    model = common.build_network(config).to(train.labels.device)
    groups = permutation_groups(model) if settings["align"] else None
    states = [tickets.endpoint(out, path, subnetwork, train, order, settings["epochs"], settings["seed"],
                               settings["from_epoch"], overwrite)["state"] for order in range(settings["orders"])]
    file = tickets.result_path(out, path, "_aligned.json" if settings["align"] else ".json")
    if file.exists() and (earlier := common.load(file)).get("settings") == settings:
        return earlier
    evaluated = [splits.fixed_subset(split, settings["eval_images"], "evaluate") for split in (train, test)]
    refresh = splits.fixed_subset(train, 2000, "batchnorm") if settings["bn"] == "recompute" else None
    for (i, a), (j, b) in itertools.combinations(enumerate(states), 2):
        mask = subnetwork["masks"]
        if groups:
            b, mask = match_weights(a, b, groups, common.random_stream(settings["seed"], "align", i, j)), None
        pair = walk(model, a, b, evaluated, settings["points"], mask, refresh, settings["sparse"])
        pairs.append({"orders": f"{i}-{j}"} | pair | barriers(pair))
    result = name_of(path, subnetwork, settings) | dict(format=FORMAT, settings=settings, config=config, pairs=pairs)
    common.save(file, result)
    return result


def measure_ahead(jobs, train, test, args):
    """Under torchrun: the end points, then the lines, shared out over the ranks; the results are found finished."""
    if ranks.together.get().size == 1:
        return
    jobs = [job for i, job in enumerate(jobs) if job[2] not in [settings for _, _, settings in jobs[:i]]]
    tickets.train_ahead(args.out, {path: subnetwork for path, subnetwork, _ in jobs}, train, args.orders,
                        args.epochs, args.seed, args.from_epoch, args.overwrite)
    for path, subnetwork, settings in ranks.share(jobs, "lines of all masks"):
        measure(path, subnetwork, train, test, settings, args.out)


def name_of(path, subnetwork, settings):
    """What tables and legends say about a result."""
    family = tickets.family(subnetwork["config"]) + ", aligned" * settings["align"]
    return {"mask": str(path), "family": family, "round": subnetwork["round"], "sparsity": subnetwork["sparsity"]}


def settings_of(args, subnetwork, train):
    """All that a result depends on; a result with equal settings is not computed again."""
    config = subnetwork["config"]
    epochs, seed = args.epochs or config["eval_epochs"], config["seed"] if args.seed is None else args.seed
    if args.from_epoch >= epochs:
        raise UserError(f"--from-epoch {args.from_epoch}: must be less than the {epochs} epochs of training")
    chosen = {key: getattr(args, key) for key in ("orders", "points", "from_epoch", "bn", "align", "eval_images")}
    return {"model": config["model"], "dataset": config["dataset"], "images": len(train), "seed": seed,
            "mask_sha": tickets.fingerprint(subnetwork), **common.recipe_of(config, epochs)._asdict(), **chosen}


#############################################
#                  Results                  #
#############################################


def over_pairs(results, name):
    """A number or curve of every pair of several results, [pairs] or [pairs, points]."""
    return np.array([pair[name] for result in results for pair in result["pairs"]])


def end_accuracy(results):
    """Test accuracy of the trained networks themselves, the mean of the two ends for each pair."""
    return over_pairs(results, "test_accuracy")[:, [0, -1]].mean(1)


def grouped(results):
    """{(family, percent sparse): results} in order; masks of several seeds fall together."""
    groups = defaultdict(list)
    for result in sorted(results, key=lambda result: (result["family"], result["sparsity"])):
        groups[result["family"], round(100 * result["sparsity"], 1)].append(result)
    return groups


def print_result(result):
    """The curves of one subnetwork, pair by pair, and the verdict in one line."""
    print(f"\n{result['mask']}: {result['family']}, {result['sparsity']:.1%} sparse")
    for pair in result["pairs"]:
        print(f"orders {pair['orders']:<4} {'train loss':>18} {'train acc':>9} {'test loss':>18} {'test acc':>9}")
        curves = (pair[f"{part}_{value}"] for part in ("train", "test") for value in ("loss", "loss_se", "accuracy"))
        for row in zip(np.linspace(0, 1, len(pair["train_loss"])), *curves):
            print("alpha {:<5.2f} {:>9.4f} ± {:.4f} {:>9.2%} {:>9.4f} ± {:.4f} {:>9.2%}".format(*row))
    error, loss, middle = (over_pairs([result], name).mean() for name in
                           ("barrier_test_error", "barrier_train_loss", "midpoint_barrier_train_loss"))
    verdict = f"stable, {error:.2%} < 2%" if error < .02 else f"NOT stable, {error:.2%} >= 2%"
    print(f"test error barrier: {verdict}; train loss barrier {loss:.4f}, at the midpoint {middle:.4f}")


def print_spread(results):
    """Barriers of each family and sparsity, mean and standard deviation over pairs and seeds."""
    print("\nfamily                       sparsity pairs train loss barrier  test error barrier    test accuracy")
    for (name, percent), group in grouped(results).items():
        columns = over_pairs(group, "barrier_train_loss"), over_pairs(group, "barrier_test_error"), end_accuracy(group)
        cells, name = itertools.chain(*map(mean_and_std, columns)), name if percent else f"dense ({name})"
        print("{:<28} {:>7g}% {:>5} {:>9.4f} ± {:.4f} {:>10.2%} ± {:>6.2%} {:>8.2%} ± {:>5.2%}".format(
            name, percent, len(columns[0]), *cells))


def table_rows(results):
    """A row for each pair of each result, for stability.csv."""
    return [{key: result[key] for key in ("mask", "family", "round", "sparsity")} | result["settings"]
            | {"orders": pair["orders"], "test_accuracy": end_accuracy([{"pairs": [pair]}])[0]} | barriers(pair)
            for result in results for pair in result["pairs"]]


def read_results(items):
    """Results of JSON files, and of all JSON files below folders. Raises UserError for files of another kind."""
    files = [file for item in items for file in (sorted(Path(item).rglob("*.json")) if Path(item).is_dir() else [item])]
    results = {file: common.load(file) for file in files}
    foreign = [file for file, result in results.items() if result.get("format") != FORMAT]
    if foreign or not results:
        raise UserError(f"{(foreign or items)[0]}: not a result of stability.py, nor a folder of them")
    return list(results.values())


#############################################
#                 Pictures                  #
#############################################

COLOURS, MARKERS = ("#1f4e8c", "#e08214", "#4d9221", "#c51b7d"), ("o", "s", "^", "D")


def draw_lines(results, highlight, path):
    """Figs. 3 and 4, left: loss and error along alpha, highlighted rounds thick; bands: ± one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    families = list(dict.fromkeys(result["family"] for result in results))
    styles = dict(zip(sorted(highlight), itertools.cycle(("-", "--", "-.", ":"))))
    for (name, percent), group in grouped(results).items():
        number, place = group[0]["round"], families.index(name) % 4
        colour, marker, label = COLOURS[place], MARKERS[place], f"{name}, {percent:g}% sparse"
        if percent == 0:
            colour, marker, label = "black", None, "dense"
        look = dict(lw=2.2, ls=styles.get(number), marker=marker, markersize=5, zorder=3, label=label)
        for axes, values in zip(panels, (over_pairs(group, "train_loss"), 100 * over_pairs(group, "test_error"))):
            alphas, mean, std = np.linspace(0, 1, values.shape[1]), values.mean(0), values.std(0)
            axes.plot(alphas, mean, color=colour, **(look if number in styles else dict(lw=.9, alpha=.5)))
            axes.fill_between(alphas, mean - std, mean + std, color=colour, alpha=.12, lw=0)
    for axes, label in zip(panels, ("training loss", "test error (%)")):
        axes.set(xlabel="interpolation $\\alpha$", ylabel=label)
        axes.margins(x=.02)
        axes.grid(alpha=.3)
    handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1]))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, handlelength=4)
    common.save(path, figure)


def draw_surfaces(results, path):
    """Figs. 3 and 4, right: training loss over alpha and pruning round, a surface for each family, all on one scale."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    surfaces = defaultdict(dict)
    for (name, _), group in grouped(results).items():
        surfaces[name][group[0]["round"]] = over_pairs(group, "train_loss").mean(0)
    surfaces = {name: rounds for name, rounds in surfaces.items() if len(rounds) > 1}
    if not surfaces:
        return
    losses = over_pairs(results, "train_loss")
    scale = Normalize(losses.min(), losses.max())
    figure = Figure(figsize=(5.2 * len(surfaces) + 1, 4.8), layout="constrained")
    panels = figure.subplots(1, len(surfaces), subplot_kw={"projection": "3d"}, squeeze=False)[0]
    for axes, (name, rounds) in zip(panels, surfaces.items()):
        numbers, values = list(rounds), np.array(list(rounds.values()))
        surface = axes.plot_surface(*np.meshgrid(np.linspace(0, 1, values.shape[1]), numbers), values, cmap="viridis",
                                    norm=scale, rstride=1, cstride=1, edgecolor="black", linewidth=.3)
        axes.set(xlabel="$\\alpha$", ylabel="pruning round", zlim=(scale.vmin, scale.vmax))
        axes.set_title(name, y=.95)
        axes.view_init(elev=24, azim=-52)
        axes.set_box_aspect((1, 1, .7), zoom=1.1)
    figure.colorbar(surface, ax=list(panels), shrink=.6, pad=.1, label="training loss")
    common.save(path, figure)


def summary_rows(results):
    """{(family, compression): [(percent sparse, difference, ratio, accuracy)]} of the pruned networks, for Fig. 6.

    compression: training images a class / ipc; difference and ratio: training loss at alpha = 1/2 against the mean of
    the ends; accuracy: relative to IMP's; each (mean, std) over pairs and seeds. UserError where IMP is missing.
    """
    groups = {key: group for key, group in grouped(results).items() if group[0]["sparsity"]}
    imp = {percent: end_accuracy(group).mean() for (name, percent), group in groups.items() if name == "IMP"}
    rows = defaultdict(list)
    for (name, percent), group in groups.items():
        if percent not in imp:
            raise UserError(f"--summary divides by IMP's accuracy: no IMP (prune.py --data real) at {percent:g}%")
        config, images = group[0]["config"], group[0]["settings"]["images"]
        few = config["data"] in ("distilled", "subset")
        compression = round(images / config["num_classes"] / config["ipc"]) if few else 1
        heights, ends = over_pairs(group, "midpoint_barrier_train_loss"), over_pairs(group, "train_loss")[:, [0, -1]]
        rows[name, compression].append((percent, mean_and_std(heights), mean_and_std(1 + heights / ends.mean(1)),
                                        mean_and_std(end_accuracy(group) / imp[percent])))
    return rows


def draw_summary(rows, path):
    """Fig. 6: accuracy relative to IMP's (star) against the barrier; a marker's size grows with the compression."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylabel("test accuracy / IMP's at the same sparsity")
    for axes, column, label in zip(panels, (1, 2), ("minus the mean of the ends", "divided by the mean of the ends")):
        axes.set_xlabel(f"training loss at $\\alpha$ = 1/2 {label}")
        axes.axhline(1, color="grey", lw=.8)
        axes.grid(alpha=.3)
        axes.margins(.15)
        for place, ((name, compression), points) in enumerate(rows.items()):
            colour, marker = COLOURS[place % 4], "*" if name == "IMP" else MARKERS[place % 4]
            (x, x_spread), (y, y_spread) = (np.transpose([point[k] for point in points]) for k in (column, 3))
            axes.errorbar(x, y, y_spread, x_spread, fmt=marker + ":", color=colour, elinewidth=.8, capsize=2,
                          markersize=(60 + compression) ** .5, markeredgecolor="black", markeredgewidth=.6,
                          label=f"{name} ({compression}x fewer images)" if compression > 1 else name)
            for point, at in zip(points, zip(x, y)):
                axes.annotate(f"{point[0]:g}%", at, xytext=(9, 7), textcoords="offset points", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    common.save(path, figure)


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = common.Parser(__doc__)
    tickets.subnetwork_flags(parser)
    line = parser.add_argument_group("the line")
    line.add_argument("--compare", nargs="+", default=[], metavar="FILE", help="masks of a second family, or folder")
    line.add_argument("--orders", type=at_least(2), default=2, help="data orders; every pair is measured (2)")
    line.add_argument("--points", type=at_least(3), default=11, help="alphas from 0 to 1, both ends included (11)")
    line.add_argument("--from-epoch", type=at_least(0), default=0, metavar="K", help="orders share K first epochs (0)")
    line.add_argument("--bn", choices=("lerp", "recompute"), default="lerp",
                      help="BatchNorm statistics: interpolated (as the paper), or of 2,000 training images (lerp)")
    line.add_argument("--align", action="store_true", help="relabel units to match first (Ainsworth et al. 2023)")
    line.add_argument("--eval-images", type=at_least(2), metavar="N", help="random N of each split (all)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=common.folder, default=Path("runs/stability"),
                        help="folder of results (runs/stability)")
    output.add_argument("--overwrite", action="store_true", help="train anew where --out holds other end points")
    output.add_argument("--highlight", type=int, nargs="+", metavar="ROUND", help="thick lines (near 0, 60, 87%%)")
    output.add_argument("--summary", nargs="+", metavar="FILE", help="draw Fig. 6 of results: JSON files, folders")
    return parser.parse_args(argv)


def summarise(items, out):
    """--summary: Fig. 6 and the table of saved results, all of one experiment."""
    results = read_results(items)
    for key in ("model", "dataset", "images", "epochs", "from_epoch", "bn"):
        if len(values := {str(result["settings"][key]) for result in results}) > 1:
            raise UserError(f"--summary: results of {key} {' and '.join(sorted(values))}; give one experiment's")
    print_spread(results)
    draw_summary(summary_rows(results), out / "summary.png")
    print(f"written: {out / 'summary.png'}")


def main():
    args = parse()
    if args.summary:
        return summarise(args.summary, args.out)
    subnetworks, train, test = tickets.load_subnetworks(args.mask + args.compare, args)
    jobs = [(path, subnetwork, settings_of(args, subnetwork, train)) for path, subnetwork in subnetworks.items()]
    measure_ahead(jobs, train, test, args)
    if ranks.together.get().rank:
        return
    results = []
    for path, subnetwork, settings in jobs:
        twin = next((result for result in results if result["settings"] == settings), None)  # both families' r0
        result = twin or measure(path, subnetwork, train, test, settings, args.out, args.overwrite)
        results.append(result | name_of(path, subnetwork, settings))
        print_result(results[-1])
    print_spread(results)
    common.save_csv(args.out / "stability.csv", table_rows(read_results([args.out])))
    nearest = {min(results, key=lambda result: abs(result["sparsity"] - wanted))["round"] for wanted in (0, .6, .87)}
    draw_lines(results, args.highlight or nearest, args.out / "stability.png")
    draw_surfaces(results, args.out / "stability_surface.png")
    print(f"written: end points, results, stability.csv and pictures in {args.out}")


if __name__ == "__main__":
    common.run(main)
