"""Training and evaluation whose cost falls with the number of surviving weights, on the CPU.

`SparseNetwork(model, mask)` is a view of a ConvNet3 or ResNet: it shares the parameters and buffers and computes the
same function, but meets only the surviving weights, forward and backward, and norm, ReLU, pooling and residual addition
happen while the result of a convolution is in the cache. csrc/cpu/sparse/ describes the layout [B, C, H, W, L] in
which activations travel between the layers. Needs the compiled extension.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..networks import ResNet, blocks_of
from . import ops

AFFINE, INSTANCE, BATCH = 0, 1, 2  # enum Norm of the compiled op
HALO = 1  # zeros around every activation that a convolution reads
CHUNK = 64  # images at a time when no gradient is wanted

#############################################
#                  Layout                   #
#############################################


class Blocked(NamedTuple):
    """Activations of a batch: data [B, C, H + 2 halo, W + 2 halo, L] for B * L >= images."""

    data: torch.Tensor
    halo: int
    images: int

    def inside(self):
        h, w = (size - 2 * self.halo for size in self.data.shape[2:4])
        return self.data.narrow(2, self.halo, h).narrow(3, self.halo, w)


class ChangeLayout(torch.autograd.Function):
    """[N, C, H, W], channels last, C a multiple of 16 -> the data of a Blocked."""

    @staticmethod
    def forward(ctx, x, halo):
        ctx.halo, ctx.images = halo, len(x)
        return torch.ops.lottery.sparse_blocked(x, halo)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.lottery.sparse_unblocked(grad.contiguous(), ctx.halo, ctx.images), None


def blocked(x, halo):
    """[N, C, H, W] -> Blocked; the lanes after the last image are 0. A Blocked is left as it is."""
    if isinstance(x, Blocked):
        return x
    if x.shape[1] % 16 == 0:
        return Blocked(ChangeLayout.apply(x.contiguous(memory_format=torch.channels_last), halo), halo, len(x))
    lanes, n = torch.ops.lottery.sparse_lanes(), len(x)
    x = F.pad(x, (halo,) * 4 + (0, 0, 0, -n % lanes))
    return Blocked(x.unflatten(0, (-1, lanes)).permute(0, 2, 3, 4, 1).contiguous(), halo, n)


class ChangeLayoutBack(torch.autograd.Function):
    """The data of a Blocked, C a multiple of 16 -> [N, C, H, W], channels last."""

    @staticmethod
    def forward(ctx, data, halo, images):
        ctx.halo = halo
        return torch.ops.lottery.sparse_unblocked(data, halo, images)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous(memory_format=torch.channels_last)
        return torch.ops.lottery.sparse_blocked(grad, ctx.halo), None, None


def unblocked(x):
    """Blocked -> [N, C, H, W]."""
    if x.data.shape[1] % 16 == 0:
        return ChangeLayoutBack.apply(x.data, x.halo, x.images)
    return x.inside().permute(0, 4, 1, 2, 3).flatten(0, 1)[:x.images]


#############################################
#                Convolution                #
#############################################


class SparseConv(torch.autograd.Function):
    """y = pool(relu(norm(conv(x) + bias) + residual)); the gradient of the weight is 0 where the mask is."""

    @staticmethod
    def forward(ctx, conv, keep, options, x, weight, bias, gamma, beta, residual):
        norm, eps, relu, pool, halo, images = options
        y, z, mean, rstd, variance = torch.ops.lottery.sparse_conv_forward(
            conv, x, weight, bias, gamma, beta, residual, norm, eps, relu, pool, halo, images, keep)
        ctx.conv, ctx.options, ctx.residual = conv, options, residual is not None
        ctx.save_for_backward(x, y if ctx.residual else mean, z, mean, rstd, weight, bias, gamma, beta)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx, dy, *_):
        norm, _, relu, pool, halo, images = ctx.options
        x, y, z, mean, rstd, weight, bias, gamma, beta = ctx.saved_tensors
        dx, dweight, dbias, dgamma, dbeta, dresidual = torch.ops.lottery.sparse_conv_backward(
            ctx.conv, dy.contiguous(), x, y, z, mean, rstd, weight, bias, gamma, beta, ctx.residual, norm, relu, pool,
            halo, images, ctx.needs_input_grad[3])
        affine = (dgamma, dbeta) if gamma is not None else (None, None)
        return None, None, None, dx, dweight, dbias, *affine, dresidual


def sparse_conv(conv, x, weight, bias=None, gamma=None, beta=None, residual=None, norm=AFFINE, eps=1e-5, relu=False,
                pool=1, halo=HALO):
    """Sparse convolution of x (Blocked) and what follows it; returns (Blocked, mean [B, C, L], variance [C]).

    `conv` is a torch.classes.lottery.SparseConv. `norm` is AFFINE (gamma and beta as given, or neither), INSTANCE or
    BATCH (statistics of this batch, whose mean and biased variance are returned). `pool` 2 averages 2x2 after the ReLU.
    """
    options = (norm, eps, relu, pool, halo, x.images)
    keep = torch.is_grad_enabled()
    y, mean, variance = SparseConv.apply(conv, keep, options, x.data, weight.contiguous(), bias, gamma, beta, residual)
    return Blocked(y, halo, x.images), mean, variance


def norm_arguments(norm, training):
    """What sparse_conv should do for a norm layer of common.norm_layer."""
    if isinstance(norm, nn.Identity):
        return {}
    if isinstance(norm, nn.GroupNorm):
        return dict(norm=INSTANCE, eps=norm.eps, gamma=norm.weight, beta=norm.bias)
    if training:
        return dict(norm=BATCH, eps=norm.eps, gamma=norm.weight, beta=norm.bias)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return dict(gamma=scale, beta=norm.bias - norm.running_mean * scale)


class Stage:
    """Convolution, norm, residual addition, ReLU and pooling on Blocked activations (the first takes [N, C, H, W])."""

    def __init__(self, conv, norm, mask, plans, relu=True, pool=1, halo=HALO):
        self.conv, self.norm, self.mask, self.plans = conv, norm, mask, plans
        self.relu, self.pool, self.halo = relu, pool, halo

    def __call__(self, x, residual=None):
        x, training = blocked(x, self.conv.padding[0]), self.norm.training
        plan = plan_for(self.plans, self.mask, x, self.conv.stride[0], self.conv.padding[0])
        y, mean, variance = sparse_conv(plan, x, self.conv.weight, self.conv.bias, residual=residual and residual.data,
                                        relu=self.relu, pool=self.pool, halo=self.halo,
                                        **norm_arguments(self.norm, training))
        if training and isinstance(self.norm, nn.BatchNorm2d):
            ops.update_running_statistics(self.norm, mean[0, :, 0], variance, x.images * plan.positions())
        return y


class Classifier:
    """The linear layer, too small for lists; returns [N, classes]."""

    def __init__(self, linear, mask):
        self.linear, self.mask = linear, mask

    def __call__(self, x):
        return F.linear(unblocked(x).flatten(1), self.linear.weight * self.mask, self.linear.bias)


def plan_for(plans, mask, x, stride, padding):
    """The lists of surviving weights for images of x's size, made once."""
    height, width = (size - 2 * x.halo for size in x.data.shape[2:4])
    key = height, width, x.halo
    if key not in plans:
        plans[key] = torch.classes.lottery.SparseConv(mask, *key, stride, padding)
    return plans[key]


def max_pool(x):
    """3x3 / 2 on activations that are not negative, so that the halo's zeros never win."""
    b, c, h, w, lanes = x.data.shape
    y = F.max_pool3d(x.data.view(b * c, 1, h, w, lanes), (3, 3, 1), (2, 2, 1))
    padded = F.pad(y, (0, 0) + (HALO,) * 4)
    return Blocked(padded.view(b, c, *padded.shape[2:]), HALO, x.images)


def global_average_pool(x):
    return Blocked(x.inside().mean((2, 3), keepdim=True), 0, x.images)


#############################################
#             The network's view            #
#############################################


def supports(model):
    """Whether SparseNetwork can be made of a model: float32 on the CPU, and a network built as we build it."""
    first = next(model.parameters(), None)
    return blocks_of(model) is not None and first.dtype == torch.float32 and first.device.type == "cpu"


class SparseNetwork:
    """A view of `model` that computes images [N, C, H, W] -> logits [N, classes], sharing its parameters and buffers.

    `mask` says which weights survive; the others are taken as 0, whatever they are, and get gradient 0. Without
    gradients the images are taken in chunks that suit the cache. `dense`: views (dense.Fused) of the blocks that the
    network begins with, whose pruned weights should be 0 and may get gradients. `plans`: a dict that views with one
    mask share.
    """

    def __init__(self, model, mask, dense=(), plans=None):
        self.model, self.mask, self.dense = model, mask, dense
        self.plans = {} if plans is None else plans
        self.parts = [view.run for view in dense]
        blocks = blocks_of(model)
        for block in blocks[len(dense):]:
            self.parts += self.parts_of(block)
        if isinstance(model, ResNet):
            self.parts.append(global_average_pool)
        self.parts.append(Classifier(model.linear, mask["linear.weight"]))

    def parts_of(self, block):
        """The steps of a sparse block, Blocked -> Blocked."""
        if block.residual:
            return [self.residual_block(block)]
        return self.plain_block(block, last=block == blocks_of(self.model)[-1])

    def stage(self, layer, **options):
        plans = self.plans.setdefault(layer.conv, {})
        conv, norm = map(self.model.get_submodule, (layer.conv, layer.norm))
        return Stage(conv, norm, self.mask[f"{layer.conv}.weight"], plans, **options)

    def plain_block(self, block, last):
        """The steps of a block without a shortcut; what the classifier reads needs no halo."""
        layer, = block.layers
        if not layer.pool:
            return [self.stage(layer)]
        if isinstance(self.model.get_submodule(layer.pool), nn.MaxPool2d):
            return [self.stage(layer), max_pool]
        return [self.stage(layer, pool=2, halo=0 if last else HALO)]

    def residual_block(self, block):
        """The step that a networks.BasicBlock is."""
        first, second = map(self.stage, block.layers)
        shortcut = self.stage(block.shortcut, relu=False) if block.shortcut else lambda x: x

        def step(x):
            x = blocked(x, HALO)
            return second(first(x), residual=shortcut(x))

        return step

    def __call__(self, images):
        if self.model.training or torch.is_grad_enabled():
            return self.after(0, images)
        self.ready()
        return self.evaluate(images)

    def evaluate(self, images):
        """The network, made ready, in eval mode and without gradients."""
        return torch.cat([self.after(0, chunk) for chunk in images.split(CHUNK)])

    def ready(self):
        """Work that depends on the parameters alone, before evaluation."""
        for view in self.dense:
            view.ready()

    def after(self, count, x):
        """What the network, made ready, makes of the result of its first `count` parts."""
        for part in self.parts[count:]:
            x = part(x)
        return x
