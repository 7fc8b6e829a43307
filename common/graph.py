"""Any network as the operations of its forward pass: modules, and whose values they read.

    nodes = graph.trace(model, images)        # images first, output last; UserError names what it has no module for
    values = graph.run(nodes, images)         # {node: value}

What has to know a network's operations (the exact Hessian diagonal) is written for modules. Here every call becomes
one, with all its arguments, or is refused by name.
"""
import copy
import inspect
import operator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import fx, nn

from .errors import UserError, first_line
from .networks import left_alone

UNCHANGED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode
SLOPED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)  # functions of one number, made of straight lines
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(eq=False)
class Node:
    """One operation: a module applied to the values [n, C, ...] of other nodes. The first node is the images."""

    name: str  # of the layer in the network, or of the function
    module: nn.Module
    sources: list  # the nodes it reads, in the order of the module's arguments
    users: list = field(default_factory=list)  # the nodes that read its value, each once
    followers: list = field(default_factory=list)  # some of them, see `mark_leading`
    shape: torch.Size = None  # of an image's value, [C, ...]

    def __str__(self):
        return f"{' '.join(str(self.module).split())} in {self.name}"

    @property
    def keeps_channels(self):
        """Does a change in one channel of what it reads stay in that channel?"""
        if isinstance(self.module, nn.GroupNorm):
            return self.module.num_groups == self.module.num_channels
        return isinstance(self.module, (*UNCHANGED, *SLOPED, *POOLS, *BATCH_NORMS, nn.InstanceNorm2d, Add, Scale))


def trace(model, images):
    """The Nodes that the output of `model` depends on, in order of execution: the images first, the output last.

    Operations in place become ones that are not, and what reads the overwritten value reads theirs. Linear layers on
    more than two axes become ChannelLinear. Each weight is used once, and images stay apart. `images` [n, ...] are
    examples, for a few runs. Raises UserError with the name of what stands in the way, for the caller's sentence.
    """
    with left_alone(model):
        return traced(model, images)


def traced(model, images):
    """trace, but for what the runs of a forward change in a network."""
    call_graph, values = record(model, images)
    output = next(reversed(call_graph.nodes)).args[0]
    if not (isinstance(output, fx.Node) and torch.is_tensor(values[output])):
        raise UserError("an output that is not one tensor")
    needed = closure(output, lambda call: call.all_input_nodes)
    nodes = []
    node_at = {}  # of each call's value
    for call in call_graph.nodes:
        if call in needed and not isinstance(values[call], (int, torch.Size)):  # these `reshape` knows
            nodes += nodes_of(call, model, node_at, values)
            node_at[call] = nodes[-1]
    for node in nodes:
        for source in dict.fromkeys(node.sources):
            source.users.append(node)
    check_used_once(nodes)
    check_same_output(nodes, model, images)
    check_images_apart(nodes)
    return nodes


def run(nodes, images):
    """{node: value} for `images`, in order of execution."""
    values = {nodes[0]: images}
    for node in nodes[1:]:
        values[node] = node.module(*(values[source] for source in node.sources))
    return values


def mark_leading(nodes, kinds):
    """Fill in the `followers` of every node: its users that are modules of these kinds, or lead to one."""
    for node in reversed(nodes):
        node.followers = [user for user in node.users if isinstance(user.module, kinds) or user.followers]


def channel_chain(node):
    """The followers one after the other through which a change in one channel of the node stays in that channel."""
    chain = []
    after = node.followers
    while len(after) == 1 and after[0].keeps_channels:
        chain += after
        after = after[0].followers
    return chain


def closure(start, neighbours):
    """The set of `start` and of all that neighbours(one of them) lists."""
    found = set()
    waiting = [start]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += neighbours(one)
    return found


#############################################
#             Recording the calls           #
#############################################


class Proxy(fx.Proxy):
    """A traced value that knows x += y to overwrite x, where torch.fx takes it for x = x + y."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class Tracer(fx.Tracer):
    def proxy(self, node):
        return Proxy(node, self)


class Recorder(fx.Interpreter):
    """Runs a traced network, keeps all values, and lets calls after one in place read what that returned."""

    def __init__(self, traced):
        super().__init__(traced, garbage_collect_values=False)
        self.extra_traceback = False
        self.writers = {}  # {call: the last one that overwrote its value}

    def run_node(self, call):
        for source in call.all_input_nodes:
            writer = self.writers.get(source)
            if writer and self.env[writer] is not self.env[source]:
                raise UserError(f"{writer.name}, which overwrites a part or view of what {call.name} reads afterwards")
            if writer:
                call.replace_input_with(source, writer)
        tensors = {other: value for other, value in self.env.items() if torch.is_tensor(value)}
        versions = {other: value._version for other, value in tensors.items()}
        result = super().run_node(call)
        for other, value in tensors.items():
            if value._version != versions[other]:
                self.writers[other] = call
        return result


def record(model, images):
    """(fx.Graph, {call: value}) of one run. Arguments of forward that have a default keep it."""
    arguments = list(inspect.signature(model.forward).parameters.values())
    defaults = {argument.name: argument.default for argument in arguments[1:] if argument.default is not argument.empty}
    try:
        call_graph = Tracer().trace(model, defaults or None)
        recorder = Recorder(fx.GraphModule(model, call_graph))
        with torch.no_grad():
            recorder.run(images.clone())
    except UserError:
        raise
    except Exception as error:  # a forward that is handed a tracer may raise anything
        raise UserError(f"a forward that torch.fx cannot trace ({first_line(error)})") from error
    return recorder.graph, recorder.env


#############################################
#         Modules of what has none          #
#############################################


class Add(nn.Module):
    """x + y of one shape."""

    def forward(self, x, y):
        return x + y


class Operation(nn.Module):
    """An operation without parameters; its settings are attributes."""

    def __init__(self, **settings):
        super().__init__()
        vars(self).update(settings)


class Scale(Operation):
    """x times `factor`."""

    def forward(self, x):
        return self.factor * x


class Expand(Operation):
    """Each image's values repeated along axes of length 1, to `shape`."""

    def forward(self, x):
        return x.expand(len(x), *self.shape)


class Embed(Operation):
    """x [n, C, ...] among channels of zeros, so many `around` = (before it, after it)."""

    def forward(self, x):
        return F.pad(x, [0, 0] * (x.dim() - 2) + list(self.around))


class Mean(Operation):
    """The mean over the axes `dim`."""

    def forward(self, x):
        return x.mean(self.dim, self.keepdim)


class Reshape(Operation):
    """Each image's values in another `shape`."""

    def forward(self, x):
        return x.reshape(len(x), *self.shape)


class Slice(Operation):
    """x[:, ...]: `index` has numbers and slices after the images' axis."""

    def forward(self, x):
        return x[self.index]


class Movedim(Operation):
    """An axis in another place: `places` = (source, destination)."""

    def forward(self, x):
        return x.movedim(*self.places)


class ChannelLinear(nn.Module):
    """A linear layer on the second axis, where the channels of all other layers are, of x [n, C, ...]."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


LINEAR = (nn.Flatten, Add, Scale, Expand, Embed, Mean, Reshape, Slice, Movedim)

#############################################
#            A call as a module             #
#############################################

# Functions have the signatures of torch's, so that Python itself sorts arguments and keywords and refuses those that
# are not there. Each returns (module, *what it is applied to), or a function that makes several nodes for the module.


def like(kind):
    """The function whose arguments after the first are those that a module of this kind is made with."""
    def function(input, *arguments, **keywords):
        return kind(*arguments, **keywords), input

    return function


def add(input, other, *, alpha=1):
    return partial(sum_nodes, alpha), input, other


def cat(tensors, dim=0):
    return partial(concatenation_nodes, dim), *tensors


def dropout(input, p=.5, training=True, inplace=False):
    if training:
        raise ValueError("it draws at random")
    return nn.Identity(), input


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode), input


def mean(input, dim, keepdim=False):
    return Mean(dim=(dim,) if isinstance(dim, int) else tuple(dim), keepdim=keepdim), input


def flatten(input, start_dim=0, end_dim=-1):
    return nn.Flatten(start_dim, end_dim), input


def reshape(input, *shape):
    first, *rest = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    keeps_images = first == -1 or is_batch_size(first)
    if not keeps_images or not all(isinstance(size, int) for size in rest):
        raise ValueError("not each image's values in another shape")
    return Reshape(shape=rest), input


def getitem(input, index):
    plain = isinstance(index, tuple) and all(isinstance(part, (int, slice)) for part in index)
    if not plain or index[0] != slice(None):
        raise ValueError("not x[:, ...]")
    return Slice(index=index), input


def is_batch_size(size):
    """Is this call x.size(0), x.size()[0] or x.shape[0]?"""
    if not isinstance(size, fx.Node) or size.kwargs:
        return False
    if size.target is not operator.getitem:
        return size.target == "size" and size.args[1:] == (0,)
    shape, index = size.args
    return index == 0 and (shape.target, *shape.args[1:]) in [("size",), (getattr, "shape")]


FUNCTIONS = {
    operator.add: add, operator.iadd: add, torch.add: add, torch.cat: cat, torch.concat: cat,
    F.relu: like(nn.ReLU), F.relu_: like(nn.ReLU), torch.relu: like(nn.ReLU), torch.relu_: like(nn.ReLU),
    F.relu6: like(nn.ReLU6), F.leaky_relu: like(nn.LeakyReLU), F.gelu: like(nn.GELU), F.silu: like(nn.SiLU),
    F.dropout: dropout, F.dropout2d: dropout,
    F.max_pool2d: max_pool2d, torch.max_pool2d: max_pool2d, F.avg_pool2d: like(nn.AvgPool2d),
    F.adaptive_avg_pool2d: like(nn.AdaptiveAvgPool2d), torch.mean: mean,
    torch.flatten: flatten, torch.reshape: reshape, operator.getitem: getitem}
METHODS = {"add": add, "add_": add, "relu": like(nn.ReLU), "relu_": like(nn.ReLU), "mean": mean, "flatten": flatten,
           "view": reshape, "reshape": reshape}


def nodes_of(call, model, node_at, values):
    """The Nodes of a call, mostly one, with those before it at `node_at` {call: Node}. Raises UserError."""
    if call.op == "placeholder" and not node_at:
        return [Node("images", nn.Identity(), [])]
    if call.op in ("placeholder", "get_attr"):
        raise UserError(f"{call.target}, a tensor that no layer holds")
    name = call.target if call.op == "call_module" else call.name
    module, *arguments = layer_of(call, model) if call.op == "call_module" else function_of(call)
    from_images = all(isinstance(argument, fx.Node) and argument in node_at for argument in arguments)
    sizes = set(call.all_input_nodes) - set(arguments) if from_images else set()
    if not from_images or (sizes and not isinstance(module, Reshape)):
        raise UserError(f"the arguments of {name}")
    if not torch.is_tensor(values[call]):
        raise UserError(f"several tensors from {name}")
    sources = [node_at[argument] for argument in arguments]
    if not isinstance(module, nn.Module):
        return module(name, sources, [values[argument] for argument in arguments], values[call])
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False
    if type(module) is nn.Linear and values[call].dim() > 2:
        before = Node(f"before {name}", Movedim(places=(-1, 1)), sources)
        layer = Node(name, ChannelLinear(module), [before])
        return [before, layer, Node(f"after {name}", Movedim(places=(1, -1)), [layer])]
    return [Node(name, module, sources)]


def sum_nodes(alpha, name, sources, operands, result):
    """The Nodes of x + alpha y, from the nodes and the values of x and y. Raises UserError."""
    nodes, operand_nodes = [], []
    for source, operand, factor in zip(sources, operands, (1, alpha)):
        if operand.dim() != result.dim():
            raise UserError(f"{name} of {operands[0].dim()} and {operands[1].dim()} axes")
        if factor != 1:
            source = Node(f"alpha of {name}", Scale(factor=factor), [source])
            nodes.append(source)
        if operand.shape != result.shape:
            source = Node(f"broadcast of {name}", Expand(shape=result.shape[1:]), [source])
            nodes.append(source)
        operand_nodes.append(source)
    return [*nodes, Node(name, Add(), operand_nodes)]


def concatenation_nodes(dim, name, sources, operands, result):
    """The Nodes of a concatenation of channels, from the nodes and the values of what is joined. Raises UserError."""
    if dim % result.dim() != 1:
        raise UserError(f"{name} along axis {dim}")
    sizes = [operand.shape[1] for operand in operands]
    nodes = []
    for i, source in enumerate(sources):
        around = sum(sizes[:i]), sum(sizes[i + 1:])
        nodes.append(Node(f"part {i} of {name}", Embed(around=around), [source]))
        if i:
            nodes.append(Node(name, Add(), [joined, nodes[-1]]))
        joined = nodes[-1]
    return nodes


def layer_of(call, model):
    """(module, *its arguments) of a layer's call. Raises UserError."""
    module = model.get_submodule(call.target)
    if module._forward_hooks or module._forward_pre_hooks:
        raise UserError(f"the forward hooks of {call.target}")
    return module, *inspect.signature(module.forward).bind(*call.args, **call.kwargs).args


def function_of(call):
    """(module, *its arguments) of a function's call. Raises UserError."""
    table = FUNCTIONS if call.op == "call_function" else METHODS
    what = getattr(call.target, "__name__", call.target)
    if call.target not in table:
        raise UserError(f"the operation {what}")
    try:
        return table[call.target](*call.args, **call.kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"the arguments of the operation {what} ({error})") from error


#############################################
#                  Checks                   #
#############################################


def check_used_once(nodes):
    """Raises UserError when two nodes have a weight in common: a module used twice, or tied weights."""
    owners = {}
    for node in nodes:
        for parameter in node.module.parameters():
            owner = owners.setdefault(parameter, node)
            if owner is not node:
                twice = "used twice" if owner.name == node.name else f"with a weight of {owner.name}"
                raise UserError(f"{node} {twice}")


def check_same_output(nodes, model, images):
    """Fill in the shapes. Raises UserError unless the nodes compute what the model does: no trace shows everything."""
    with torch.no_grad():
        wanted = model(images.clone())
        try:
            values = run(nodes, images)
        except RuntimeError as error:  # of a reshape across images
            raise UserError(f"a forward that does other things than its trace ({first_line(error)})") from error
    found = values[nodes[-1]]
    if wanted.shape != found.shape or not torch.allclose(wanted, found, equal_nan=True):
        raise UserError("a forward that does other things than its trace")
    for node, value in values.items():
        node.shape = value.shape[1:]


def check_images_apart(nodes):
    """Raises UserError for an operation that mixes the images, or takes their axis for the channels'."""
    for node in nodes[1:]:
        module = node.module
        axes = 1 + len(node.sources[0].shape)
        apart = True
        if isinstance(module, nn.Flatten):
            apart = module.start_dim % axes > 0
        elif isinstance(module, Mean):
            apart = all(dim % axes > 0 for dim in module.dim)
        elif isinstance(module, (nn.Conv2d, nn.InstanceNorm2d, *POOLS)):
            apart = axes == 4
        if not apart:
            raise UserError(f"{node} on {axes} axes")
