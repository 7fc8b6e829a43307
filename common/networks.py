"""The paper's networks, and those of users: built by name, drawn from a seed, and what of them can be pruned."""
import fnmatch
import contextlib
import importlib
import math
import os
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .errors import UserError, first_line, is_of_memory, listed, note
from .files import check_memory
from .streams import global_generators_kept, seed_everything

#############################################
#             The paper's networks          #
#############################################


def norm_layer(kind, channels):
    """`instance` is GroupNorm with one channel a group: instance norm with affine (paper's code)."""
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels, channels)


def first_padding(image_size):
    return 3 if image_size == 28 else 1  # pads MNIST's 28 pixels to 32, as IDC does


class ConvNet3(nn.Sequential):
    """Three blocks [conv3x3, norm, ReLU, average pool 2] and a linear layer (Gidaris & Komodakis 2018)."""

    def __init__(self, channels, image_size, num_classes, width=128, norm="instance"):
        super().__init__()
        size, padding = image_size, first_padding(image_size)
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=padding))
            self.add_module(f"norm{i}", norm_layer(norm, width))
            self.add_module(f"relu{i}", nn.ReLU())
            self.add_module(f"pool{i}", nn.AvgPool2d(2))
            size, channels, padding = (size + 2 * padding - 2) // 2, width, 1
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(width * size * size, num_classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = norm_layer(norm, width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut.add_module("conv", nn.Conv2d(channels, width, 1, stride, bias=False))
            self.shortcut.add_module("norm", norm_layer(norm, width))

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Sequential):
    """ResNet of basic blocks; 7x7/2 stem and max pooling above 64 pixels, else a 3x3 stem (paper's code).

    On MNIST, Fashion-MNIST and SVHN IDC's code has these widths on CIFAR alone, elsewhere those of ImageNet (64 to
    512: --width 64), and does not pad 28 pixels.
    """

    def __init__(self, blocks, channels, image_size, num_classes, width, norm="batch"):
        super().__init__()
        large = image_size > 64
        stem = (dict(kernel_size=7, stride=2, padding=3) if large
                else dict(kernel_size=3, padding=first_padding(image_size)))
        self.conv1 = nn.Conv2d(channels, width, bias=False, **stem)
        self.norm1 = norm_layer(norm, width)
        self.relu1 = nn.ReLU()
        if large:
            self.pool1 = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            out = width << stage
            for i in range(count):
                stride = 2 if stage and not i else 1
                self.add_module(f"stage{stage + 1}_{i + 1}", BasicBlock(channels, out, stride, norm))
                channels = out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))


def average_pooled(network):
    """Turn the strides and the max pooling of a ResNet into average pooling (Kim et al. 2022, ResNetAP)."""
    if network.conv1.stride == (2, 2):
        network.conv1.stride = (1, 1)
        network.pool1 = nn.AvgPool2d(4)
    for block in network.modules():
        if isinstance(block, BasicBlock) and block.conv1.stride == (2, 2):
            block.conv1.stride = (1, 1)
            block.relu1 = nn.Sequential(block.relu1, nn.AvgPool2d(2))
            conv, norm = block.shortcut.conv, block.shortcut.norm
            conv.stride = (1, 1)
            block.shortcut = nn.Sequential(conv, nn.AvgPool2d(2), norm)
    return network


#############################################
#          What they are made of            #
#############################################


class Layer(NamedTuple):
    """A convolution and what follows it, by the names of the modules; "" where there is none."""

    conv: str
    norm: str
    relu: str = ""
    pool: str = ""


class Block(NamedTuple):
    """Layers one after the other. A residual block adds its input (through `shortcut`, if any) before the last ReLU."""

    layers: tuple
    residual: str = ""  # name of the module that is the whole residual block
    shortcut: Layer = None

    def modules(self):
        """The names of the network's children that make up the block."""
        if self.residual:
            return [self.residual]
        return [name for layer in self.layers for name in layer if name]


def blocks_of(model):
    """The Blocks of a ConvNet3 or ResNet, from the images to the classifier `linear`; None for another network.

    None too where somebody has put other modules, or hooks, into one.
    """
    if type(model) is ConvNet3:
        blocks = [Block((Layer(f"conv{i}", f"norm{i}", f"relu{i}", f"pool{i}"),)) for i in (1, 2, 3)]
        rest = ["flatten", "linear"]
    elif type(model) is ResNet:
        stem = Layer("conv1", "norm1", "relu1", "pool1" if hasattr(model, "pool1") else "")
        blocks = [Block((stem,))] + [residual_block(name, module) for name, module in model.named_children()
                                     if isinstance(module, BasicBlock)]
        rest = ["pool", "flatten", "linear"]
    else:
        return None
    names = [name for block in blocks for name in block.modules()] + rest
    as_built = names == list(model._modules) and all(is_as_built(model, block) for block in blocks)
    return blocks if as_built and type(model.linear) is nn.Linear else None


def residual_block(name, module):
    """The Block that the BasicBlock called `name` is."""
    layers = tuple(Layer(f"{name}.conv{i}", f"{name}.norm{i}", f"{name}.relu{i}") for i in (1, 2))
    shortcut = Layer(f"{name}.shortcut.conv", f"{name}.shortcut.norm") if len(module.shortcut) else None
    return Block(layers, name, shortcut)


def is_as_built(model, block):
    """Whether the modules of a Block are of the types that ConvNet3 and ResNet are built of."""
    layers = list(block.layers) + ([block.shortcut] if block.shortcut else [])
    if block.residual and type(model.get_submodule(block.residual)) is not BasicBlock:
        return False
    for layer in layers:
        conv, norm = model.get_submodule(layer.conv), model.get_submodule(layer.norm)
        if not (is_plain_convolution(conv) and is_known_norm(norm)):
            return False
        if layer.relu and type(model.get_submodule(layer.relu)) is not nn.ReLU:
            return False
        pools = repr(nn.AvgPool2d(2)), repr(nn.MaxPool2d(3, 2, 1))
        if layer.pool and repr(model.get_submodule(layer.pool)) not in pools:
            return False
    return True


def is_plain_convolution(conv):
    """Whether a module is a Conv2d of square strides and zero padding, without groups or dilation."""
    return (type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
            and type(conv.padding) is tuple and len(set(conv.padding)) == len(set(conv.stride)) == 1)


def is_known_norm(norm):
    """Whether a module is what norm_layer makes."""
    if type(norm) is nn.GroupNorm:
        return norm.num_groups == norm.num_channels and norm.affine
    if type(norm) is nn.BatchNorm2d:
        return norm.affine and norm.track_running_stats
    return type(norm) is nn.Identity


#############################################
#              Built by name                #
#############################################


def build_network(config, seed=0):
    """The network that `config` names (model, width, norm, channels, image_size, num_classes), drawn from `seed`.

    A model `package.module:callable` is called with `num_classes=`; resnet10ap is resnet10 with average pooling.
    Raises UserError.
    """
    name, shape = config["model"], [config["channels"], config["image_size"], config["num_classes"]]
    options = {key: config[key] for key in ("width", "norm") if config.get(key)}
    blocks = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}
    plain = name.removesuffix("ap")
    with global_generators_kept():
        seed_everything(seed)
        if name == "convnet3":
            make = partial(ConvNet3, *shape, **options)
        elif plain in blocks:
            width = 64 if config["image_size"] > 64 else 32
            make = partial(ResNet, blocks[plain], *shape, **{"width": width} | options)
        else:
            return build_own(name, config)
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in make().parameters())
        check_memory(f"a network of {weights:,} weights with a copy, gradients and momenta (--width)", 4 * 4 * weights)
        return make() if name == plain else average_pooled(make())


def build_own(name, config):
    """The network of a user: `package.module:callable` called with `num_classes=`; lazy layers see one image."""
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        raise UserError(f"model {name!r}: name the module, not its file: {module[:-3].replace('/', '.')}:{attribute}")
    if not attribute:
        raise UserError(f"unknown model {name!r}: convnet3, resnet10, resnet18 or package.module:callable")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), attribute)(num_classes=config["num_classes"])
        if isinstance(model, nn.Module) and has_lazy_layers(model):
            side = config["image_size"]
            with torch.no_grad():
                model.eval()(torch.zeros(1, config["channels"], side, side))
            model.train()
    except Exception as error:  # a user's code may raise anything
        raise UserError(f"cannot build model {name!r}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    check_own(name, model)
    return model


def check_own(name, model):
    """Raises UserError unless what a user's callable returned is a module that can be worked with."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"model {name!r} gives a {type(model).__name__}, not a torch.nn.Module whose layers can be "
                        "seen")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise UserError(f"model {name!r} has weights on the meta device, without values; build it on the CPU")
    if next(model.parameters(), None) is None:
        raise UserError(f"model {name!r} has no parameters; layers are made when it is built, not in forward")
    if not all(result is model for result in (model.eval(), model.train(), model.to("cpu"))):
        raise UserError(f"model {name!r}: its eval, train or to does not return the module, as those of nn.Module do")


def has_lazy_layers(model):
    return any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in [*model.parameters(), *model.buffers()])


#############################################
#       What can be pruned and trained      #
#############################################


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def weight_names(module):
    """The names of the weights that are pruned in a module: of convolutions, linear layers and attention."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return []


def prunable(model, keep=()):
    """{name: weight parameter} of every convolution and linear layer, in the network's order.

    A weight that several layers share is one parameter, under its first name. Frozen ones stay as they are, and so do
    those whose name fits a pattern of `keep` (as file names do: "linear.*").
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {}
    for module in model.modules():
        for name in weight_names(module):
            weight = module._parameters.get(name)
            if weight is not None and weight.requires_grad:
                weights[first_names[id(weight)]] = weight
    kept = {name for pattern in keep or () for name in fnmatch.filter(weights, pattern)}
    return {name: weight for name, weight in weights.items() if name not in kept}


def roles(model, keep=()):
    """{name of every parameter: "prunable", or why it is not}."""
    of_norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    weights, pruned = prunable(model), prunable(model, keep)

    def role_of(name, parameter):
        if name in weights:
            return "prunable" if name in pruned else "kept dense"
        if not parameter.requires_grad:
            return "frozen"
        if id(parameter) in of_norms:
            return "norm"
        return "bias" if "bias" in name.rpartition(".")[2] else "not of a convolution or linear layer"

    return {name: role_of(name, parameter) for name, parameter in model.named_parameters()}


def print_parameters(model, keep):
    """The table of all parameters: which of them are prunable, and why the others are not."""
    role_of, parameters = roles(model, keep), dict(model.named_parameters())
    width = max(map(len, parameters))
    print(f"{'parameter':<{width}} {'shape':<18} {'number':>11}")
    for name, parameter in parameters.items():
        shape = " x ".join(map(str, parameter.shape))
        print(f"{name:<{width}} {shape:<18} {parameter.numel():>11,}  {role_of[name]}")
    total = sum(parameter.numel() for parameter in parameters.values())
    weights = sum(weight.numel() for weight in prunable(model, keep).values())
    print(f"prunable: {weights:,} of {total:,} parameters, {weights / total:.1%}")


def aliases(model):
    """{name in the state dict: first name} of the parameters that have several names."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    every_name = model.named_parameters(remove_duplicate=False)
    return {name: first_names[id(p)] for name, p in every_name if first_names[id(p)] != name}


def logits_of(output):
    """The logits in what a network returns: the tensor itself, `logits`, or the first of several results."""
    if torch.is_tensor(output):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output and torch.is_tensor(output[0]):
        return output[0]
    raise UserError(f"the network returns a {type(output).__name__} without logits; wanted: a tensor [N, classes], a "
                    "tuple that begins with one, or a dict with `logits`")


GPU_ERROR = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)  # torch before 2.8 has no name for the others


@contextlib.contextmanager
def named_failures(images):
    """Raises UserError for what the code of a user's network raises inside, at `images` like these.

    What a GPU or the memory refuses is no fault of that code, and passes.
    """
    try:
        yield
    except (UserError, GPU_ERROR):
        raise
    except Exception as error:  # a user's code may raise anything
        if is_of_memory(error):
            raise
        shape = " x ".join(map(str, images.shape))
        raise UserError(f"the network fails on images of {shape}: {type(error).__name__}: "
                        f"{first_line(error)}") from error


def logits_at(model, images, view=None):
    """The logits [N, classes] of a network at images [N, C, H, W], by its `view` where it has one.

    Raises UserError for what the network of a user does there instead; a failure of ours is not taken for one.
    """
    if type(model) in (ConvNet3, ResNet) or view not in (None, model):
        return (view or model)(images)
    with named_failures(images):
        logits = logits_of(model(images))
    check_shape(logits, len(images))
    return logits


@contextlib.contextmanager
def left_alone(model):
    """Whatever a forward inside does to parameters, buffers, modes and generators, they are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    held = [(own, name, tensor, tensor.detach().clone()) for module in model.modules()
            for own in (module._parameters, module._buffers) for name, tensor in own.items() if tensor is not None]
    try:
        with global_generators_kept():
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for own, name, tensor, before in held:
                own[name] = tensor
                if not torch.equal(tensor, before):  # writing to it would break a graph that still needs it
                    tensor.copy_(before)


def check_network(model, images, labels, num_classes):
    """Try a forward and backward pass of a few images [N, C, H, W], and one in eval mode, before anything is written.

    The model is left as it was. Raises UserError for what cannot be pruned or trained.
    """
    for name, module in model.named_modules():
        computed = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and "weight" not in module._parameters
        if computed:
            raise UserError(f"{name}.weight is computed from other parameters (weight_norm, spectral_norm or another "
                            "parametrization), so it cannot be pruned; build the network without")
    held = [name for name, value in model.state_dict().items() if not torch.is_tensor(value)]
    if held:
        raise UserError(f"the network's state dict holds {listed(held)}, no tensors, which mask files cannot keep")
    check_memory_apart(model)
    if not prunable(model):
        raise UserError("the network has no weights to prune: no trainable convolution or linear layer")
    hooks = [module.register_forward_pre_hook(refuse_single_values) for module in model.modules()
             if isinstance(module, (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))]
    try:
        with named_failures(images), left_alone(model):
            before = hidden_state(model.train())
            logits = logits_of(model(images.clone()))
            check_logits(logits, len(images), num_classes)
            weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(F.cross_entropy(logits.float(), labels), list(weights.values()),
                                        allow_unused=True)
            name_surprises(model, before, [name for name, g in zip(weights, found) if g is None])
            with torch.no_grad():
                check_logits(logits_of(model.eval()(images.clone())), len(images), num_classes)
    finally:
        for hook in hooks:
            hook.remove()


def hidden_state(model):
    """{name: value} of the numbers and tensors that modules hold beside their state dict, as text."""
    values = {}
    for path, module in model.named_modules():
        beside = vars(module) | {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in beside.items():
            if isinstance(value, (int, float)) or torch.is_tensor(value):
                values[f"{path}.{name}".lstrip(".")] = value.tolist() if torch.is_tensor(value) else value
    return values


def name_surprises(model, hidden_before, unused):
    """Notes on what a pass through the network changed beside its state dict, and on weights that it has not met."""
    hidden = hidden_state(model)
    changed = [name for name in hidden if hidden[name] != hidden_before.get(name)]
    if changed:
        note(f"the network changes {listed(changed)}, which is no part of its state dict: a run that goes on after a "
             "stop will not end with the same bits")
    idle = [name for name in prunable(model) if name in unused]
    if idle:
        note(f"the network does not use {listed(idle)}, pruned like all the others; --keep leaves them out")


def check_memory_apart(model):
    """Raises UserError for two parameters in the same memory, or one in which places share it: one weight, one mask."""
    at = {}
    for name, parameter in model.named_parameters():
        place = parameter.device, parameter.data_ptr()
        shared = None
        if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape)):
            shared = "has several weights in one place of"
        elif parameter.numel() and at.setdefault(place, name) != name:
            shared = f"is another parameter than {at[place]} in its"
        if shared:
            raise UserError(f"{name} {shared} memory; share the parameter itself (b.weight = a.weight), or copy it "
                            "(.clone())")


def check_logits(logits, count, num_classes):
    """Raises UserError unless `logits` is as check_shape says, and finite."""
    check_shape(logits, count, num_classes)
    if not logits.isfinite().all():
        raise UserError("the network returns NaN or infinity before any training")


def check_shape(logits, count, num_classes=None):
    """Raises UserError unless `logits` is [count, num_classes]; without num_classes, [count, any number]."""
    if logits.ndim != 2 or len(logits) != count or num_classes not in (None, logits.shape[1]):
        shape = " x ".join(map(str, logits.shape)) or "one number"
        raise UserError(f"the network returns {shape} for {count} images, wanted {count} x "
                        f"{num_classes or 'classes'}: logits of the dataset's classes")


def refuse_single_values(module, inputs):
    """A hook: a norm over one value gives 0, whatever the image."""
    x = inputs[0]
    groups = getattr(module, "num_groups", x.shape[1])
    if x[0].numel() == groups:
        raise UserError(f"{module} sees planes of one pixel, which it normalises to 0; take --norm batch, or larger "
                        "images")
