"""Subnetworks trained on real data: what stability.py, landscape.py and hessian.py read and share.

An end point is a subnetwork trained from its initial weights in one data order. It is trained once, kept, and found
again by the other scripts.
"""
import hashlib
import itertools
import time
from pathlib import Path

from tqdm import tqdm

import common
import splits
from common import UserError, positive, random_stream

ENDPOINT_FORMAT = "lottery-endpoint-1"

#############################################
#                Subnetworks                #
#############################################


def subnetwork_flags(parser):
    """Add the flags that name subnetworks and their training on real data, for load_subnetworks and endpoint."""
    group = parser.add_argument_group("subnetworks")
    group.add_argument("--mask", nargs="+", default=[], metavar="FILE",
                       help="mask files of prune.py or folders of them; with --dataset torch.nn.utils.prune states")
    group.add_argument("--dataset", help="of masks that name none; or without --mask, of a dense one (digits: offline)")
    group.add_argument("--model", default="convnet3", help="of masks that name none, or of the dense one (convnet3)")
    group.add_argument("--width", type=positive, help="its channels in the first layer (convnet3: 128, resnet: 32)")
    group.add_argument("--norm", choices=("instance", "batch", "none"),
                       help="its normalisation (convnet3: instance, resnet: batch)")
    group.add_argument("--data-dir", default="data", help="folder searched for <dataset>/, and downloaded to (data)")
    group.add_argument("--epochs", type=positive, help="of training on real data (the mask's eval_epochs, else 60)")
    group.add_argument("--sparse", choices=("auto", "on", "off"),
                       help="skip pruned weights on a CPU: where it is faster, always or never (auto)")
    group.add_argument("--seed", type=int, help="of the data orders (the mask file's)")
    group.add_argument("--device", help="(cuda when there is one, else cpu)")


def mask_files(items):
    """Mask files as given; of folders, the r<n>.pt in them, by rounds. Raises UserError for a folder without."""
    files = []
    for item in map(Path, items):
        found = [path for path in item.glob("r*.pt") if path.stem[1:].isdigit()] if item.is_dir() else [item]
        if not found:
            raise UserError(f"{item}: no r0.pt, r1.pt, ... of prune.py in this folder")
        files += sorted(found, key=lambda path: (len(path.name), path.name))
    return files


def load_subnetworks(paths, args):
    """({path: mask file's dict}, train, test) of the masks (files or folders), all of one network on one dataset.

    `args` holds what subnetwork_flags adds. Without paths: the dense network of --dataset, under the path
    <dataset>/dense.pt. Raises UserError.
    """
    device = common.choose_device(args.device)
    unnamed = None
    if args.dataset:
        unnamed = dict(model=args.model, dataset=args.dataset, width=args.width, norm=args.norm, seed=args.seed or 0,
                       data="real", eval_epochs=60)
        splits.load_real(unnamed, args.data_dir)
        unnamed |= dict(augment="imagenet", cutmix=1.) if unnamed["image_size"] > 64 else {}
    elif not paths:
        raise UserError("no --mask given; --dataset digits takes a dense network and needs no mask file")
    subnetworks = {path: common.load_mask(path, unnamed, device) for path in mask_files(paths)}
    if not paths:
        model = common.build_network(unnamed, unnamed["seed"]).to(device)
        subnetworks[Path(Path(args.dataset).name) / "dense.pt"] = {
            "format": common.MASK_FORMAT, "round": 0, "sparsity": 0., "masks": common.dense_mask(model),
            "init": model.state_dict(), "config": unnamed, "results": {}}
    first_path, first = next(iter(subnetworks.items()))
    for path, other in subnetworks.items():
        for key in ("model", "dataset", "width", "norm", "image_size", "train_images"):
            one, two = first["config"].get(key), other["config"].get(key)
            if one != two:
                raise UserError(f"{path} has {key} {two}, {first_path} {one}; give masks of one network and dataset")
    if args.dataset not in (None, first["config"]["dataset"]):
        raise UserError(f"{first_path} is of dataset {first['config']['dataset']}, not --dataset {args.dataset}")
    for subnetwork in subnetworks.values():
        subnetwork["config"] |= {"sparse": args.sparse} if args.sparse else {}
    return subnetworks, *splits.load_real(dict(first["config"]), args.data_dir, device)


def fingerprint(subnetwork):
    """sha256 over the masks and the initial state of a mask file's dict."""
    digest = hashlib.sha256()
    for part in ("masks", "init"):
        for name, value in sorted(subnetwork[part].items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


#############################################
#                End points                 #
#############################################


def result_path(folder, mask_path, ending):
    """<folder>/<run>/<mask's name><ending>, where run is the mask's folder, or the two of .../<folder>/seed<S>/."""
    path = Path(mask_path).resolve()
    run_folders = path.parts[-3:-1] if path.parent.name.startswith("seed") else path.parts[-2:-1]
    return Path(folder, *run_folders, path.stem + ending)


def endpoint(folder, mask_path, subnetwork, split, order, epochs=None, seed=None, shared=0, overwrite=False):
    """A dict whose "state" is `subnetwork` (a mask file's dict) trained on `split` in the data order number `order`.

    Kept in result_path(folder, mask_path, "_order<order>.pt") and taken from there when the file is of the same
    mask, initial state, recipe and seed; if it is not: UserError, or trained anew with `overwrite`. An interrupted
    training goes on from its last save, at most an epoch and half a minute back. `epochs` and `seed` default to the
    mask file's. The first `shared` epochs are the same for all orders (Frankle et al. 2020): they are trained once,
    as order None, and kept in "_epoch<shared>.pt".
    """
    config = subnetwork["config"]
    recipe = common.recipe_of(config, epochs or config["eval_epochs"])
    seed = config["seed"] if seed is None else seed
    last, ending = (shared, f"_epoch{shared}.pt") if order is None else (recipe.epochs, f"_order{order}.pt")
    path = result_path(folder, mask_path, ending)
    identity = {"format": ENDPOINT_FORMAT, "mask_sha": fingerprint(subnetwork), "order": order, "seed": seed,
                "shared": shared, "images": len(split),
                **recipe._replace(sparse="auto")._asdict()}  # how zeros are skipped changes no more than rounding
    point = common.load(path, split.labels.device) if path.exists() else {}
    different = next((key for key in identity if point.get(key) != identity[key]), None)
    if point and different and not overwrite:
        change = f"{different} {point.get(different)}, not {identity[different]}"
        change = "another mask" if different == "mask_sha" else change
        raise UserError(f"{path} is an end point of {change}; --overwrite trains it anew, or choose another folder")
    if different:
        point = {"epochs_done": 0, "momenta": None, "state": subnetwork["init"]}
        if shared and order is not None:
            point = endpoint(folder, mask_path, subnetwork, split, None, epochs, seed, shared, overwrite)
            del point["generator"]
    if point["epochs_done"] < last:
        about = identity | {key: subnetwork[key] for key in ("masks", "round", "sparsity", "config")}
        point = train_endpoint(path, point, last, about, split, recipe, random_stream(seed, "order", order))
    return point


def train_ahead(folder, subnetworks, split, orders, epochs=None, seed=None, shared=0, overwrite=False):
    """Under torchrun: train the end points of {path: mask file's dict} in all `orders`, each on one of the ranks.

    They are found when they are asked for; one process trains them only then.
    """
    if common.together.get().size == 1:
        return
    paths = {result_path(folder, path, ""): path for path in subnetworks}.values()  # two of one result are trained once
    length = epochs or next(iter(subnetworks.values()))["config"]["eval_epochs"]
    for path in common.share(paths, "epochs shared by the orders", shared) if shared else ():
        endpoint(folder, path, subnetworks[path], split, None, epochs, seed, shared, overwrite)
    for path, order in common.share(itertools.product(paths, range(orders)), "epochs of all end points", length):
        endpoint(folder, path, subnetworks[path], split, order, epochs, seed, shared, overwrite)


def train_endpoint(path, point, last, about, split, recipe, generator):
    """Train from `point` to epoch `last` and return the new point, saved to `path` now and then, and at the end."""
    model = common.build_network(about["config"]).to(split.labels.device)
    model.load_state_dict(point["state"])
    momenta, saved = point["momenta"], time.monotonic()
    if "generator" in point:
        generator.set_state(point["generator"].cpu())
    with tqdm(initial=point["epochs_done"], total=last, desc=path.stem, unit="epoch", disable=None, leave=False) as bar:
        for epoch in range(point["epochs_done"], last):
            trained = common.train(model, split, recipe, generator, about["masks"], (epoch, epoch + 1), momenta)
            momenta = trained.momenta
            bar.set_postfix(loss=f"{trained.loss:.3f}", accuracy=f"{trained.accuracy:.1%}", refresh=False)
            bar.update()
            common.together.get().step()
            if epoch + 1 == last or time.monotonic() - saved > 30:
                point = about | {"epochs_done": epoch + 1, "state": model.state_dict()}
                if epoch + 1 < recipe.epochs:
                    point |= {"momenta": momenta, "generator": generator.get_state()}
                common.save(path, point)
                saved = time.monotonic()
    return point
