"""The exact Hessian diagonal of trained tickets: Section 4.2's table and the appendix's distributions of the paper.

    python hessian.py --mask masks/r4.pt masks/r10.pt masks_real/r4.pt masks_real/r10.pt masks/r0.pt      the table
    python hessian.py --mask masks/r4.pt --method estimate       from random probes, with error bars: any network
    python hessian.py --mask masks/r4.pt --spectrum              and the density of eigenvalues
    python hessian.py --dataset digits                           offline demonstration

Train a ticket on real data (or take stability.py's endpoint), draw one batch of training images, and get the second
derivative of the loss along every weight: convnet3 of width 128, 2.6 CPU-seconds an image (about 170 for a batch of
64), where one backward pass a weight takes a day.

The paper counts pruned weights, whose second derivative is exactly 0: means and deviations shrink with sparsity alone.
Every row is therefore printed twice, for all prunable weights and for the surviving ones.

As a library: exact_diagonal(model.eval(), images, labels).whole["conv1.weight"] has the shape of the weight.
"""
if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while PyTorch is imported

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import cli, files, graph, ranks, tickets
from common.bars import Bar, along
from common.endpoints import Endpoints, check_apart
from common.errors import UserError
from common.evaluation import mean_and_std
from common.masks import apply_mask
from common.figures import legend_of, style_of
from common.networks import build_network
from common.spectrum import Hessian, Spectrum, check_eval_mode, check_finite
from common.streams import random_stream
from common.tangents import CURVED, bias_matters, carry, directions, entering, has_rule, linearise

FORMAT = "lottery-hessian-1"
FIGURES = ("min", "max", "mean", "std", "mean_abs", "trace", "top_eigenvalue", "gauss_newton_share")
PAPER = {("dense", 0): (-1.847, 1.344, .0048, .035, .0067), ("IMP", 60): (-3.073, 4.510, .0051, .0559, .0087),
         ("IMP", 90): (-6.323, 6.127, .0035, .0594, .0060), ("synthetic", 60): (-.982, 2.093, .0047, .0286, .0061),
         ("synthetic", 90): (-2.338, 1.730, .0037, .0354, .0053)}  # the first five figures

#############################################
#             The exact diagonal            #
#############################################

# Along one weight the loss L is a function of one number. With t the tangent of a value, its derivative by the weight,
#
#     d2L / dw2 = sum over operations of  <cotangent at the output, second derivative of the operation [t, t]>.
#
# Convolutions, linear layers, pooling, ReLU, additions and BatchNorm in eval mode have none: they are linear along a
# line, or piecewise so. Two kinds of term are left:
#
#     softmax cross-entropy      t' (diag(p) - p p') t, for all weights together from one backward pass a class
#     instance and group norms   a quadratic form in t, which is carried forward from the weight to every norm after it


class Diagonal(NamedTuple):
    """The diagonal of the Hessian of the mean loss, as {parameter name: tensor}; exactly 0 at pruned weights."""

    gauss_newton: dict  # the part of the loss's own curvature
    whole: dict
    method: str


def exact_diagonal(model, images, labels, mask=None):
    """The Diagonal at images [N, C, H, W] and labels [N], of `model` in eval mode under a mask of its parameters.

    On a CPU, torch's threads work on different images. Raises UserError for an operation without a rule, and
    for an entry that is not finite.
    """
    nodes = operations(model, images[:2])
    kept = {node: kept_entries(node, mask or {}) for node in nodes if getattr(node.module, "weight", None) is not None}
    sums = dict.fromkeys(kept, 0.)
    few = max(1, batch_limit(images.device) // (8 * max(node.shape.numel() for node in nodes)))
    workers = torch.get_num_threads() if images.device.type == "cpu" else 1
    bar = Bar("diagonal", len(labels), unit="image")
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        batches = images.split(few), labels.split(few)
        for terms, done in zip(pool.map(partial(diagonal_terms, nodes, kept), *batches), batches[1]):
            sums = {layer: sums[layer] + term / len(labels) for layer, term in terms.items()}
            bar.update(len(done))
    parts = [by_name(model, {layer: both[i] for layer, both in sums.items()}) for i in (0, 1)]
    check_finite("the Hessian's diagonal", parts[1])
    curved = any(node.followers for node in nodes)
    return Diagonal(*parts, "exact (structured)" if curved else "exact (Gauss-Newton, piecewise linear)")


def batch_limit(device):
    """Numbers in a batch of tangents: few enough for a processor's cache, enough to fill a GPU."""
    return 1 << (20 if device.type == "cpu" else 26)


def diagonal_terms(nodes, kept, images, labels):
    """{layer: [2, O, D]}: the Gauss-Newton part and the whole diagonal of the summed loss, at the weights `kept`."""
    terms = {layer: torch.stack([part * kept[layer]] * 2) for layer, part in gauss_newton(nodes, kept, images).items()}
    if any(node.followers for node in nodes):
        add_norm_curvature(nodes, kept, images, labels, {layer: term[1] for layer, term in terms.items()})
    return terms


#############################################
#          The curvature of the loss        #
#############################################


def gauss_newton(nodes, layers, images):
    """The Gauss-Newton part of the diagonal of the summed loss: {layer: [O, D]}, entries as in `directions`.

    Softmax cross-entropy has the Hessian diag(p) - p p' = sum_c r_c r_c' in the logits, r_c = sqrt(p_c) (e_c - p):
    the part is the sum over classes c of squared per-image gradients of r_c . logits.
    """
    values = graph.run(nodes, images.clone().requires_grad_())  # for a gradient at every value
    logits = values[nodes[-1]]
    p = logits.detach().softmax(1)
    rows = {layer: directions(layer, values).detach() for layer in layers}
    totals = dict.fromkeys(rows, 0.)
    for c, e in enumerate(torch.eye(p.shape[1]).to(p)):
        r = p[:, c:c + 1].sqrt() * (e - p)
        cotangents = torch.autograd.grad(logits, [values[layer] for layer in rows], r, retain_graph=True)
        for (layer, row), cotangent in zip(rows.items(), cotangents):
            n, groups, _, positions = row.shape
            gradients = cotangent.reshape(n, groups, -1, positions) @ row.mT  # [n, G, O / G, D]
            totals[layer] = totals[layer] + gradients.flatten(1, 2).square_().sum(0)
    return totals


#############################################
#           The curvature of norms          #
#############################################


def add_norm_curvature(nodes, kept, images, labels, totals):
    """Add the norms' part of the summed loss's diagonal to `totals`, at the weights `kept`, both {layer: [O, D]}."""
    values = graph.run(nodes, images.clone().requires_grad_())
    loss = F.cross_entropy(values[nodes[-1]], labels, reduction="sum")
    cotangents = dict(zip(values, torch.autograd.grad(loss, list(values.values()))))
    with torch.no_grad():
        linearised = {node: linearise(node.module, values[node.sources[0]], cotangents[node])
                      for node in nodes[1:]}
        for layer in [layer for layer in kept if layer.followers]:
            rows = directions(layer, values)
            part, total = kept[layer], totals[layer]
            for o in part.any(1).nonzero().flatten().tolist():
                t = rows[:, o * rows.shape[1] // len(part), part[o]]
                total[o, part[o]] += channel_curvature(linearised, layer, o, t).sum(0)


def channel_curvature(linearised, layer, o, t):
    """Curvature [n, D] of the norms after `layer` along tangents t [n, D, P] at channel o of its output."""
    chain = graph.channel_chain(layer)
    end = [layer, *chain][-1]
    t = t.reshape(*t.shape[:2], 1, *layer.shape[1:])
    curvature, t = carry(linearised, chain, layer, t, slice(o, o + 1))
    reached = graph.closure(end, lambda node: node.followers) - {end}
    tail = [node for node in linearised if node in reached]
    if not tail:
        return curvature
    if t.shape[1] > t[0, 0].numel():
        return curvature + curvature_by_form(linearised, tail, end, o, t)
    size = max(1, batch_limit(t.device) // max(len(t) * node.shape.numel() for node in tail))
    parts = [carry(linearised, tail, end, *entering(end, o, part))[0] for part in t.split(size, 1)]
    return curvature + torch.cat(parts, 1)


def curvature_by_form(linearised, tail, end, o, t):
    """Curvature [n, D] on the `tail` along more tangents t [n, D, 1, ...] than the R positions that they live in.

    Why: it is a quadratic form in R numbers. Carrying R unit vectors gives the form, and applying it to the tangents
    is a product of small matrices (width 128: 1,152 tangents of a channel of the second layer, in 64 positions).
    """
    rows = t.flatten(2)
    R = rows.shape[2]
    units = torch.eye(R).to(t).reshape(1, R, *t.shape[2:]).expand(len(t), *[-1] * (t.dim() - 1))
    form, _ = carry(linearised, tail, end, *entering(end, o, units), as_form=True)
    return ((rows @ form) * rows).sum(2)


#############################################
#              Layers and names             #
#############################################

def kept_entries(layer, mask):
    """Which of a layer's own parameters survive: bool [O, D], as in `directions`."""
    parts = ("weight", "bias") if bias_matters(layer) else ("weight",)
    parameters = {part: getattr(layer.module, part) for part in parts}
    kept = [mask.get(f"{layer.name}.{part}", torch.ones_like(p, dtype=torch.bool)) for part, p in parameters.items()]
    return torch.cat([part.reshape(len(part), -1) for part in kept], 1)


def by_name(model, matrices):
    """Matrices {layer: [O, D]} as {parameter name: tensor}; 0 for parameters that are in none."""
    tensors = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for layer, matrix in matrices.items():
        weight = tensors[f"{layer.name}.weight"]
        weight.copy_(matrix[:, :weight[0].numel()].reshape(weight.shape))
        if bias_matters(layer):
            tensors[f"{layer.name}.bias"].copy_(matrix[:, -1])
    return tensors


def operations(model, images):
    """The nodes of a network, marked where they lead to a norm with curvature.

    UserError names the first operation that the exact way has no rule for, at images [n, ...] like these.
    """
    check_eval_mode(model)
    try:
        nodes = graph.trace(model, images)
        for node in nodes:
            if not has_rule(node.module):
                raise UserError(str(node))
        if len(nodes[-1].shape) != 1:
            raise UserError(f"outputs of shape {tuple(nodes[-1].shape)} an image")
    except UserError as error:
        what = f"the exact Hessian diagonal has no rule for {error}"
        raise UserError(f"{what}; --method estimate needs none") from error
    graph.mark_leading(nodes, CURVED)
    return nodes


#############################################
#             Figures and errors            #
#############################################


def jackknife(left_out):
    """Standard errors from statistics [..., m] that leave out one of m samples each."""
    m = left_out.shape[-1]
    return ((m - 1) * left_out.var(-1, correction=0)).sqrt()


def trace_figures(traces, loss_traces):
    """The trace, and the Gauss-Newton share of it, from probes [m] of both."""
    left_out = [part.sum() - part for part in (traces, loss_traces)]
    return {"trace": (traces.mean(), traces.std() / len(traces) ** .5),
            "gauss_newton_share": (loss_traces.sum() / traces.sum(), jackknife(left_out[1] / left_out[0]))}


def probe_figures(D, total):
    """Mean and standard deviation over `total` weights with error bars, from m probes D [m, surviving weights].

    Two probes have independent noise: of the m x m products between probes only those of different ones are used
    (a U-statistic), else the noise would count as spread.
    """
    m, means = len(D), D.double().sum(1) / total
    between = (D @ D.T).double() / total - means[:, None] * means
    rows = between.sum(1) - between.diag()
    std = (rows.sum() / (m * (m - 1))).clamp(min=0).sqrt()
    left_out = ((rows.sum() - 2 * rows) / ((m - 1) * (m - 2))).clamp(min=0).sqrt()
    return {"mean": (means.mean(), means.std() / m ** .5), "std": (std, jackknife(left_out))}


def entry_figures(entries, weights, total):
    """The first five figures over `total` weights, of which `weights` survive, from entries of all or some of these.

    Of some: min and max are theirs, mean |h| has their sampling error; mean and deviation are better left to probes.
    """
    n, share = len(entries), weights / total
    powers = torch.stack([entries, entries.square(), entries.abs()]).double()
    sums = powers.sum(1)
    mean, square, mean_abs = share * sums / n
    error = 0.
    if n < weights:
        left_out = share * (sums[:, None] - powers) / (n - 1)
        error = jackknife(left_out)[2] * (1 - n / weights) ** .5
    with_pruned = entries if weights == total else F.pad(entries, (0, 1))  # the pruned ones are 0
    std = (square - mean * mean).clamp(min=0).sqrt()
    values = with_pruned.min(), with_pruned.max(), mean, std, mean_abs
    return dict(zip(FIGURES, zip(values, (0., 0., 0., 0., error))))


#############################################
#              The experiment               #
#############################################


def measure_exact(model, images, labels, mask, generator):
    """({scope: {figure: (value, error bar)}}, diagonals, method) of one batch; scopes are "all" and "surviving".

    Raises UserError.
    """
    hessian = Hessian(model, images, labels, mask)
    top = hessian.top_eigenvalue(generator)
    own = labels[ranks.own_part()]
    *parts, method = exact_diagonal(model, images[ranks.own_part()], own, mask)
    for part in parts:
        for h in part.values():
            ranks.sum_over_ranks_(h.mul_(len(own) / len(labels)))
    loss_part, diagonal = parts
    loss_trace, trace = (sum(float(h.double().sum()) for h in part.values()) for part in parts)
    share = loss_trace / trace if trace else math.nan
    shared = {"top_eigenvalue": top, "trace": (trace, 0.), "gauss_newton_share": (share, 0.)}
    entries = torch.cat([diagonal[name][kept] for name, kept in mask.items()])
    figures = {scope: shared | entry_figures(entries, len(entries), total) for scope, total in totals(mask).items()}
    return figures, {"diagonal": diagonal, "gauss_newton": loss_part}, method


def measure_estimate(model, images, labels, mask, weights, probes, generator):
    """As measure_exact, from `probes` random vectors and exact entries of `weights` random weights; no diagonals."""
    hessian = Hessian(model, images, labels, mask)
    top = hessian.top_eigenvalue(generator)
    D, loss_traces = map(torch.stack, zip(*(hessian.probe(generator) for _ in along(range(probes), "probes"))))
    shared = {"top_eigenvalue": top} | trace_figures(D.sum(1).double(), loss_traces.double())
    survivors = len(hessian.chosen)
    sample = hessian.chosen[torch.randperm(survivors, generator=generator)[:weights].to(images.device)]
    entries = ranks.sum_over_ranks_(torch.stack([hessian.entry(i) for i in along(sample, "weights")]))
    figures = {}
    for scope, total in totals(mask).items():
        of_sample = entry_figures(entries, survivors, total)
        figures[scope] = shared | of_sample | probe_figures(D[:, hessian.chosen], total)
    method = f"estimate: {probes} probes; min, max, mean |h| of {len(entries)} exact entries"
    if len(entries) < survivors:  # (1 - fraction beyond) ** n = 5%
        method += f" (95% sure: at most {1 - .05 ** (1 / len(entries)):.1%} of weights beyond min or max)"
    return figures, {}, method


def totals(mask):
    """How many weights a row of the table is of."""
    return {"all": sum(kept.numel() for kept in mask.values()), "surviving": sum(int(m.sum()) for m in mask.values())}


def analyse(endpoints, path):
    """The result of one ticket, from --out where it is there already, else computed and saved."""
    args, mask = endpoints.args, endpoints.ticket_at[path]["masks"]
    file, settings = result_file(endpoints, path), settings_of(endpoints, path)
    result = earlier_result(file, settings)
    has_spectrum = result and result.get("spectrum", {}).get("probes") == args.spectrum
    if result and (has_spectrum or not args.spectrum):
        return result
    model = trained_network(endpoints, path)
    batches = list(batches_of(endpoints.split, settings))
    result = result or measure(model, endpoints.ticket_at[path], batches, settings)
    if args.spectrum:
        result["spectrum"] = spectra(model, mask, batches, settings, args.spectrum)
    files.save(file, result)
    return result


def earlier_result(file, settings):
    """The result in a file, when it is of the same settings; else None. Raises UserError for a file of another kind."""
    if not ranks.broadcast(file.exists()):
        return None
    earlier = files.load_format(file, FORMAT, "in a result's place, but is none; choose another --out")
    earlier["settings"] = {"model": earlier["config"]["model"]} | earlier["settings"]  # of earlier versions
    if files.difference(earlier["settings"], settings, ignored=("sparse", "compile")):
        return None
    return earlier | {"settings": settings}


def batches_of(train, settings):
    """Yield the batches: (images, labels), at random from the training images."""
    size, count = settings["batch"], settings["batches"]
    order = torch.randperm(len(train), generator=random_stream(settings["batch_seed"], "hessian batches"))
    for index in order[:size * count].split(size):
        images, labels = train.batch(index)
        yield images.to(getattr(torch, settings["dtype"])), labels


def measure(model, ticket, batches, settings):
    """The result of one ticket's trained network, but for the spectrum: what <name>_hessian.pt holds."""
    measured = []
    for number, (images, labels) in enumerate(batches):
        generator = random_stream(settings["batch_seed"], "hessian", number)
        if settings["method"] == "exact":
            measured.append(measure_exact(model, images, labels, ticket["masks"], generator))
        else:
            measured.append(measure_estimate(model, images, labels, ticket["masks"], settings["weights"],
                                             settings["probes"], generator))
    figures, diagonals, methods = zip(*measured)
    result = {"format": FORMAT, "settings": settings, "method": methods[-1],
              "scopes": {scope: over_batches([batch[scope] for batch in figures]) for scope in figures[0]},
              **{key: ticket[key] for key in ("sparsity", "config", "masks")}}
    for part, first in diagonals[0].items():
        result[part] = {name: sum(batch[part][name] for batch in diagonals) / len(diagonals) for name in first}
    return result


def spectra(model, mask, batches, settings, probes):
    """{scope: a Spectrum over all batches, as a dict}: "surviving" parameters, and "all", the pruned ones free."""
    found = {"probes": probes}
    pruned = any(not kept.all() for kept in mask.values())
    for scope, free in {"surviving": mask, "all": {}}.items() if pruned else {"surviving": mask}.items():
        of_batches = []
        for number, batch in enumerate(batches):
            generator = random_stream(settings["batch_seed"], "spectrum", number)
            of_batches.append(Hessian(model, *batch, free).spectrum(generator, probes))
        values, weights, n = zip(*of_batches)
        found[scope] = {"values": torch.stack(values), "weights": torch.stack(weights), "n": n[0]}
    return found


def result_file(endpoints, path):
    return Path(endpoints.args.out, f"{endpoints.names[path]}_hessian.pt")


def trained_network(endpoints, path):
    """The ticket's endpoint of the first data order as a network in eval mode. Raises UserError."""
    ticket = endpoints.ticket_at[path]
    model = build_network(ticket["config"]).to(endpoints.split.labels.device)
    model.load_state_dict(endpoints.state(path, 0))
    apply_mask(model, ticket["masks"])
    check_finite(f"{path}: the trained network", dict(model.named_parameters()))
    return model.to(getattr(torch, endpoints.args.dtype)).eval()


def over_batches(figures):
    """{figure: [mean, standard deviation, error bar of the mean]} over batches of {figure: (value, error bar)}."""
    joined = {}
    for name in FIGURES:
        values, errors = zip(*((float(value), float(error)) for value, error in (batch[name] for batch in figures)))
        joined[name] = [*mean_and_std(values), math.hypot(*errors) / len(figures)]
    return joined


#############################################
#                  Results                  #
#############################################


def named(results):
    """Results {path: result} with their "family": what differs between them, the seed too, is in its name."""
    names = tickets.names_of(list(results.values()))
    return {path: result | {"family": name} for (path, result), name in zip(results.items(), names)}


def paper_figures(result):
    """The paper's row for this ticket, or None when network, data or sparsity are others."""
    config, percent = result["config"], 100 * result["sparsity"]
    same = (config["model"], config["dataset"], config.get("norm") or "instance", config.get("width") or 128,
            config.get("train_images")) == ("convnet3", "cifar10", "instance", 128, None)
    level = min((0, 60, 90), key=lambda level: abs(level - percent))
    kind = result["family"].partition(",")[0].partition(" (")[0]
    return PAPER.get((kind, level)) if same and abs(level - percent) < 2 else None


def print_table(results):
    print_row("subnetwork", "sparsity", "weights",
              ("min / max", "mean +- std", "mean |h|", "trace", "top eigenvalue", "GN share"))
    for result in results:
        exact = result["settings"]["method"] == "exact"
        for scope, figures in result["scopes"].items():
            means, spreads, errors = ({name: f[i] for name, f in figures.items()} for i in range(3))
            print_row(result["family"], f"{result['sparsity']:.1%}", scope, cells(means))
            if not exact:
                print_row("  error bar", "", "", cells({name: errors[name] for name in FIGURES[2:]}))
            if result["settings"]["batches"] > 1:
                print_row("  std over batches", "", "", cells(spreads))
            if scope == "all" and paper_figures(result):
                print_row("  paper", "", "", cells(dict(zip(FIGURES, paper_figures(result)))))
        ending = f"; top eigenvalue +- {errors['top_eigenvalue']:.1g}" if exact else ""
        print(f"  {result['method']}{ending}")


def cells(figures):
    """The columns of a row, empty where a figure is missing."""
    low, high, mean, std, *rest = (f"{figures[name]:.3g}" if name in figures else "" for name in FIGURES)
    return f"{low} / {high}" if low else "", f"{mean} +- {std}", *rest


def print_row(label, sparsity, scope, cells):
    widths = 18, 20, 9, 8, 14, 8
    print(f"{label:<24} {sparsity:>8} {scope:>9}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def table_rows(results):
    """A row for each ticket and scope, for hessian.csv."""
    rows = []
    for path, result in results.items():
        for scope, figures in result["scopes"].items():
            row = {"mask": path, "family": result["family"], "sparsity": result["sparsity"],
                   "method": result["method"], "scope": scope, **result["settings"]}
            for name, (mean, spread, error) in figures.items():
                row |= {name: mean, f"{name}_std": spread, f"{name}_error": error}
            rows.append(row)
    return rows


def density_rows(results):
    """A row for each ticket, scope and eigenvalue, for spectrum.csv."""
    eigenvalues, width = eigenvalue_axis(results.values())
    rows = []
    for path, result in results.items():
        own = {"mask": path, "family": result["family"], "sparsity": result["sparsity"]}
        for scope, spectrum in spectra_of(result).items():
            columns = (column.tolist() for column in (eigenvalues, *spectrum.density(eigenvalues, width)))
            rows += [own | {"scope": scope, "eigenvalue": x, "density": density, "error": error}
                     for x, density, error in zip(*columns)]
    return rows


def spectra_of(result):
    """{scope: Spectrum} of a result, empty for one without."""
    return {scope: Spectrum(**held) for scope, held in result.get("spectrum", {}).items() if scope != "probes"}


def eigenvalue_axis(results):
    """(1,000 eigenvalues over all that was found, and a little beyond; the width of the Gaussians for all of them)."""
    spectra = [spectrum for result in results for spectrum in spectra_of(result).values()]
    low, high = min(float(s.values.min()) for s in spectra), max(float(s.values.max()) for s in spectra)
    width = max(spectrum.width() for spectrum in spectra)
    return torch.linspace(low - 5 * width, high + 5 * width, 1000, dtype=torch.float64), width


def percent(result):
    return round(100 * result["sparsity"])


def draw(results, path):
    """What was measured, in a panel for each sparsity with the families overlaid, and the dense network in each."""
    from matplotlib.figure import Figure

    kinds = {draw_histograms: [result for result in results if "diagonal" in result],
             draw_densities: [result for result in results if "spectrum" in result]}
    kinds = {draw_kind: shown for draw_kind, shown in kinds.items() if shown}
    levels = sorted({percent(result) for result in results} - {0}) or [0]
    columns, lines = min(4, len(levels)), math.ceil(len(levels) / 4)
    families = sorted({result["family"] for result in results} - {"dense"})
    styles = {family: style_of(i, family) | {"marker": None} for i, family in enumerate(families)}
    if any(result["family"] == "dense" for result in results):
        styles["dense"] = {"color": "black", "label": "dense"}
    figure = Figure(figsize=(1.5 + 4 * columns, .7 + 3.2 * lines * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds) * lines, columns, squeeze=False).reshape(len(kinds), -1)
    for (draw_kind, shown), row in zip(kinds.items(), panels):
        draw_kind(dict(zip(levels, row)), shown, styles)
        for level, axes in zip(levels, row):
            axes.set_yscale("log")
            axes.set_title(f"{level}% sparse" if level else "dense", fontsize=10)
        for axes in row[len(levels):]:
            axes.set_axis_off()
    figure.legend(handles=legend_of(styles.values()), fontsize=8, loc="outside lower center", ncols=3)
    files.save(path, figure)


def in_panels(panels, results):
    """Yield (axes, result) of every panel {percent sparse: axes} and of what it shows."""
    for level, axes in panels.items():
        for result in results:
            if percent(result) in (0, level):
                yield axes, result


def draw_histograms(panels, results, styles):
    """Distributions of the diagonal over surviving weights, in common bins."""
    values = {id(result): torch.cat([result["diagonal"][name][kept] for name, kept in result["masks"].items()]).float()
              for result in results}
    limits = min(float(v.min()) for v in values.values()), max(float(v.max()) for v in values.values())
    for axes, result in in_panels(panels, results):
        counts, edges = torch.histogram(values[id(result)].cpu(), 120, range=limits)
        style = styles[result["family"]]
        axes.stairs(counts, edges, color=style["color"], ls=style.get("ls", "-"))
        axes.set_xlabel("second derivative of the loss along a weight")
    for axes in list(panels.values())[::4]:
        axes.set_ylabel("surviving weights")


def draw_densities(panels, results, styles):
    """Densities of eigenvalues with one standard error, of the surviving weights; faint: the pruned ones free."""
    eigenvalues, width = eigenvalue_axis(results)
    lowest = .1 * min(spectrum.of_one(width) for result in results for spectrum in spectra_of(result).values())
    for axes, result in in_panels(panels, results):
        style = styles[result["family"]]
        for scope, spectrum in spectra_of(result).items():
            density, error = spectrum.density(eigenvalues, width)
            look = dict(lw=1.2) if scope == "surviving" else dict(lw=.8, alpha=.45)
            axes.plot(eigenvalues, density, color=style["color"], ls=style.get("ls", "-"), **look)
            axes.fill_between(eigenvalues, density - error, density + error, color=style["color"], alpha=.15, lw=0)
        axes.set_ylim(bottom=lowest)
        axes.set_xlabel("eigenvalue (faint: of all parameters, the pruned ones free)", fontsize=9)
    for axes in list(panels.values())[::4]:
        axes.set_ylabel("density, 1 standard error")


#############################################
#                Command line               #
#############################################


def parse(argv=None):
    parser = cli.Parser(__doc__)
    cli.ticket_flags(parser)
    flag = parser.add_argument_group("Hessian diagonal").add_argument
    flag("--batch", type=cli.positive, default=64, help="training images in a batch (64)")
    flag("--batches", type=cli.positive, default=1, help="batches: means, and their spread (1)")
    flag("--method", choices=("exact", "estimate"), default="exact", help="estimate: any network, error bars (exact)")
    flag("--weights", type=cli.at_least(2), metavar="N", help="estimate: random weights with exact entries (200)")
    flag("--probes", type=cli.at_least(3), default=64, help="estimate: random vectors (64)")
    flag("--spectrum", type=cli.at_least(2), nargs="?", const=8, metavar="N",
         help="the density of the Hessian's eigenvalues as well, from N random vectors (8)")
    flag("--dtype", choices=("float32", "float64"), default="float32", help="(float32)")
    flag("--endpoints", type=cli.folder, default=Path("runs/stability"), metavar="DIR",
         help="endpoints of stability.py, trained when missing (runs/stability)")
    flag("--overwrite", action="store_true", help="replace endpoints of other settings")
    flag("--out", type=cli.folder, default=Path("runs/hessian"), metavar="DIR",
         help="table, picture, diagonals (runs/hessian)")
    args = parser.parse_args(argv)
    if args.method == "estimate":
        args.weights = args.weights or 200
    return args


def settings_of(endpoints, path):
    """All that a result depends on; a result with equal settings is not computed again."""
    args, ticket = endpoints.args, endpoints.ticket_at[path]
    return {"mask_sha": tickets.fingerprint(ticket), "images": len(endpoints.split), "seed": endpoints.seed(path),
            "batch_seed": args.seed or 0, **{key: ticket["config"].get(key) for key in ("model", "data_fingerprint")},
            **endpoints.recipe(path)._asdict(),
            **{key: getattr(args, key) for key in ("batch", "batches", "method", "weights", "probes", "dtype")}}


def check_before_training(args, ticket_at, train):
    """Refuse before the training what cannot be measured after it. Raises UserError."""
    if args.batch * args.batches > len(train):
        raise UserError(f"--batch {args.batch} x --batches {args.batches}: more than the {len(train)} training images")
    if args.batch < ranks.current().size:
        raise UserError(f"--batch {args.batch}: fewer images than the {ranks.current().size} ranks")
    for path, ticket in ticket_at.items():
        if totals(ticket["masks"])["surviving"] == 0:
            raise UserError(f"{path}: no prunable weight survives, and so there is no Hessian diagonal to show")
    model = build_network(next(iter(ticket_at.values()))["config"]).to(train.labels.device).eval()
    check_eval_mode(model)
    images = train.batch(slice(2))[0]
    if args.method == "exact":
        operations(model, images)
    elif not torch.is_tensor(model(images.clone())):  # which it may overwrite
        raise UserError("the network returns something else than a tensor of logits")


def main():
    args = parse()
    ticket_at, train, _ = tickets.load_tickets(args.mask, args, cli.start(args))
    check_before_training(args, ticket_at, train)
    endpoints = Endpoints(args.endpoints, ticket_at, train, args)
    for path in ticket_at:
        check_apart(result_file(endpoints, path), ticket_at)
    with files.owned(args.out):
        experiment(endpoints, args)


def experiment(endpoints, args):
    """Analyse every ticket, print and draw what was found."""
    endpoints.train_ahead(endpoints.ticket_at, 1)
    results = {path: analyse(endpoints, path) for path in endpoints.ticket_at}
    if not ranks.is_first():
        return
    results = named(results)
    print_table(results.values())
    files.save_csv(args.out / "hessian.csv", table_rows(results))
    written = ["hessian.csv"]
    if args.spectrum:
        files.save_csv(args.out / "spectrum.csv", density_rows(results))
        written.append("spectrum.csv")
    if args.spectrum or args.method == "exact":
        draw(list(results.values()), args.out / "hessian.png")
        written.append("hessian.png")
    print(f"written: {', '.join(written)} and the results of each ticket in {args.out}")


if __name__ == "__main__":
    cli.run(main)
