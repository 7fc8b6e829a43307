"""Mask algebra: which weights survive, how sparse that is, pruning by scores."""
import torch

from .networks import prunable


def dense_mask(model, keep=()):
    """The mask that keeps every prunable weight; layers that fit a pattern of `keep` are no part of it."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model, keep).items()}


def whole_mask(model, mask):
    """`mask` with the weights that it leaves out, because they are kept dense or frozen: they survive."""
    rest = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()
            if p.ndim > 1 and name not in mask}
    return mask | rest


def surviving(model):
    """The mask of the prunable weights that are not 0."""
    return {name: weight != 0 for name, weight in prunable(model).items()}


def sparsity(mask):
    """Fraction of prunable weights removed."""
    return 1 - sum(int(m.sum()) for m in mask.values()) / sum(m.numel() for m in mask.values())


@torch.no_grad()
def apply_mask(model, mask):
    """Set the weights outside `mask` to 0."""
    for name, kept in mask.items():
        model.get_parameter(name).mul_(kept)


def magnitude_mask(weights, mask, rate, scope="global"):
    """`pruned` by magnitude: equal to torch.nn.utils.prune's global_unstructured and l1_unstructured."""
    return pruned({name: weights[name].detach().abs() for name in mask}, mask, rate, scope)


def pruned(scores, mask, rate, scope="global"):
    """Remove the `rate` of the surviving weights whose scores are lowest: round(rate * remaining) of them.

    scores {name: tensor}, mask {name: bool tensor} -> a new mask, nested in the old one. `scope` "global" ranks
    all layers together, "layer" each by itself.
    """
    groups = [list(mask)] if scope == "global" else [[name] for name in mask]
    new = {name: kept.clone() for name, kept in mask.items()}
    for names in groups:
        survivors = torch.cat([scores[name][mask[name]] for name in names])
        keep = torch.ones_like(survivors, dtype=torch.bool)
        keep[survivors.topk(round(rate * len(survivors)), largest=False).indices] = False
        for name, part in zip(names, keep.split([int(mask[name].sum()) for name in names])):
            new[name][mask[name]] = part
    return new


def shuffled(mask, stream):
    """`mask` permuted at random within each layer (Frankle et al. 2021)."""
    return {name: kept.flatten()[torch.randperm(kept.numel(), generator=stream).to(kept.device)].view_as(kept)
            for name, kept in mask.items()}
