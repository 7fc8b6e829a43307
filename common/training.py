"""SGD under a mask: one loop for pruning rounds, evaluations and endpoints, which goes on from any step."""
import contextlib
import copy
import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import captured, curves, files, ranks, together
from .augment import augmented, draw_batch, even
from .bars import Bar
from .errors import UserError
from .interrupts import Stopped, deferred
from .kernels import ops, views
from .masks import apply_mask
from .networks import blocks_of, logits_at
from .streams import global_generators_kept, seed_from

#############################################
#             Recipe and progress           #
#############################################


class Recipe(NamedTuple):
    """How a network is trained: SGD, learning rate times 0.2 at 2/3 and 5/6 of the epochs (paper's code)."""

    epochs: int
    lr: float = .01
    momentum: float = .9
    weight_decay: float = 5e-4
    batch_size: int = 64
    augment: str = "dsa"
    cutmix: float = .5
    flip: bool = True
    amp: bool = False  # train in bfloat16

    @property
    def skips_zeros(self):
        """Whether the step has a form that skips pruned weights."""
        return not self.amp

    def learning_rate(self, epoch):
        return self.lr * .2 ** ((epoch >= 2 * self.epochs // 3) + (epoch >= 5 * self.epochs // 6))


def recipe_of(config, epochs):
    """The recipe that `config` holds, for a number of epochs."""
    return Recipe(epochs, **{field: config[field] for field in Recipe._fields[1:] if field in config})


@dataclass
class Training:
    """Where a training stands; with the network and the generator as they are then, all that it goes on from."""

    epoch: int = 0  # finished ones
    step: int = 0  # batches done in the epoch after them,
    order: torch.Tensor = None  # whose images come in this order
    losses: list = field(default_factory=list)  # of its batches
    hits: int = 0  # right answers in it
    momenta: list = None
    images_seen: int = 0
    loss: float = math.nan  # mean over the last finished epoch, on augmented batches
    accuracy: float = math.nan

    def finish_epoch(self, lr):
        """Sum up the epoch: the only wait for a GPU in it. Raises UserError on a loss that is not finite."""
        together.hand_on()
        losses = torch.stack(self.losses).tolist()
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at epoch {self.epoch}, step {step}; "
                                f"try a lower --lr than {lr}")
        self.loss, self.accuracy = sum(losses) / len(losses), float(self.hits) / len(self.order)
        self.images_seen += len(self.order)
        self.epoch, self.step, self.order, self.losses, self.hits = self.epoch + 1, 0, None, [], 0


#############################################
#                 The loop                  #
#############################################


def train(model, split, recipe, generator, mask=None, until=None, training=None, progress=None):
    """Train `model` in place on `split` and return the Training; weights outside `mask` are and stay exactly 0.

    A GPU replays the step as a CUDA graph (captured.py) and is waited for at the end of an epoch alone.

    `until`: the epoch of the recipe's schedule to stop after (the last one). `training`: where to go on from, with
    `model` and `generator` as they were then. Every random draw comes from `generator`, or repeats with it.
    `progress(training)` is called after every step and every epoch. Raises UserError on what is not finite.
    """
    apply_mask(model, mask or {})
    training = training or Training()
    training.momenta = training.momenta or [torch.zeros_like(p) for p in trainable(model).values()]
    progress = progress or (lambda training: None)
    draws_itself = blocks_of(model) is None  # a network of others may have dropout, or draw anything else
    model.train()
    step = fastest_step(model, split, mask, training.momenta, recipe)
    with global_generators_kept():
        while training.epoch < (recipe.epochs if until is None else until):
            lr = recipe.learning_rate(training.epoch)
            if training.order is None:
                training.order = torch.randperm(len(split), generator=generator)
            left = batches(training.order, recipe.batch_size)[training.step:]
            for draws in epoch_of(left, lr, split, recipe, generator):
                if draws_itself:
                    together.wait_before_drawing()
                    seed_from(generator, model)
                loss, hits = step(draws)
                training.losses.append(loss)
                training.hits += hits
                training.step += 1
                if training.step % together.STEPS == 0:
                    together.hand_on()
                progress(training)
            training.finish_epoch(recipe.lr)
            progress(training)
    check_finite(model, recipe, training)
    return training


def trainable(model):
    """{name: parameter} of those that are trained; frozen ones stay as they are."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batches(order, size):
    """Indices `order` cut into batches; a last one of one image joins the one before, as BatchNorm cannot take it."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1 < size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def epoch_of(left, lr, split, recipe, generator):
    """Yield the Draws of the batches that are `left` of an epoch; `generator` stands where each of them left it.

    Where steps are captured they are Rows, gone up to the GPU together.
    """
    drawn = (draw_batch(index, lr, split, recipe, generator) for index in left)
    if not captured.can_capture(split.labels.device):
        yield from drawn
        return
    ahead = [(even(draws, recipe, split), generator.get_state()) for draws in drawn]
    rows = captured.rows_on(split.labels.device, [draws for draws, _ in ahead])
    for row, (_, state) in zip(rows, ahead):
        generator.set_state(state)
        yield row


def fastest_step(model, split, mask, momenta, recipe):
    """make_step; where there are CUDA graphs, one that replays them."""
    step = make_step(model, split, mask, momenta, recipe)
    if not captured.can_capture(split.labels.device):
        return step

    def twin():
        network = copy.deepcopy(model)
        return network, make_step(network, split, mask, [torch.zeros_like(m) for m in momenta], recipe)

    return captured.Captured(step, twin)


def make_step(model, split, mask, momenta, recipe):
    """A function (Draws of a batch) -> (loss, right answers) that makes one SGD step of `model` under `mask`."""
    names, params = zip(*trainable(model).items())
    masks = [(mask or {}).get(name) for name in names]
    network = views.view(model, mask, recipe.skips_zeros, sample=split.batch(slice(0, 2)))
    zeros = params[0].new_zeros(max(p.numel() for p in params))

    def step(draws):
        batch = augmented(split, draws)
        with torch.autocast(batch.images.device.type, torch.bfloat16) if recipe.amp else contextlib.nullcontext():
            logits = logits_at(model, batch.images, network)
        loss = loss_of(logits, batch)
        grads = [zeros[:p.numel()].view(p.shape).to(p.dtype) if grad is None else grad  # a bias before a norm has none
                 for p, grad in zip(params, torch.autograd.grad(loss, params, allow_unused=True))]
        ops.masked_sgd_(params, grads, momenta, masks, draws.lr, recipe.momentum, recipe.weight_decay)
        answers = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
        return loss.detach(), (logits.argmax(1) == answers).sum()

    return step


def loss_of(logits, batch):
    """Mean cross-entropy of a Batch whose images have two labels each where CutMix pasted."""
    n = len(batch.labels)
    own = F.cross_entropy(logits.float(), batch.labels, reduction="sum") / n
    if batch.pasted is None:
        return own
    pasted = F.cross_entropy(logits.float(), batch.pasted, reduction="sum") / n
    return batch.kept * own + (1 - batch.kept) * pasted


def check_finite(model, recipe, training):
    """Raises UserError when the last step made a parameter infinite or NaN, which no loss has shown."""
    names, parameters = zip(*model.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).tolist()
    for name, is_finite in zip(names, finite):
        if not is_finite:
            raise UserError(f"{name} became infinite or NaN in epoch {training.epoch - 1}; try a lower --lr than "
                            f"{recipe.lr}")


#############################################
#          Seen, saved, and resumed         #
#############################################


def train_with_bar(title, model, split, recipe, generator, mask=None, until=None, training=None, save=None, curve=None):
    """`train` under a progress bar; `save(training)` is called every half a minute, and before Ctrl-C or SIGTERM stop.

    `curve`, a curves.Curve, gets a row an epoch. An error says which training it came from.
    """
    autosave = files.Autosave()
    total = recipe.epochs if until is None else until
    shown = f"{title} ({views.path(model, mask, recipe.skips_zeros)})"
    pace = Pace(training or Training(), recipe)
    with Bar(shown, total, training.epoch if training else 0, "epoch") as bar, deferred() as asked_to_stop:
        def progress(training):
            if training.epoch > bar.done:
                bar.update(loss=f"{training.loss:.3f}", accuracy=f"{training.accuracy:.1%}")
                if curve:
                    curve.add(training.epoch, **pace.row(training, len(split)))
            elif bar.tick():
                ranks.current().step(0)  # the bar of all ranks says its minute's line too
            if save and (asked_to_stop() or autosave.due()):
                save(training)
            if asked_to_stop():
                raise Stopped(asked_to_stop())

        try:
            trained = train(model, split, recipe, generator, mask, until, training, progress)
        except UserError as error:
            raise UserError(f"{title}: {error}") from error
        bar.say()
        return trained


class Pace:
    """Numbers of an epoch for its curve: where it stands, and how many images a second were trained on in it."""

    def __init__(self, training, recipe):
        self.recipe = recipe
        self.images, self.time = training.images_seen + training.step * recipe.batch_size, time.monotonic()

    def row(self, training, images):
        """The row of the epoch just finished, of `images` images."""
        now = time.monotonic()
        speed = (training.images_seen - self.images) / (now - self.time)
        self.images, self.time = training.images_seen, now
        steps = training.epoch * len(batches(torch.arange(images), self.recipe.batch_size))
        return {"step": steps, "loss": training.loss, "accuracy": training.accuracy,
                "lr": self.recipe.learning_rate(training.epoch - 1), "images_per_second": round(speed, 1)}


def train_saved(path, about, title, model, split, recipe, generator, mask=None, until=None, start=None):
    """`train_with_bar`, leaving `about` and what `pack` says in the file `path`; goes on from such a dict, `start`.

    The epochs are written to curves.csv beside it.
    """
    begun = unpack(start, model, generator) if start else None

    def save(training):
        curve.flush()
        files.save(path, about | pack(training, model, generator))

    with curves.Curve(path.with_name("curves.csv"), title, begun.epoch if begun else 0) as curve:
        return train_with_bar(title, model, split, recipe, generator, mask, until, begun, save, curve)


def pack(training, model, generator):
    """What a file holds of a training under way: {"epochs_done", "state", "generator", "training"}, for unpack."""
    values = dict(vars(training))
    values["losses"] = torch.stack(training.losses) if training.losses else None
    return {"epochs_done": training.epoch, "state": model.state_dict(), "generator": generator.get_state(),
            "training": values}


def unpack(saved, model, generator):
    """The Training that `pack` saved, with `model` and `generator` set to what they were."""
    model.load_state_dict(saved["state"])
    generator.set_state(saved["generator"].cpu())
    values = saved["training"]
    losses = [] if values["losses"] is None else list(values["losses"].unbind())
    order = values.get("order")
    return Training(**values | {"losses": losses, "order": None if order is None else order.cpu()})
