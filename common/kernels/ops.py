"""The ops of csrc/: each beside the PyTorch function that is its reference, fallback and documentation.

<op>_reference says what an op computes, <op>_fake the shapes it returns (for meta tensors), <op>_save and
<op>_gradient how autograd goes through it. `load` chooses between compiled ops and plain PyTorch, once.
"""
import functools
import sys

import torch
import torch.nn.functional as F

from . import build


@functools.cache
def load():
    """Whether there are compiled ops; the first call finds or builds them, says so, and tells autograd of them."""
    if not build.load():
        return False
    for name, fake in FAKES.items():
        torch.library.register_fake(f"lottery::{name}", fake)
    for name, (save, gradient) in GRADIENTS.items():
        torch.library.register_autograd(f"lottery::{name}", if_any(gradient), setup_context=without_zeros(save))
    return True


def without_zeros(save):
    """`save`, telling autograd to make no zeros as gradients of the statistics, which nobody differentiates."""
    def saved(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    return saved


def if_any(gradient):
    """`gradient`, none where none comes for the result."""
    def through(ctx, grad, *others):
        return (None,) * len(ctx.needs_input_grad) if grad is None else gradient(ctx, grad, *others)

    return through


@functools.cache
def runs_on(device_type):
    """Whether compiled ops are there for "cpu" or "cuda", and this GPU takes them; said once where it does not."""
    if not load() or not build.has_kernels(device_type):
        return False
    try:
        torch.ops.lottery.combine_(*(torch.ones(1, 1, device=device_type) for _ in range(3)), None)
    except RuntimeError as error:  # built for another architecture
        print(f"csrc: PyTorch fallback on {device_type}: {build.reason_of(error)}", file=sys.stderr)
        return False
    return True


def layout(x):
    """Memory format in which the ops leave their results: channels_last on a CPU, elsewhere that of x."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last or x.device.type == "cpu" else torch.contiguous_format


#############################################
#         Updates and points of states      #
#############################################


@torch.no_grad()
def masked_sgd_reference(params, grads, momenta, masks, lr, momentum=0., weight_decay=0., dampening=0., nesterov=False):
    """One SGD step in place, equal to torch.optim.SGD followed by multiplying with the masks.

    Lists of tensors of equal length; a mask is a bool tensor or None; `lr` a number, or a float32 tensor of one
    on the params' device. A pruned weight and its momentum are exactly 0 afterwards. (torch dampens from the second
    step on: pass dampening=0 in the first.)
    """
    grads = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads, alpha=1 - dampening)
    steps = torch._foreach_add(grads, momenta, alpha=momentum) if nesterov else momenta
    if torch.is_tensor(lr):  # whose value nobody waits for
        torch._foreach_sub_(params, torch._foreach_mul(steps, lr))
    else:
        torch._foreach_add_(params, steps, alpha=-lr)
    for param, velocity, mask in zip(params, momenta, masks):
        if mask is not None:
            param.mul_(mask)
            velocity.mul_(mask)


def masked_sgd_(params, grads, momenta, masks, lr, momentum=0., weight_decay=0., dampening=0., nesterov=False):
    """masked_sgd_reference, with float32 momenta in one pass over memory; parameters also bfloat16 or float16."""
    if not runs_on(params[0].device.type) or any(v.dtype != torch.float32 for v in momenta):
        lr = float(lr) if params[0].device.type == "cpu" else lr
        return masked_sgd_reference(params, grads, momenta, masks, lr, momentum, weight_decay, dampening, nesterov)
    lr = torch.as_tensor(lr, dtype=torch.float32, device=params[0].device)
    torch.ops.lottery.masked_sgd_(params, grads, momenta, masks, lr, momentum, dampening, weight_decay, nesterov)


def combine_reference(states, coefficients, keep=None):
    """Points [K, P] of weight space: coefficients [K, M] over states [M, P] (float32), 0 where keep [P] is False.

    Op: combine_(points, states, coefficients, keep), in place.
    """
    points = coefficients @ states
    return points if keep is None else points.where(keep, points.new_zeros(()))


def cross_entropy_top1_reference(logits, labels):
    """Sums [K, 3] (float64) over B images of each network's loss, squared loss and correct top-1 classes.

    logits [K, B, C], labels [B]; of equal logits the first is the top one. Op: cross_entropy_top1(logits, labels).
    """
    losses = F.cross_entropy(logits.float().movedim(2, 1), labels.expand(len(logits), -1), reduction="none").double()
    return torch.stack([losses.sum(1), losses.square().sum(1), (logits.argmax(2) == labels).sum(1).double()], 1)


def cross_entropy_top1_fake(logits, labels):
    return logits.new_empty(len(logits), 3, dtype=torch.float64)


#############################################
#        Norm, ReLU and average pooling     #
#############################################


def norm_relu_pool_reference(x, weight, bias, eps=1e-5):
    """Instance norm with affine, ReLU and 2x2 average pooling: x [N, C, H, W] -> [N, C, H // 2, W // 2].

    Op: norm_relu_pool(x, weight, bias, eps) -> (pooled, mean [N, C], 1 / standard deviation [N, C]), of which pooled
    has a gradient (norm_relu_pool_backward). weight and bias are float32 for x in bfloat16 or float16.
    """
    normal = F.instance_norm(x.to(weight.dtype), weight=weight, bias=bias, eps=eps)
    return F.avg_pool2d(F.relu(normal), 2).to(x.dtype)


def pooled_like(x, weight, height, width):
    """Empty results of norm, ReLU and pooling of [N, C, height, width], and its statistics."""
    shape = (len(x), len(weight), height // 2, width // 2)
    pooled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    return pooled, weight.new_empty(shape[:2]), weight.new_empty(shape[:2])


def norm_relu_pool_fake(x, weight, bias, eps):
    return pooled_like(x, weight, *x.shape[2:])


def norm_relu_pool_backward_fake(grad, x, weight, bias, mean, rstd):
    return torch.empty_like(x, memory_format=layout(x)), torch.empty_like(weight), torch.empty_like(bias)


def norm_relu_pool_save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def norm_relu_pool_gradient(ctx, grad, *_):
    return *torch.ops.lottery.norm_relu_pool_backward(grad, *ctx.saved_tensors), None


def norm_relu_pool_points_reference(x, weight, bias, eps=1e-5):
    """norm_relu_pool of K points whose channels lie side by side: x [N, K C, H, W], weight and bias [K, C] -> [K, N, C,
    H // 2, W // 2].

    Op: norm_relu_pool_points(x, weight, bias, eps), on a GPU, without gradient.
    """
    return torch.stack(norm_relu_pool_reference(x, weight.flatten(), bias.flatten(), eps).chunk(len(weight), 1))


def norm_relu_pool_points_fake(x, weight, bias, eps):
    pooled = x.new_empty(len(weight), len(x), x.shape[2] // 2, x.shape[3] // 2, weight.shape[1])
    return pooled.permute(0, 1, 4, 2, 3)


#############################################
#    The same behind a convolution of few   #
#############################################


def conv_norm_relu_pool_reference(x, kernel, weight, bias, padding, eps=1e-5):
    """norm_relu_pool of a stride-1 convolution: x [N, I, H, W], kernel [C, I, h, w]. Made for few input channels.

    Op: conv_norm_relu_pool(x, kernel, weight, bias, padding, eps), returning what norm_relu_pool does; a gradient
    reaches kernel, weight and bias, not x.
    """
    return norm_relu_pool_reference(F.conv2d(x, kernel, padding=padding), weight, bias, eps)


def conv_norm_relu_pool_fake(x, kernel, weight, bias, padding, eps):
    return pooled_like(x, weight, *(x.shape[d] + 2 * padding - kernel.shape[d] + 1 for d in (2, 3)))


def conv_norm_relu_pool_backward_fake(grad, x, kernel, weight, bias, mean, rstd, padding):
    dkernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)
    return dkernel, torch.empty_like(weight), torch.empty_like(bias)


def conv_norm_relu_pool_save(ctx, inputs, output):
    *tensors, ctx.padding, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def conv_norm_relu_pool_gradient(ctx, grad, *_):
    if ctx.needs_input_grad[0]:
        raise NotImplementedError("conv_norm_relu_pool has no gradient for its input")
    backward = torch.ops.lottery.conv_norm_relu_pool_backward
    return None, *backward(grad, *ctx.saved_tensors, ctx.padding), None, None


def conv_norm_relu_pool_points_reference(x, kernels, coefficients, weight, bias, padding, eps=1e-5):
    """conv_norm_relu_pool at K points between M networks: kernels [M, C, I, h, w], coefficients [K, M], weight and bias
    [K, C]; returns [K, N, C, H // 2, W // 2].

    Op: conv_norm_relu_pool_points(x, kernels, coefficients, weight, bias, padding, eps), without gradient, M 2 or 3, C
    a multiple of 16, float32 on a CPU. A convolution is linear in its kernel: M of them serve any number of points.
    """
    points = torch.einsum("km,mcihw->kcihw", coefficients, kernels)
    return torch.stack([conv_norm_relu_pool_reference(x, *point, padding, eps) for point in zip(points, weight, bias)])


def conv_norm_relu_pool_points_fake(x, kernels, coefficients, weight, bias, padding, eps):
    size = ((x.shape[d] + 2 * padding - kernels.shape[d + 1] + 1) // 2 for d in (2, 3))
    return x.new_empty(len(weight), len(x), *size, weight.shape[1]).movedim(4, 2)


#############################################
#          3x3 convolution, Winograd        #
#############################################


def conv3x3_reference(x, kernel):
    """Convolution with stride 1 and padding 1, x [N, I, H, W], kernel [O, I, 3, 3], I and O multiples of 16, float32.

    Op: conv3x3(x, kernel), by Winograd's algorithm: a quarter of the multiplications, about ten times the rounding.
    Without gradients it also takes conv3x3_kernel(kernel), the kernel made ready once for several calls.
    """
    return F.conv2d(x, kernel, padding=1)


def conv3x3_fake(x, kernel):
    shape = (len(x), len(kernel) * (16 if kernel.ndim == 3 else 1), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def conv3x3_kernel_fake(kernel):
    return kernel.new_empty(len(kernel) // 16, 36, (kernel.shape[1] + 1) * 16)


def conv3x3_backward_fake(grad, x, kernel):
    dx = torch.empty_like(x, memory_format=layout(x))
    return dx, torch.empty_like(kernel, memory_format=torch.contiguous_format)


def conv3x3_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def conv3x3_gradient(ctx, grad):
    return torch.ops.lottery.conv3x3_backward(grad, *ctx.saved_tensors)


def conv3x3_norm_relu_pool_reference(x, kernel, weight, bias, eps=1e-5):
    """norm_relu_pool of conv3x3, planes of at most 18 tiles of 4 x 4.

    Op: conv3x3_norm_relu_pool(x, conv3x3_kernel(kernel), weight, bias, eps), without gradient.
    """
    return norm_relu_pool_reference(conv3x3_reference(x, kernel), weight, bias, eps)


def conv3x3_norm_relu_pool_fake(x, kernel, weight, bias, eps):
    return pooled_like(x, weight, *x.shape[2:])[0]


#############################################
#       BatchNorm, shortcut and ReLU        #
#############################################


def batch_norm_relu_reference(x, weight, bias, residual=None, relu=True, eps=1e-5):
    """relu(batch_norm(x) + residual) with the statistics of the batch, x [N, C, H, W]; without the ReLU if not `relu`.

    Op: batch_norm_relu(x, weight, bias, residual, relu, eps) -> (result, mean [C], biased variance [C]), of which the
    result has a gradient (batch_norm_relu_backward). float32 on a CPU.
    """
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def batch_norm_relu_fake(x, weight, bias, residual, relu, eps):
    return torch.empty_like(x, memory_format=layout(x)), torch.empty_like(weight), torch.empty_like(weight)


def batch_norm_relu_backward_fake(grad, x, y, weight, bias, mean, variance, relu, eps):
    dx = torch.empty_like(x, memory_format=layout(x))
    return dx, torch.empty_like(weight), torch.empty_like(weight), x.new_empty(0) if y is None else dx.clone()


def batch_norm_relu_save(ctx, inputs, output):
    x, weight, bias, residual, ctx.relu, ctx.eps = inputs
    y, mean, variance = output
    ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, variance)


def batch_norm_relu_gradient(ctx, grad, *_):
    backward = torch.ops.lottery.batch_norm_relu_backward
    dx, dweight, dbias, dresidual = backward(grad, *ctx.saved_tensors, ctx.relu, ctx.eps)
    return dx, dweight, dbias, dresidual if ctx.saved_tensors[1] is not None else None, None, None


@torch.no_grad()
def update_running_statistics(norm, mean, variance, count):
    """What nn.BatchNorm2d does to its buffers in training."""
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), momentum)


def bias_relu_reference(x, bias, shortcut=None):
    """relu(x + bias[channel] + shortcut), x and shortcut [N, C, H, W]. Op: bias_relu_(x, bias, shortcut), in place."""
    return F.relu(x + bias[:, None, None] + (0 if shortcut is None else shortcut))


#############################################
#                Augmentation               #
#############################################


def recolour(images, colour):
    """Brightness, then saturation about each pixel's grey, then contrast about each image's mean, as one sum.

    images [N, C, H, W], colour [N or 1, 3].
    """
    brightness, saturation, contrast = (part.view(-1, 1, 1, 1) for part in colour.unbind(1))
    if images.shape[1] == 1:
        saturation = torch.ones_like(saturation)
    grey = images.mean(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)  # saturation does not change it
    rest = contrast * (1 - saturation) * grey + ((1 - contrast) * mean + brightness)
    return torch.addcmul(rest, images, contrast * saturation)


def dsa_reference(images, colour, transform):
    """`recolour`, then pixel (row i, column j) of every image [C, H, W] is read bilinearly at column a j + b i + c and
    row d j + e i + f; what lies outside is 0. colour [N, 3], transform [N, 6] = a ... f.

    Op: dsa(images, colour, transform), float32, at most 4 channels, without gradient.
    """
    height, width = images.shape[2:]
    rows, columns = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    a, b, c, d, e, f = (part.view(-1, 1, 1) for part in transform.unbind(1))
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 3)
    return F.grid_sample(recolour(images, colour), grid.to(images.dtype), align_corners=False)


def dsa_fake(images, colour, transform):
    return torch.empty_like(images, memory_format=layout(images))


def nothing_fake(*_):
    """Of an op that returns nothing: it changes tensors in place."""


FAKES = {
    "masked_sgd_": nothing_fake,
    "combine_": nothing_fake,
    "bias_relu_": nothing_fake,
    "dsa": dsa_fake,
    "cross_entropy_top1": cross_entropy_top1_fake,
    "norm_relu_pool": norm_relu_pool_fake,
    "norm_relu_pool_backward": norm_relu_pool_backward_fake,
    "norm_relu_pool_points": norm_relu_pool_points_fake,
    "conv_norm_relu_pool": conv_norm_relu_pool_fake,
    "conv_norm_relu_pool_backward": conv_norm_relu_pool_backward_fake,
    "conv_norm_relu_pool_points": conv_norm_relu_pool_points_fake,
    "conv3x3": conv3x3_fake,
    "conv3x3_kernel": conv3x3_kernel_fake,
    "conv3x3_backward": conv3x3_backward_fake,
    "conv3x3_norm_relu_pool": conv3x3_norm_relu_pool_fake,
    "batch_norm_relu": batch_norm_relu_fake,
    "batch_norm_relu_backward": batch_norm_relu_backward_fake,
}
GRADIENTS = {
    "norm_relu_pool": (norm_relu_pool_save, norm_relu_pool_gradient),
    "conv_norm_relu_pool": (conv_norm_relu_pool_save, conv_norm_relu_pool_gradient),
    "conv3x3": (conv3x3_save, conv3x3_gradient),
    "batch_norm_relu": (batch_norm_relu_save, batch_norm_relu_gradient),
}
