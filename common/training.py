"""SGD under a mask: one loop for pruning rounds, evaluations and endpoints, which goes on from any step."""
import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import curves, files, ranks
from .augment import augmented
from .bars import Bar
from .errors import UserError
from .interrupts import Stopped, deferred
from .kernels import ops, views
from .masks import apply_mask
from .networks import blocks_of, logits_of
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
    compile: bool = False  # run the step through torch.compile

    @property
    def skips_zeros(self):
        """Whether the step has a form that skips pruned weights."""
        return not (self.amp or self.compile)

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
        losses = torch.stack(self.losses).tolist()
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} at epoch {self.epoch}, step {step}; try a lower --lr than {lr}")
        self.loss, self.accuracy = sum(losses) / len(losses), float(self.hits) / len(self.order)
        self.images_seen += len(self.order)
        self.epoch, self.step, self.order, self.losses, self.hits = self.epoch + 1, 0, None, [], 0


#############################################
#                 The loop                  #
#############################################


def train(model, split, recipe, generator, mask=None, until=None, training=None, progress=None):
    """Train `model` in place on `split` and return the Training; weights outside `mask` are and stay exactly 0.

    `until`: the epoch of the recipe's schedule to stop after (the last one). `training`: where to go on from, with
    `model` and `generator` as they were then. Every random draw comes from `generator`, or repeats with it.
    `progress(training)` is called after every step and every epoch. Raises UserError on what is not finite.
    """
    apply_mask(model, mask or {})
    training = training or Training()
    training.momenta = training.momenta or [torch.zeros_like(p) for p in trainable(model).values()]
    progress = progress or (lambda training: None)
    draws = blocks_of(model) is None  # a network of others may have dropout, or draw anything else
    model.train()
    step = make_step(model, mask, training.momenta, recipe, sample=split.batch(slice(0, 2)))
    with global_generators_kept():
        while training.epoch < (recipe.epochs if until is None else until):
            lr = recipe.learning_rate(training.epoch)
            if training.order is None:
                training.order = torch.randperm(len(split), generator=generator)
            for index in batches(training.order, recipe.batch_size)[training.step:]:
                batch = augmented(split, index, recipe, generator)
                if draws:
                    seed_from(generator, model)
                loss, hits = step(batch, lr)
                training.losses.append(loss)
                training.hits += hits
                training.step += 1
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


def make_step(model, mask, momenta, recipe, sample):
    """A function (Batch, learning rate) -> (loss, right answers) that makes one SGD step of `model` under `mask`.

    `sample`: images and labels on which a faster view of the network is tried.
    """
    names, params = zip(*trainable(model).items())
    masks = [(mask or {}).get(name) for name in names]
    network = views.view(model, mask, recipe.skips_zeros, sample=sample)

    def step(batch, lr):
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=recipe.amp):
            logits = logits_of(network(batch.images))
        n = len(batch.labels)
        losses = [F.cross_entropy(logits.float(), y, reduction="sum") / n for y in (batch.labels, batch.pasted)]
        loss = batch.kept * losses[0] + (1 - batch.kept) * losses[1]
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        ops.masked_sgd_(params, grads, momenta, masks, lr, recipe.momentum, recipe.weight_decay)
        answers = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
        return loss.detach().clone(), (logits.argmax(1) == answers).sum()  # a CUDA graph writes to the same place

    return compiled(step) if recipe.compile else step


def compiled(step):
    """`step` through torch.compile."""
    import torch._dynamo.config as dynamo

    if hasattr(dynamo, "trace_autograd_ops"):  # in an older torch the graph ends at torch.autograd.grad
        dynamo.trace_autograd_ops = True
    return torch.compile(step, dynamic=False, mode="reduce-overhead")


def check_finite(model, recipe, training):
    """Raises UserError when the last step made a parameter infinite or NaN, which no loss has shown."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
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
    return Training(**values | {"losses": losses})
