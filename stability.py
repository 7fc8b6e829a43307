"""Linear mode connectivity of tickets: Figures 3, 4 and 6 of the paper.

    python stability.py --mask masks/r8.pt                                           one ticket
    python stability.py --mask masks_real/r*.pt --compare masks_distilled            IMP next to synthetic (Figs. 3, 4)
    python stability.py --summary runs/stability                                     Fig. 6, from these results
    python stability.py --dataset digits                                             offline demonstration, 2 minutes

Train a ticket on real data from its initial weights in two data orders, follow the straight line between the two
endpoints, (1 - alpha) A + alpha B in every parameter and buffer, and see whether the loss rises on the way. For
v(alpha), a loss or an error,

    barrier           max over alpha of v(alpha) - [(1 - alpha) v(0) + alpha v(1)]      Entezari et al. 2022, Def. 3.1
    midpoint_barrier  v(1/2) - [v(0) + v(1)] / 2                                        the paper, Fig. 6

and the verdict is `stable`, one basin whatever the order, when the barrier of the test error is under 2% (Frankle et
al. 2020, Sec. 2; they subtract the mean of the ends, the same when the ends are equal).

Written to --out: endpoints (landscape.py and hessian.py take them from there), a JSON a ticket, stability.csv of all of
them, stability.png, stability_surface.png. The same command again goes on where it stopped, or only redraws.

As a library, for two states of a network: line(model, state_a, state_b, [train, test]), and barrier of its curves.
"""
if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while PyTorch is imported

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np

from common import cli, evaluation, files, ranks, tickets
from common.bars import Bar
from common.data import fixed_subset
from common.endpoints import Endpoints, check_apart
from common.errors import UserError
from common.figures import figure_of, style_of
from common.matching import match_weights
from common.networks import build_network
from common.streams import random_stream
from common.symmetries import permutation_groups

FORMAT = "lottery-stability-1"

#############################################
#            Lines and barriers             #
#############################################


def barrier(values):
    """Height of a curve, given at equally spaced alphas, over its chord; 0 when it lies below."""
    values = np.asarray(values)
    alphas = np.linspace(0, 1, len(values))
    return float(np.max(values - ((1 - alphas) * values[0] + alphas * values[-1])))


def midpoint_barrier(values):
    """Value at alpha = 1/2 (between two neighbours when the number of points is even) minus the mean of the ends."""
    return float(np.interp(.5, np.linspace(0, 1, len(values)), values) - (values[0] + values[-1]) / 2)


def barriers(curves):
    """{barrier_train_loss, ..., midpoint_barrier_test_error}: both barriers of a line's losses and errors."""
    return {f"{height.__name__}_{curve}": height(curves[curve]) for height in (barrier, midpoint_barrier)
            for curve in ("train_loss", "train_error", "test_loss", "test_error")}


def line(model, a, b, parts, points=11, mask=None, refresh=None):
    """{"<train|test>_<loss|loss_se|accuracy|error>": [points]} along the line from state `a` to state `b`.

    `parts`: [train, test], two splits, or the first alone; loss_se is the standard error of the mean loss. `model`, of
    the same architecture, is scratch space, so not one of the two. `mask` is applied at every point; None for
    states that are masked already, each by its own. `refresh`, a split, re-estimates BatchNorm's statistics at every
    point; without it they are interpolated like the weights.
    """
    coefficients = [(1 - alpha, alpha) for alpha in np.linspace(0, 1, points)]
    with Bar("the line", points, unit="point") as bar:
        scores = evaluation.evaluate_points(model, [a, b], coefficients, parts, mask, refresh, bar.update)
    curves = {}
    for part, along in zip(("train", "test"), zip(*scores)):
        curves[f"{part}_loss"] = [score.loss for score in along]
        curves[f"{part}_loss_se"] = [score.loss_error for score in along]
        curves[f"{part}_accuracy"] = [score.accuracy for score in along]
        curves[f"{part}_error"] = [1 - score.accuracy for score in along]
    return curves


#############################################
#              The experiment               #
#############################################


def measure(endpoints, path, test, settings):
    """Save the result of the ticket in the file `path`, the lines between its endpoints, unless it is there already."""
    ticket, train = endpoints.ticket_at[path], endpoints.split
    model = build_network(ticket["config"]).to(train.labels.device)
    groups = None
    if settings["align"]:
        groups = permutation_groups(model, train.batch(slice(2))[0])  # an error comes before the training
    states = [endpoints.state(path, order) for order in range(settings["orders"])]
    file = result_file(endpoints, path)
    if file.exists() and read_result(file)["settings"] == settings:
        return
    pairs = lines(model, states, ticket["masks"], groups, train, test, settings)
    files.save(file, about(path, ticket) | dict(format=FORMAT, settings=settings, pairs=pairs))


def lines(model, states, mask, groups, train, test, settings):
    """A dict for each pair of states: its orders, the curves of the line between them, their barriers.

    With `groups` the second state of a pair is relabelled first. The two masks then differ, and a point on the line is
    a combination of two masked networks: its support is the union of theirs.
    """
    parts = [fixed_subset(split, settings["eval_images"], "evaluate") for split in (train, test)]
    refresh = fixed_subset(train, 2000, "batchnorm") if settings["bn"] == "recompute" else None
    pairs = []
    for (i, a), (j, b) in itertools.combinations(enumerate(states), 2):
        if groups:
            b = match_weights(a, b, groups, random_stream(settings["seed"], "align", i, j))
        curves = line(model, a, b, parts, settings["points"], None if groups else mask, refresh)
        evaluation.check_losses(curves["train_loss"] + curves["test_loss"], f"the line between orders {i} and {j}")
        pairs.append({"orders": f"{i}-{j}"} | curves | barriers(curves))
    return pairs


def result_file(endpoints, path):
    return Path(endpoints.folder, f"{endpoints.names[path]}{'_aligned' if endpoints.args.align else ''}.json")


def settings_of(endpoints, path):
    """All that a result depends on; a result with equal settings is not computed again."""
    args, config, recipe = endpoints.args, endpoints.ticket_at[path]["config"], endpoints.recipe(path)
    if args.from_epoch >= recipe.epochs:
        raise UserError(f"--from-epoch {args.from_epoch}: must be less than the {recipe.epochs} epochs of training")
    settings = {"model": config["model"], "dataset": config["dataset"], "images": len(endpoints.split),
                "seed": endpoints.seed(path), "mask_sha": tickets.fingerprint(endpoints.ticket_at[path]),
                "data_fingerprint": config.get("data_fingerprint"), **recipe._asdict()}
    chosen = ("orders", "points", "from_epoch", "bn", "align", "eval_images")
    return settings | {key: getattr(args, key) for key in chosen}


def about(path, ticket):
    """What tables and legends say about a result."""
    return {"mask": str(path)} | {key: ticket[key] for key in ("round", "sparsity", "config")}


#############################################
#                  Results                  #
#############################################


def read_result(file):
    """The result in a JSON file. Raises UserError for a file of another kind."""
    result = files.load_format(file, FORMAT, "not a result of stability.py, nor a folder of them")
    for key in ("sparse", "compile"):  # of earlier versions: how a step was computed, no more than rounding
        result["settings"].pop(key, None)
    return result


def read_results(items):
    """Results of JSON files, and of those below folders that are results. Raises UserError for any other file."""
    found = []
    for item in map(Path, items):
        found += [file for file in sorted(item.rglob("*.json")) if is_result(file)] if item.is_dir() else [item]
    if not found:
        raise UserError(f"{items[0]}: not a result of stability.py, nor a folder of them")
    return [read_result(file) for file in dict.fromkeys(found)]


def is_result(file):
    held = files.load(file)
    return isinstance(held, dict) and held.get("format") == FORMAT


def named(results):
    """Results with their "family": what differs between them, the seed apart, is in its name."""
    own = {"model", "dataset", "mask_sha", "seed", "align"}  # not of how endpoints were trained and measured
    configs = []
    for result in results:
        settings = {f"endpoints' {key}": value for key, value in result["settings"].items() if key not in own}
        configs.append(result["config"] | settings)
    ending = {True: ", aligned", False: ""}
    return [result | {"family": family + ending[result["settings"]["align"]]}
            for result, family in zip(results, tickets.family_names(configs))]


def over_pairs(results, curve):
    """A number or curve of every pair of several results, [pairs] or [pairs, points]."""
    return np.array([pair[curve] for result in results for pair in result["pairs"]])


def mean_of_ends(results, curve):
    """What a curve is at the endpoints themselves, the mean of the two for each pair."""
    return over_pairs(results, curve)[:, [0, -1]].mean(1)


def grouped(results):
    """{(family, percent sparse): results} in order; tickets of several seeds fall together, and a copy counts once."""
    groups = defaultdict(list)
    for result in sorted(results, key=lambda result: (result["family"], result["sparsity"])):
        group = groups[result["family"], round(100 * result["sparsity"], 1)]
        if all(other["settings"] != result["settings"] for other in group):
            group.append(result)
    return groups


def table_rows(results):
    """A row for each pair of each result, for stability.csv."""
    rows = []
    for result in results:
        own = {key: result[key] for key in ("mask", "family", "round", "sparsity")} | result["settings"]
        for pair, accuracy in zip(result["pairs"], mean_of_ends([result], "test_accuracy")):
            rows.append(own | {"orders": pair["orders"], "test_accuracy": accuracy} | barriers(pair))
    return rows


def print_result(result):
    """The curves of one ticket, pair by pair, and the verdict in one line."""
    print(f"\n{result['mask']}: {result['family']}, {result['sparsity']:.1%} sparse")
    for pair in result["pairs"]:
        print(f"orders {pair['orders']:<4} {'train loss':>18} {'train acc':>9} {'test loss':>18} {'test acc':>9}")
        curves = (pair[f"{part}_{value}"] for part in ("train", "test") for value in ("loss", "loss_se", "accuracy"))
        for row in zip(np.linspace(0, 1, len(pair["train_loss"])), *curves):
            print("alpha {:<5.2f} {:>9.4f} ± {:.4f} {:>9.2%} {:>9.4f} ± {:.4f} {:>9.2%}".format(*row))
    error, loss, middle = (over_pairs([result], height).mean() for height in
                           ("barrier_test_error", "barrier_train_loss", "midpoint_barrier_train_loss"))
    verdict = f"stable, {error:.2%} < 2%" if error < .02 else f"NOT stable, {error:.2%} >= 2%"
    print(f"test error barrier: {verdict}; train loss barrier {loss:.4f}, at the midpoint {middle:.4f}")


def print_spread(results):
    """Barriers of each family and sparsity, mean and standard deviation over pairs and seeds."""
    print("\nfamily                       sparsity pairs train loss barrier  test error barrier    test accuracy")
    for (family, percent), group in grouped(results).items():
        heights = over_pairs(group, "barrier_train_loss"), over_pairs(group, "barrier_test_error")
        columns = *heights, mean_of_ends(group, "test_accuracy")
        cells = itertools.chain(*map(evaluation.mean_and_std, columns))
        print("{:<28} {:>7g}% {:>5} {:>9.4f} ± {:.4f} {:>10.2%} ± {:>6.2%} {:>8.2%} ± {:>5.2%}".format(
            family if percent else f"dense ({family})", percent, len(columns[0]), *cells))


#############################################
#                 Pictures                  #
#############################################


def draw_lines(results, highlight, path):
    """Figs. 3 and 4, left: loss and error along alpha, highlighted rounds thick; bands: ± one standard deviation."""
    figure, panels = figure_of(2, 5.5, 4.8)
    families = list(dict.fromkeys(result["family"] for result in results))
    styles = dict(zip(sorted(highlight), itertools.cycle(("-", "--", "-.", ":"))))
    for (family, percent), group in grouped(results).items():
        style = style_of(families.index(family), f"{family}, {percent:g}% sparse")
        if percent == 0:
            style |= dict(color="black", marker=None, label="dense")
        look = dict(color=style["color"], lw=.9, alpha=.5)
        if group[0]["round"] in styles:
            look = style | dict(lw=2.2, ls=styles[group[0]["round"]], markersize=5, zorder=3)
        for axes, values in zip(panels, (over_pairs(group, "train_loss"), 100 * over_pairs(group, "test_error"))):
            alphas, mean, std = np.linspace(0, 1, values.shape[1]), values.mean(0), values.std(0)
            axes.plot(alphas, mean, **look)
            axes.fill_between(alphas, mean - std, mean + std, color=style["color"], alpha=.12, lw=0)
    for axes, value in zip(panels, ("training loss", "test error (%)")):
        axes.set(xlabel="interpolation $\\alpha$", ylabel=value)
        axes.margins(x=.02)
        axes.grid(alpha=.3)
    curves, legends = panels[0].get_legend_handles_labels()
    by_legend = dict(zip(legends, curves))  # the dense ones of two families once
    figure.legend(by_legend.values(), by_legend, loc="outside lower center", ncols=3, fontsize=9, handlelength=4)
    files.save(path, figure)


def draw_surfaces(results, path):
    """Figs. 3 and 4, right: training loss over alpha and pruning round, a surface for each family, all on one scale."""
    from matplotlib.ticker import MaxNLocator

    surfaces = defaultdict(dict)
    for (family, _), group in grouped(results).items():
        surfaces[family][group[0]["round"]] = over_pairs(group, "train_loss").mean(0)
    surfaces = {family: by_round for family, by_round in surfaces.items() if len(by_round) > 1}
    if not surfaces:
        return
    losses = over_pairs(results, "train_loss")
    low, high = losses.min(), losses.max()
    figure, panels = figure_of(len(surfaces), 5.2, 4.8, margin=1, subplot_kw={"projection": "3d"})
    for axes, (family, by_round) in zip(panels, surfaces.items()):
        values = np.array(list(by_round.values()))
        alphas, rounds = np.meshgrid(np.linspace(0, 1, values.shape[1]), list(by_round))
        surface = axes.plot_surface(alphas, rounds, values, cmap="viridis", vmin=low, vmax=high, rstride=1, cstride=1,
                                    edgecolor="black", linewidth=.3)
        axes.set(xlabel="$\\alpha$", ylabel="pruning round", zlim=(low, high))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(family)
        axes.view_init(elev=24, azim=-52)
        axes.set_box_aspect((1, 1, .7), zoom=.95)
    figure.colorbar(surface, ax=panels, shrink=.6, pad=.1, label="training loss")
    files.save(path, figure)


def summary_rows(results):
    """{(family, compression): [(percent sparse, difference, ratio, accuracy)]} of the pruned networks, for Fig. 6.

    compression: training images a class / ipc; difference and ratio: training loss at alpha = 1/2 against the mean of
    the ends; accuracy: relative to IMP's; each (mean, std) over pairs and seeds. UserError where IMP is missing.
    """
    groups = {key: group for key, group in grouped(results).items() if group[0]["sparsity"]}
    imp = {}
    for (family, percent), group in groups.items():
        if tickets.family(group[0]["config"]) == "IMP":
            if percent in imp:
                raise UserError(f"--summary divides by IMP's accuracy, but there are two IMPs at {percent:g}%: "
                                f"{family} and another; give one experiment's results")
            imp[percent] = mean_of_ends(group, "test_accuracy").mean()
    rows = defaultdict(list)
    for (family, percent), group in groups.items():
        if percent not in imp:
            raise UserError(f"--summary divides by IMP's accuracy: no IMP (prune.py --data real) at {percent:g}%")
        config, images = group[0]["config"], group[0]["settings"]["images"]
        few = config["data"] in ("distilled", "subset")
        compression = round(images / config["num_classes"] / config["ipc"]) if few else 1
        heights = over_pairs(group, "midpoint_barrier_train_loss")
        ends = mean_of_ends(group, "train_loss")
        measures = heights, 1 + heights / ends, mean_of_ends(group, "test_accuracy") / imp[percent]
        rows[family, compression].append((percent, *map(evaluation.mean_and_std, measures)))
    return rows


def draw_summary(rows, path):
    """Fig. 6: accuracy relative to IMP's (star) against the barrier; a marker's size grows with the compression."""
    figure, panels = figure_of(2, 5.5, 4.8, sharey=True)
    panels[0].set_ylabel("test accuracy / IMP's at the same sparsity")
    for axes, column, how in zip(panels, (1, 2), ("minus the mean of the ends", "divided by the mean of the ends")):
        axes.set_xlabel(f"training loss at $\\alpha$ = 1/2 {how}")
        axes.axhline(1, color="grey", lw=.8)
        axes.grid(alpha=.3)
        axes.margins(.15)
        axes.ticklabel_format(useOffset=False)
        for place, ((family, compression), entries) in enumerate(rows.items()):
            style = style_of(place, f"{family} ({compression}x fewer images)" if compression > 1 else family)
            marker = "*" if family.startswith("IMP") else style["marker"]
            x, x_spread = np.transpose([entry[column] for entry in entries])
            y, y_spread = np.transpose([entry[3] for entry in entries])
            axes.errorbar(x, y, y_spread, x_spread, fmt=marker + ":", color=style["color"], elinewidth=.8,
                          capsize=2, markersize=(60 + compression) ** .5, markeredgecolor="black", markeredgewidth=.6,
                          label=style["label"])
            for entry, at in zip(entries, zip(x, y)):
                axes.annotate(f"{entry[0]:g}%", at, xytext=(9, 7), textcoords="offset points", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    files.save(path, figure)


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = cli.Parser(__doc__)
    cli.ticket_flags(parser)
    flag = parser.add_argument_group("the line").add_argument
    flag("--compare", nargs="+", default=[], metavar="FILE", help="masks of a second family, or folder")
    flag("--orders", type=cli.at_least(2, 1000), default=2, help="data orders; every pair is measured (2)")
    flag("--points", type=cli.at_least(3, 10_001), default=11, help="alphas from 0 to 1, both ends included (11)")
    flag("--from-epoch", type=cli.at_least(0), default=0, metavar="K", help="orders share K first epochs (0)")
    flag("--bn", choices=("lerp", "recompute"), default="lerp",
         help="BatchNorm statistics: interpolated (as the paper), or of 2,000 training images (lerp)")
    flag("--align", action="store_true", help="relabel units to match first (Ainsworth et al. 2023)")
    flag("--eval-images", type=cli.at_least(2), metavar="N", help="random N of each split (all)")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=cli.folder, default=Path("runs/stability"), help="folder of results (runs/stability)")
    flag("--overwrite", action="store_true", help="train anew where --out holds other endpoints")
    flag("--highlight", type=int, nargs="+", metavar="ROUND", help="thick lines (near 0, 60, 87%%)")
    flag("--summary", nargs="+", metavar="FILE", help="draw Fig. 6 of results: JSON files, folders")
    return parser.parse_args(argv)


def summarise(items, out):
    """--summary: Fig. 6 and the table of saved results, all of one experiment."""
    results = named(read_results(items))
    for key in ("model", "dataset", "images", "epochs", "from_epoch", "bn"):
        values = {str(result["settings"][key]) for result in results}
        if len(values) > 1:
            raise UserError(f"--summary: results of {key} {' and '.join(sorted(values))}; give one experiment's")
    print_spread(results)
    draw_summary(summary_rows(results), out / "summary.png")
    print(f"written: {out / 'summary.png'}")


def main():
    args = parse()
    if args.summary:
        return summarise(args.summary, args.out)
    ticket_at, train, test = tickets.load_tickets(args.mask + args.compare, args, cli.start(args))
    endpoints = Endpoints(args.out, ticket_at, train, args, args.from_epoch)
    settings_at = {path: settings_of(endpoints, path) for path in ticket_at}
    for path in ticket_at:
        check_apart(result_file(endpoints, path), ticket_at)
    with files.owned(args.out):
        experiment(endpoints, settings_at, test)


def experiment(endpoints, settings_at, test):
    """Measure every ticket, print and draw what was found."""
    out, highlight = endpoints.folder, endpoints.args.highlight
    first = {}
    for path, settings in settings_at.items():
        first.setdefault(str(settings), path)  # both families' r0 are one
    endpoints.train_ahead(first.values(), endpoints.args.orders)
    for path in ranks.share(first.values(), "lines of all tickets"):
        measure(endpoints, path, test, settings_at[path])
    if not ranks.is_first():
        return
    results = named([read_result(result_file(endpoints, first[str(settings)])) | about(path, endpoints.ticket_at[path])
                     for path, settings in settings_at.items()])
    for result in results:
        print_result(result)
    print_spread(results)
    files.save_csv(out / "stability.csv", table_rows(named(read_results([out]))))
    nearest = {min(results, key=lambda result: abs(result["sparsity"] - wanted))["round"] for wanted in (0, .6, .87)}
    draw_lines(results, highlight or nearest, out / "stability.png")
    draw_surfaces(results, out / "stability_surface.png")
    print(f"written: endpoints, results, stability.csv and pictures in {out}")


if __name__ == "__main__":
    cli.run(main)
