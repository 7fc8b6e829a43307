"""Endpoints: tickets trained on real data in one data order; trained once, kept, and found again by the other scripts."""
import itertools
from pathlib import Path

from . import files, ranks, training
from .errors import UserError
from .networks import build_network
from .streams import random_stream
from .tickets import fingerprint

FORMAT = "lottery-endpoint-1"


def result_path(folder, mask_path, ending):
    """<folder>/<run>/<mask's name><ending>, where run is the mask's folder, or the two of .../<folder>/seed<S>/."""
    path = Path(mask_path).resolve()
    run_folders = path.parts[-3:-1] if path.parent.name.startswith("seed") else path.parts[-2:-1]
    return Path(folder, *run_folders, path.stem + ending)


def endpoint(folder, mask_path, ticket, split, order, epochs=None, seed=None, shared=0, overwrite=False):
    """A dict whose "state" is `ticket` trained on `split` in the data order number `order`.

    Kept in result_path(folder, mask_path, "_order<order>.pt") and taken from there when the file is of the same
    mask, initial state, recipe and seed; if it is not: UserError, or trained anew with `overwrite`. An interrupted
    training goes on from its last save, at most half a minute back. `epochs` and `seed` default to the ticket's.
    The first `shared` epochs are the same for all orders (Frankle et al. 2020): they are trained once, as order None,
    and kept in "_epoch<shared>.pt".
    """
    config = ticket["config"]
    recipe = training.recipe_of(config, epochs or config["eval_epochs"])
    seed = config["seed"] if seed is None else seed
    last, ending = (shared, f"_epoch{shared}.pt") if order is None else (recipe.epochs, f"_order{order}.pt")
    path = result_path(folder, mask_path, ending)
    identity = {"format": FORMAT, "mask_sha": fingerprint(ticket), "order": order, "seed": seed, "shared": shared,
                "images": len(split), **recipe._asdict()}
    kept = kept_endpoint(path, identity, split.labels.device, overwrite)
    if kept and kept["epochs_done"] == last:
        return kept
    start = kept
    if not kept and shared and order is not None:
        start = endpoint(folder, mask_path, ticket, split, None, epochs, seed, shared, overwrite)
    about = identity | {key: ticket[key] for key in ("masks", "round", "sparsity", "config")}
    return train_endpoint(path, about, ticket["init"], start, last, split, recipe, random_stream(seed, "order", order))


def kept_endpoint(path, identity, device, overwrite):
    """The endpoint in the file `path`, finished or not; None when there is none, or one of others to `overwrite`."""
    if not path.exists():
        return None
    kept = files.load(path, device)
    different = files.difference({key: kept.get(key) for key in identity}, identity)
    if not different:
        return kept
    if overwrite:
        return None
    change = f"{different} {kept.get(different)}, not {identity[different]}"
    change = "another mask" if different == "mask_sha" else change
    raise UserError(f"{path} is an end point of {change}; --overwrite trains it anew, or choose another folder")


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


def train_ahead(folder, tickets, split, orders, epochs=None, seed=None, shared=0, overwrite=False):
    """Under torchrun: train the endpoints of {path: ticket} in all `orders`, each on one of the ranks.

    They are found when they are asked for; one process trains them only then.
    """
    if ranks.current().size == 1:
        return
    paths = {result_path(folder, path, ""): path for path in tickets}.values()  # two of one result are trained once
    length = epochs or next(iter(tickets.values()))["config"]["eval_epochs"]
    for path in ranks.share(paths, "epochs shared by the orders", shared) if shared else ():
        endpoint(folder, path, tickets[path], split, None, epochs, seed, shared, overwrite)
    for path, order in ranks.share(itertools.product(paths, range(orders)), "epochs of all endpoints", length):
        endpoint(folder, path, tickets[path], split, order, epochs, seed, shared, overwrite)
