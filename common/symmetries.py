"""The permutation symmetries of a network: which units may be relabelled together without changing its function.

    groups = symmetries.permutation_groups(model, images)  # UserError names what is not understood
    state = symmetries.permute(state, groups[0], order)

The graph of a network (graph.py) is followed from the images to the logits. Along every axis of a value it is known
which units lie there; a layer that mixes an axis makes new ones, a norm has parameters of them, a sum ties two kinds.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from . import graph
from .errors import UserError
from .networks import left_alone


class Part(NamedTuple):
    """Places `start` to `stop` along an axis of a tensor of the state, of each unit as many, in the units' order."""

    name: str
    axis: int
    start: int
    stop: int


class Group(NamedTuple):
    """`size` units that are relabelled together, and all their places."""

    size: int
    parts: list


def permutation_groups(model, images):
    """The Groups of a network at images [n, C, H, W] like these, its input's and output's units apart.

    Raises UserError for what cannot be traced, and for an operation that is not understood.
    """
    try:
        with left_alone(model):
            nodes = graph.trace(model.eval(), images[:2])
        book = Book(model)
        layouts = {nodes[0]: fixed(nodes[0].shape)}
        for node in nodes[1:]:
            rule = RULES.get(type(node.module))
            if not rule:
                raise UserError(str(node))
            book.now += 1
            layouts[node] = rule(node, book, *(layouts[source] for source in node.sources))
        pin(*layouts[nodes[-1]])
    except UserError as error:
        raise UserError(f"--align cannot follow {error}") from error
    return book.groups()


def permute(state, group, order):
    """`state` with the units of `group` in a new order."""
    permuted = dict(state)
    for name, axis, start, stop in group.parts:
        tensor = permuted[name].clone()
        units = tensor.narrow(axis, start, stop - start).unflatten(axis, (group.size, -1))
        moved = units.index_select(axis, torch.as_tensor(order, device=tensor.device))
        tensor.narrow(axis, start, stop - start).copy_(moved.flatten(axis, axis + 1))
        permuted[name] = tensor
    return permuted


#############################################
#           Units, and where they lie       #
#############################################

# The layout of a value [n, C, ...] is a list for each axis but the images': [(Units, places), ...] from its first place
# to its last. None instead of Units: the value is constant along these places, so that it does not know their order.


@dataclass(eq=False)
class Units:
    """Units found on the way; those of several layers can turn out to be one kind."""

    size: int
    fixed: bool = False  # they stay as they are
    parts: list = field(default_factory=list)
    last: int = 0  # the number of the last node that had a part
    joined: "Units" = None

    def all(self):
        return self.joined.all() if self.joined else self


class Book:
    """The state's names of a network's tensors, and all units made so far."""

    def __init__(self, model):
        self.names, self.units, self.now = {}, [], 0
        for name, tensor in model.state_dict(keep_vars=True).items():  # under all of its names
            self.names.setdefault(id(tensor), []).append(name)

    def make(self, size):
        self.units.append(Units(size))
        return self.units[-1]

    def known(self, segments):
        """Segments whose constant ones are units too, about to be told apart."""
        return [(units or self.make(places), places) for units, places in segments]

    def attach(self, module, axis, segments, tensors=("weight", "bias", "running_mean", "running_var")):
        """Make the segments along an axis of a module's tensors parts of their units."""
        for name in tensors:
            tensor, start = getattr(module, name, None), 0
            for units, places in segments if tensor is not None else ():
                if units:
                    everything = units.all()
                    everything.parts += [Part(own, axis, start, start + places) for own in self.names[id(tensor)]]
                    everything.last = self.now
                start += places

    def groups(self):
        """The Groups, in the order of the nodes that had their last parts."""
        free = [units for units in self.units if units.parts and not (units.joined or units.fixed)]
        return [Group(units.size, units.parts) for units in sorted(free, key=lambda units: units.last)]


def fixed(shape):
    """The layout of a value whose places all stay as they are."""
    return [[(Units(places, fixed=True), places)] for places in shape]


def pin(*axes):
    for segments in axes:
        for units, _ in segments:
            if units:
                units.all().fixed = True


def tie(x, y):
    """Make units of x and y, that are added up, one kind: as many as the fewer, which are blocks of the others."""
    x, y = x.all(), y.all()
    if x is y:
        return
    if x.fixed or y.fixed:
        x.fixed = y.fixed = True
        return
    if max(x.size, y.size) % min(x.size, y.size):
        raise UserError(f"the sum of {x.size} and {y.size} units")
    y.size, y.last = min(x.size, y.size), max(x.last, y.last)
    y.parts, x.joined = y.parts + x.parts, y


def tied(x, y):
    """The segments of a sum along an axis, from those of its terms."""
    x, y, found = list(x), list(y), []
    while x:
        (a, n), (b, m) = x.pop(0), y.pop(0)
        longer, places = a if n > m else b, min(n, m)
        if n != m and longer and not longer.all().fixed:
            raise UserError("a sum that ties parts of one layer's units to those of others")
        if n > m:
            x.insert(0, (a, n - m))
        if m > n:
            y.insert(0, (b, m - n))
        if a and b:
            tie(a, b)
        found.append((b or a, places))
    return found


def in_blocks(book, segments, times):
    """Segments of which every place becomes a block of `times` different ones."""
    return [(units, places * times) for units, places in (book.known(segments) if times > 1 else segments)]


#############################################
#       What an operation does to them      #
#############################################

# Each: (node, book, layouts of what it reads) -> the layout of its value.


def elementwise(node, book, x):
    return x


def mixes(node, book, x):
    """A linear layer or a convolution along the first axis; its places along the others move with those read."""
    module = node.module
    if getattr(module, "groups", 1) > 1:
        return depthwise(node, book, x)
    made = [(book.make(node.shape[0]), node.shape[0])]
    book.attach(module, 1, x[0], ["weight"])
    book.attach(module, 0, made)
    if isinstance(module, graph.ChannelLinear):
        return [made, *x[1:]]
    pin(*x[1:])
    return [made, *fixed(node.shape[1:])]


def depthwise(node, book, x):
    module = node.module
    if module.groups != module.in_channels:
        raise UserError(str(node))
    pin(*x[1:])
    channels = in_blocks(book, book.known(x[0]), module.out_channels // module.in_channels)
    book.attach(module, 0, channels)
    return [channels, *fixed(node.shape[1:])]


def normalises(node, book, x):
    """A norm of each channel by itself, or of all together."""
    module = node.module
    if isinstance(module, nn.GroupNorm) and module.num_groups not in (1, module.num_channels):
        raise UserError(str(node))
    channels = x[0] if module.weight is None else book.known(x[0])
    book.attach(module, 0, channels)
    return [channels, *x[1:]]


def layer_norm(node, book, x):
    """A norm over the last axes, with parameters along all of them."""
    last = len(x) - len(node.module.normalized_shape)
    if node.module.weight is not None:
        x = x[:last] + [book.known(segments) for segments in x[last:]]
    for axis, segments in enumerate(x[last:]):
        book.attach(node.module, axis, segments)
    return x


def pools(node, book, x):
    pin(*x[1:])
    return [x[0], *fixed(node.shape[1:])]


def adds(node, book, x, y):
    return [tied(a, b) for a, b in zip(x, y)]


def expands(node, book, x):
    before = node.sources[0].shape
    return [segments if n == m else [(None, m)] for segments, n, m in zip(x, before, node.shape)]


def embeds(node, book, x):
    before, after = node.module.around
    return [[(units, places) for units, places in [(None, before), *x[0], (None, after)] if places], *x[1:]]


def averages(node, book, x):
    """A mean does not know the order of what it is of."""
    axes = {dim % (len(x) + 1) - 1 for dim in node.module.dim}
    if node.module.keepdim:
        return [[(None, 1)] if axis in axes else segments for axis, segments in enumerate(x)]
    return [segments for axis, segments in enumerate(x) if axis not in axes]


def flattens(node, book, x):
    start, end = (dim % (len(x) + 1) - 1 for dim in (node.module.start_dim, node.module.end_dim))
    pin(*x[start + 1:end + 1])
    return x[:start] + [in_blocks(book, x[start], math.prod(node.sources[0].shape[start + 1:end + 1]))] + x[end + 1:]


def reshapes(node, book, x):
    """Either all axes become one, or the first stays."""
    before = node.sources[0].shape
    pin(*x[1:])
    if len(node.shape) == 1:
        return [in_blocks(book, x[0], math.prod(before[1:]))]
    if before[0] != node.shape[0]:
        pin(x[0])
        return fixed(node.shape)
    return [x[0], *fixed(node.shape[1:])]


def slices(node, book, x):
    """Units of which some are taken stay as they are."""
    index, sizes, found = list(node.module.index[1:]), list(node.shape), []
    for segments, part in zip(x, index + [slice(None)] * (len(x) - len(index))):
        whole = part == slice(None)
        if not whole:
            pin(segments)
        if isinstance(part, slice):
            places = sizes.pop(0)
            found += [segments] if whole else fixed([places])
    return found


def moves(node, book, x):
    source, destination = (place % (len(x) + 1) - 1 for place in node.module.places)
    moved = list(x)
    moved.insert(destination, moved.pop(source))
    return moved


SMOOTH = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Tanh, nn.Sigmoid)
RULES = {graph.Add: adds, graph.Expand: expands, graph.Embed: embeds, graph.Mean: averages, graph.Reshape: reshapes,
         graph.Slice: slices, graph.Movedim: moves, nn.Flatten: flattens, nn.LayerNorm: layer_norm,
         **dict.fromkeys((*graph.UNCHANGED, *graph.SLOPED, graph.Scale, *SMOOTH), elementwise),
         **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, graph.ChannelLinear), mixes),
         **dict.fromkeys((*graph.BATCH_NORMS, nn.GroupNorm, nn.InstanceNorm2d), normalises),
         **dict.fromkeys(graph.POOLS, pools)}
