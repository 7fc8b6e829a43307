"""The fastest faithful view of a network. Who trains or evaluates asks for one, and need not know what it got."""
import copy
import sys
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn

from ..masks import whole_mask
from ..networks import ConvNet3, ResNet, blocks_of
from ..streams import global_generators_kept, seed_everything
from . import ops
from .crossover import first_sparse_block
from .dense import Fused, is_known
from .sparse import SparseNetwork, supports

# How pruned weights are skipped on a CPU, for the whole process: "auto" (where that pays), "on" or "off".
skip_zeros = ContextVar("skip_zeros", default="auto")
verdicts = {}  # what was tried once need not be tried again: {description of a network: whether its view is faithful}


def view(model, mask=None, skip=True, plans=None, sample=None):
    """A view of `model`, equal to it within rounding, sharing its weights; where there is none, `model` itself.

    With a `mask` it meets the surviving weights only (sparse.py), as `skip_zeros` says, unless `skip` is False. The
    pruned weights are 0. Views with one mask may share a dict of `plans`. Of networks that are not the project's own
    only those have a view that are known layers in sequence, and only after a trial on `sample` = (images, labels).
    """
    if not has_view(model, sample):
        return model
    count = dense_blocks(model, mask if skip else None)
    if count is None:
        return Fused(model)
    mask = whole_mask(model, mask)
    dense = [Fused(nn.Sequential(*map(model.get_submodule, block.modules()))) for block in blocks_of(model)[:count]]
    return SparseNetwork(model, mask, dense, plans)


def made_ready(network):
    """A function images -> logits of a view in eval mode, whose work on the parameters is done; or any network itself.

    For many batches without gradients, between which the parameters stay.
    """
    if not isinstance(network, (Fused, SparseNetwork)):
        return network
    network.ready()
    return network.evaluate


def path(model, mask=None, skip=True):
    """ "dense", "sparse" or "sparse from" a layer on: which way `view` takes, for the progress line."""
    count = dense_blocks(model, mask if skip else None) if ops.load() else None
    if count is None:
        return "dense"
    return f"sparse from {blocks_of(model)[count].modules()[0]}" if count else "sparse"


def dense_blocks(model, mask):
    """How many blocks a sparse network begins with that are dense; None when it is all dense."""
    if not mask or skip_zeros.get() == "off" or not (supports(model) and is_known(model)):
        return None
    count = 0 if skip_zeros.get() == "on" else first_sparse_block(model, whole_mask(model, mask))
    return count if count < len(blocks_of(model)) else None


def has_view(model, sample=None):
    """Whether there are ops for `model` and it is proven, or for a network not our own proven and tried, to be same."""
    parameter = next(model.parameters(), None)
    if parameter is None or not ops.runs_on(parameter.device.type) or not is_known(model):
        return False
    if type(model) in (ConvNet3, ResNet):
        return True
    return sample is not None and is_faithful(model, *sample)


def is_faithful(model, images, labels):
    """Whether the view of `model` gives its logits and gradients on a batch; said once where it does not."""
    key = f"{model} {tuple(images.shape)} {images.dtype} {images.device}"
    if key not in verdicts:
        verdicts[key] = differs_little(model, images, labels)
        if not verdicts[key]:
            print("csrc: not used for this network: its fused form gave other numbers", file=sys.stderr)
    return verdicts[key]


def differs_little(model, images, labels):
    """Compare a copy of `model` with the view of another copy, in train and in eval mode."""
    results = []
    with global_generators_kept():
        for fused in (False, True):
            own = copy.deepcopy(model)
            network = Fused(own) if fused else own
            seed_everything(0)
            try:
                results.append(logits_and_gradients(own, network, images, labels))
            except Exception:  # in the view alone it means another function; in the model the training will tell
                return False
    for plain, fused in zip(*results):
        if not (plain - fused).norm() <= 1e-3 * plain.norm() + 1e-6:
            return False
    return True


def logits_and_gradients(model, network, images, labels):
    """[logits in train mode, gradient of all parameters, logits in eval mode] of a view `network` of `model`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = network(images)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters, allow_unused=True,
                                    materialize_grads=True)
    model.eval()
    with torch.no_grad():
        return [logits.detach(), torch.cat([g.flatten() for g in gradients]), network(images)]
