"""The fastest faithful view of a network. Who trains or evaluates asks for one, and need not know what it got."""
from contextvars import ContextVar

from torch import nn

from ..networks import blocks_of
from . import ops
from .dense import Fused
from .sparse import SparseNetwork, first_sparse_block, supports

# How pruned weights are skipped on a CPU, for the whole process: "auto" (where that pays), "on" or "off".
skip_zeros = ContextVar("skip_zeros", default="auto")


def view(model, mask=None, skip=True, plans=None):
    """A view of `model`, equal to it within rounding, sharing its weights; without compiled ops `model` itself.

    With a `mask` it meets the surviving weights only (sparse.py), as `skip_zeros` says, unless `skip` is False. The
    pruned weights are 0. Views with one mask may share a dict of `plans`.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or not ops.runs_on(parameter.device.type):
        return model
    count = dense_blocks(model, mask if skip else None)
    if count is None:
        return Fused(model)
    dense = [Fused(nn.Sequential(*map(model.get_submodule, block.modules()))) for block in blocks_of(model)[:count]]
    return SparseNetwork(model, mask, dense, plans)


def path(model, mask=None, skip=True):
    """ "sparse" or "dense": which way `view` takes, for the progress line."""
    sparse = ops.load() and dense_blocks(model, mask if skip else None) is not None
    return "sparse" if sparse else "dense"


def dense_blocks(model, mask):
    """How many blocks a sparse network begins with that are dense; None when it is all dense."""
    if not mask or skip_zeros.get() == "off" or not supports(model):
        return None
    count = 0 if skip_zeros.get() == "on" else first_sparse_block(model, mask)
    return count if count < len(blocks_of(model)) else None
