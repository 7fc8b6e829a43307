"""Views of a network in which runs of layers are one op; the network's weights and its function stay the same."""
import torch
import torch.nn.functional as F
from torch import nn

from ..networks import BasicBlock, ConvNet3, ResNet
from . import ops

CHUNK = 64  # images that a CPU evaluates at a time, so that their activations stay near

# Layers whose whole function is known. Other modules may hide anything in their forward, and are left as they are.
KNOWN = {nn.Sequential, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.ReLU, nn.AvgPool2d,
         nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout, ConvNet3, BasicBlock, ResNet}


def is_known(model):
    """Whether `model` is known layers one after the other: then its view is proven to be the same function.

    It may run in channels_last and, in eval mode, on chunks of a batch: no layer lets images meet.
    """
    return all(is_known_layer(module) for module in model.modules())


def is_known_layer(module):
    if type(module) not in KNOWN or has_hooks(module) or "forward" in vars(module):
        return False
    if isinstance(module, nn.Dropout):
        return not module.inplace
    if isinstance(module, nn.BatchNorm2d):
        return module.running_mean is not None  # else statistics of the batch, in eval mode too
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1
    if isinstance(module, BasicBlock):
        return list(module._modules) == ["conv1", "norm1", "conv2", "norm2", "relu1", "relu2", "shortcut"]
    return True


def has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


class Fused(nn.Module):
    """A view of a known `model`: shares its parameters, buffers and train or eval mode, computes the same, faster."""

    def __init__(self, model):
        super().__init__()
        self.model, self.copies = [model], []  # in lists: not submodules
        self.network = self.view(model)
        self.readied = [layer for layer in self.network.modules() if hasattr(layer, "ready")]
        self.counted = norms_counted_together(self.network)

    def view(self, module):
        """`module`, or a twin of it in which the runs of layers that have a fused op are one layer."""
        if type(module) is BasicBlock:
            return FoldedBlock(module) if FoldedBlock.takes(module) else module
        children = [self.view(child) for child in module._modules.values()]  # one that is there twice comes twice
        if type(module).forward is nn.Sequential.forward:
            children = fuse_layers(children)
        if children == list(module._modules.values()):
            return module
        twin = object.__new__(type(module))
        twin.__dict__ = module.__dict__ | {"_modules": {str(i): child for i, child in enumerate(children)}}
        self.copies.append((twin, module))
        return twin

    def forward(self, x):
        if torch.is_grad_enabled() or self.model[0].training:
            return self.run(x)
        self.ready()
        return self.evaluate(x)

    def evaluate(self, x):
        """The network, made ready, in eval mode and without gradients."""
        if x.device.type != "cpu":
            return self.run(x)
        return torch.cat([self.run(chunk) for chunk in x.split(CHUNK)])

    def run(self, x):
        """The network, made ready if no gradient is wanted."""
        for twin, module in self.copies:
            twin.training = module.training
        if x.device.type == "cpu" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        y = self.network(x)
        counts = [norm.num_batches_tracked for norm in self.counted if norm.training]
        if counts:
            torch._foreach_add_(counts, 1)
        return y

    def ready(self):
        """Work that depends on the parameters alone, before evaluation."""
        for layer in self.readied:
            layer.ready()

    def after(self, count, x):
        """What an nn.Sequential, made ready, makes of the result of its first `count` layers."""
        for layer in list(self.network.children())[count:]:
            x = layer(x)
        return x


def fuse_layers(layers):
    """The layers of an nn.Sequential with fused ones in place of the runs that have an op."""
    fused = []
    while layers:
        for count, kind in ((4, ConvBlock), (3, NormBlock), (3, FoldedConv), (2, FoldedConv)):
            run = layers[:count]
            if len(run) == count and kind.takes(*run):
                break
        else:
            count, run, kind = 1, layers[:1], not_in_place
        fused.append(kind(*run))
        layers = layers[count:]
    return fused


def not_in_place(layer):
    """`layer`, or for an in-place ReLU one that leaves what an op before it may need."""
    return nn.ReLU() if type(layer) is nn.ReLU and layer.inplace else layer


#############################################
#          Runs that are one op             #
#############################################


def suits_winograd(conv):
    """Whether conv3x3 does what `conv` does, apart from its bias."""
    return (conv.kernel_size == (3, 3) and conv.stride == conv.dilation == conv.padding == (1, 1) and conv.groups == 1
            and conv.padding_mode == "zeros" and conv.in_channels % 16 == conv.out_channels % 16 == 0
            and conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu"))


def convolve(conv, x, weight, bias=None):
    """What `conv` does, with this weight and bias; on a CPU by Winograd's algorithm where that is faster."""
    if bias is None and suits_winograd(conv) and x.dtype == torch.float32 and min(x.shape[2:]) >= 3:
        return torch.ops.lottery.conv3x3(x, weight)
    return conv._conv_forward(x, weight, bias)


def few_tiles(x):
    """Whether conv3x3_norm_relu_pool takes images of this size."""
    height, width = x.shape[2:]
    return min(height, width) >= 3 and -(-height // 4) * -(-width // 4) <= 18


def is_instance_norm(norm):
    if type(norm) is nn.GroupNorm:
        return norm.affine and norm.num_groups == norm.num_channels
    return type(norm) is nn.InstanceNorm2d and norm.affine and not norm.track_running_stats


def is_halving(pool):
    if type(pool) is not nn.AvgPool2d or pool.ceil_mode or pool.divisor_override:
        return False
    pairs = [pool.kernel_size, pool.stride, pool.padding]
    return [value if isinstance(value, tuple) else (value, value) for value in pairs] == [(2, 2), (2, 2), (0, 0)]


class NormBlock(nn.Module):
    """[instance norm, ReLU, AvgPool2d(2)] as one op."""

    @staticmethod
    def takes(norm, relu, pool):
        return is_instance_norm(norm) and type(relu) is nn.ReLU and is_halving(pool)

    def __init__(self, norm, relu, pool):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        sums_in = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.norm.weight.to(sums_in), self.norm.bias.to(sums_in)
        return torch.ops.lottery.norm_relu_pool(x, weight, bias, self.norm.eps)[0]


class ConvBlock(NormBlock):
    """[Conv2d, instance norm, ReLU, AvgPool2d(2)]; on a CPU one op when the convolution reads few channels."""

    @staticmethod
    def takes(conv, *run):
        return type(conv) is nn.Conv2d and NormBlock.takes(*run)

    def __init__(self, conv, *run):
        super().__init__(*run)
        self.conv = conv
        simple = conv.groups == 1 and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        self.few_channels = simple and conv.weight[0].numel() <= 75 and conv.padding in ((0, 0), (1, 1), (2, 2), (3, 3))
        self.kernel = None

    def ready(self):
        winograd = suits_winograd(self.conv) and self.norm.weight.dtype == torch.float32
        self.kernel = torch.ops.lottery.conv3x3_kernel(self.conv.weight) if winograd else None

    def forward(self, x):
        conv, norm = self.conv, self.norm
        same_type = x.dtype == conv.weight.dtype == norm.weight.dtype
        if self.few_channels and x.device.type == "cpu" and same_type and not x.requires_grad:
            op = torch.ops.lottery.conv_norm_relu_pool
            return op(x, conv.weight, norm.weight, norm.bias, conv.padding[0], norm.eps)[0]
        if self.kernel is not None and not torch.is_grad_enabled() and x.dtype == torch.float32 and few_tiles(x):
            return torch.ops.lottery.conv3x3_norm_relu_pool(x, self.kernel, norm.weight, norm.bias, norm.eps)
        return super().forward(convolve(conv, x, conv.weight))


def has_batch_norm_op(norm, x):
    """Whether batch_norm_relu takes x and this BatchNorm2d in training."""
    return (norm.affine and norm.track_running_stats and x.device.type == "cpu" and x.numel() > x.shape[1]
            and x.dtype == norm.weight.dtype == torch.float32)


def batch_norm(norm, x):
    """norm(x) in training, without counting the batch."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)


def batch_norm_relu(norm, x, residual, relu):
    """relu(norm(x) + residual) of a BatchNorm2d in training, whose running statistics it updates."""
    y, mean, variance = torch.ops.lottery.batch_norm_relu(x, norm.weight, norm.bias, residual, relu, norm.eps)
    ops.update_running_statistics(norm, mean, variance, x.numel() // x.shape[1])
    return y


def norms_counted_together(network):
    """The BatchNorms of FoldedConvs on a GPU, whose batches are counted in one launch and not by their layers.

    Not those that are there twice, nor those that average over all batches and need the count.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, FoldedConv)]
    norms = [layer.norm for layer in layers]
    for layer in layers:
        on_cpu = layer.norm.num_batches_tracked.device.type == "cpu"
        layer.counts = on_cpu or layer.norm.momentum is None or norms.count(layer.norm) > 1
    return [layer.norm for layer in layers if not layer.counts]


class FoldedConv(nn.Module):
    """[Conv2d, BatchNorm2d] or [Conv2d, BatchNorm2d, ReLU]: one op behind the convolution in training, folded into it
    in eval mode when no gradient is wanted."""

    @staticmethod
    def takes(conv, norm, relu=None):
        return type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and type(relu) in (nn.ReLU, type(None))

    def __init__(self, conv, norm, relu=None):
        super().__init__()
        self.conv, self.norm, self.relu, self.counts = conv, norm, relu, True

    def ready(self):
        """Fold the norm into the convolution's weight and bias."""
        conv, norm = self.conv, self.norm
        self.folds = not norm.training and norm.running_mean is not None
        if self.folds:
            scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
            bias = (0 if conv.bias is None else conv.bias) - norm.running_mean
            self.bias = torch.addcmul(torch.zeros_like(bias) if norm.bias is None else norm.bias, bias, scale)
            self.weight = conv.weight * scale[:, None, None, None]
            self.winograd = self.relu is not None and suits_winograd(conv)
            if self.winograd:
                self.weight = torch.ops.lottery.conv3x3_kernel(self.weight)

    def forward(self, x, shortcut=None):
        """relu(norm(conv(x)) + shortcut), or without a ReLU norm(conv(x))."""
        conv, norm = self.conv, self.norm
        if torch.is_grad_enabled() or not self.folds:
            y = convolve(conv, x, conv.weight, conv.bias)
            if norm.training and has_batch_norm_op(norm, y):
                return batch_norm_relu(norm, y, shortcut, self.relu is not None)
            y = norm(y) if self.counts or not norm.training else batch_norm(norm, y)
            y = y if shortcut is None else y + shortcut
            return y if self.relu is None else self.relu(y)
        if self.relu is None:
            return conv._conv_forward(x, self.weight, self.bias)
        y = torch.ops.lottery.conv3x3(x, self.weight) if self.winograd else conv._conv_forward(x, self.weight, None)
        torch.ops.lottery.bias_relu_(y, self.bias.to(y.dtype), shortcut)
        return y


class FoldedBlock(nn.Module):
    """A BasicBlock of BatchNorms, as folded convolutions."""

    @staticmethod
    def takes(block):
        pairs = [(block.conv1, block.norm1, block.relu1), (block.conv2, block.norm2, block.relu2)]
        shortcut = list(block.shortcut)
        return all(FoldedConv.takes(*pair) for pair in pairs) and (
            not shortcut or len(shortcut) == 2 and FoldedConv.takes(*shortcut))

    def __init__(self, block):
        super().__init__()
        self.conv1 = FoldedConv(block.conv1, block.norm1, block.relu1)
        self.conv2 = FoldedConv(block.conv2, block.norm2, block.relu2)
        self.shortcut = FoldedConv(*block.shortcut) if len(block.shortcut) else nn.Identity()

    def forward(self, x):
        return self.conv2(self.conv1(x), self.shortcut(x))
