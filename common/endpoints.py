"""Endpoints: tickets trained on real data in one data order; trained once, and found again by the other scripts."""
import itertools
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from . import files, ranks, together, training
from .data import Split
from .errors import UserError
from .networks import build_network
from .streams import random_stream
from .tickets import ENDPOINT_FORMAT, fingerprint


def result_names(ticket_at):
    """{path of a mask file: <run>/<its name>}, under which its results lie in a folder of results.

    <run> is the mask's folder, or the two of .../<folder>/seed<S>/. Two different tickets never share a name: all but
    the first have their fingerprint in it.
    """
    names, taken = {}, {}
    for path, ticket in ticket_at.items():
        place = Path(path).resolve()
        parts = place.parts[-3:-1] if place.parent.name.startswith("seed") else place.parts[-2:-1]
        name, sha = Path(*parts, place.stem), fingerprint(ticket)
        if taken.setdefault(name, sha) != sha:
            name = name.with_name(f"{name.name}-{sha[:8]}")
        names[path] = name
    return names


def check_apart(result, inputs):
    """Raises UserError where one of the `inputs` of the command is its result, or lies in it, when that is a folder."""
    for path in filter(None, inputs):
        if Path(result).resolve() in (Path(path).resolve(), Path(path).resolve().parent):
            raise UserError(f"{result} is or holds {path}, which this command reads; choose another --out")


def real_recipe(config, epochs=None, lr=None, batch_size=None):
    """The Recipe of a ticket's training on real data: as given here, else its config's eval_..., else its search's."""
    given = {"lr": lr or config.get("eval_lr"), "batch_size": batch_size or config.get("eval_batch_size")}
    chosen = {key: value for key, value in given.items() if value}
    return training.recipe_of(config | chosen, epochs or config["eval_epochs"])


def endpoint(folder, name, ticket, split, order, recipe=None, seed=None, shared=0, overwrite=False):
    """A dict whose "state" is `ticket` trained on `split` in the data order number `order`.

    Kept in <folder>/<name>_order<order>.pt and taken from there when the file is of the same mask, initial state, data,
    recipe and seed; if it is not: UserError, or trained anew with `overwrite`. An interrupted training goes on from its
    last save, at most half a minute back. `recipe` and `seed` default to the ticket's. The first `shared` epochs are
    the same for all orders (Frankle et al. 2020): they are trained once, as order None, and kept in
    <name>_epoch<shared>.pt.
    """
    recipe = recipe or real_recipe(ticket["config"])
    seed = ticket["config"]["seed"] if seed is None else seed
    last, ending = (shared, f"_epoch{shared}.pt") if order is None else (recipe.epochs, f"_order{order}.pt")
    path = Path(folder, f"{name}{ending}")
    identity = {"format": ENDPOINT_FORMAT, "mask_sha": fingerprint(ticket), "order": order, "seed": seed,
                "shared": shared, "images": len(split), **recipe._asdict(),
                **{key: ticket["config"].get(key) for key in ("model", "data_fingerprint")}}
    with files.locked(path.with_name(f".{path.name}.lock"), wait=True):
        kept = kept_endpoint(path, identity, split.labels.device, overwrite)
        if kept and kept["epochs_done"] == last:
            return kept
        start = kept
        if not kept and shared and order is not None:
            start = endpoint(folder, name, ticket, split, None, recipe, seed, shared, overwrite)
        about = identity | {key: ticket[key] for key in ("masks", "round", "sparsity", "config")}
        stream = random_stream(seed, "order", order)
        return train_endpoint(path, about, ticket["init"], start, last, split, recipe, stream)


def kept_endpoint(path, identity, device, overwrite):
    """The endpoint in the file `path`, finished or not; None when there is none, or one of others to `overwrite`."""
    if not path.exists():
        return None
    complaint = "in an endpoint's place, but is none; choose another folder"
    kept = files.load_format(path, ENDPOINT_FORMAT, complaint, device)
    kept = {"model": kept["config"]["model"]} | kept  # in files of earlier versions only there
    different = files.difference({key: kept.get(key) for key in identity}, identity)
    if not different:
        return kept
    if overwrite:
        return None
    change = f"{different} {kept.get(different)}, not {identity[different]}"
    change = "another mask" if different == "mask_sha" else change
    raise UserError(f"{path} is an endpoint of {change}; --overwrite trains it anew, or choose another folder")


def train_endpoint(path, about, init, start, last, split, recipe, generator):
    """Train to epoch `last`, from `init` or from the file's dict `start`; saved to `path` now and then, and at the end.

    A start of another order is the epochs that the orders share: its generator is not gone on with.
    """
    model = build_network(about["config"]).to(split.labels.device)
    model.load_state_dict(init)
    if start and "training" not in start:  # of an earlier version, saved between two epochs
        start = start | {"training": {"epoch": start["epochs_done"], "momenta": start["momenta"], "losses": None}}
    if start and start["order"] != about["order"]:
        start = start | {"generator": generator.get_state()}
    now = training.train_saved(path, about, path.stem, model, split, recipe, generator, about["masks"], last, start)
    if last < recipe.epochs:
        files.save(path, about | training.pack(now, model, generator))
        return files.load(path, split.labels.device)
    point = about | {"epochs_done": last, "state": model.state_dict()}
    files.save(path, point)
    return point


@dataclass
class Endpoints:
    """The endpoints of a command's tickets in a folder, each trained, or found there, when it is asked for."""

    folder: Path
    ticket_at: dict  # {path: ticket}
    split: Split  # of real data
    args: Namespace  # what cli.ticket_flags adds, and `overwrite`
    shared: int = 0  # the first epochs, the same in all orders

    def __post_init__(self):
        self.names = result_names(self.ticket_at)

    def recipe(self, path):
        return real_recipe(self.ticket_at[path]["config"], self.args.epochs, self.args.lr, self.args.batch_size)

    def seed(self, path):
        return self.ticket_at[path]["config"]["seed"] if self.args.seed is None else self.args.seed

    def state(self, path, order):
        """The state of the ticket in the file `path`, trained in the data order number `order`."""
        return endpoint(self.folder, self.names[path], self.ticket_at[path], self.split, order, self.recipe(path),
                        self.args.seed, self.shared, self.args.overwrite)["state"]

    def train_ahead(self, paths, orders):
        """Train those of `paths` in all `orders`: on a GPU together, under torchrun each on one of the ranks.

        One process on a CPU trains them when they are asked for.
        """
        device = self.split.labels.device
        if ranks.current().size == 1 and not together.pays(device):
            return
        paths = list({self.names[path]: path for path in paths}.values())  # of one ticket, one

        def train(path_and_order):
            self.state(*path_and_order)

        if self.shared:
            together.each(train, itertools.product(paths, [None]), device, "epochs shared by the orders", self.shared)
        epochs = self.recipe(paths[0]).epochs
        together.each(train, itertools.product(paths, range(orders)), device, "epochs of all endpoints", epochs)
