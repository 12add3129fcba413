"""What `unetpp-fast train` and `unetpp-fast predict` do."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from . import data, files, pictures
from .checks import check_input
from .data import Patches
from .files import InputError
from .models import Network, UNet, UNetPlusPlus, parameter_count
from .training import Interrupted, Recipe, Trainer, autocast


def train(options: argparse.Namespace, device: torch.device, dtype: str) -> int:
    """Trains on a folder and prints where the result is; returns the exit code."""
    last = options.out / "last.pt"
    if last.exists() and not options.resume:
        raise InputError(f"{options.out} already holds a training: add --resume to go on with it, or choose another --out")
    if options.resume and not last.exists():
        raise InputError(f"there is nothing to resume: {last} does not exist")
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate,
        patience=options.patience, seed=options.seed, dtype=dtype, workers=options.workers,
    )  # fmt: skip
    samples, classes = data.find_samples(options.data)
    channels = data.check_samples(samples)
    training, validation = data.split(samples, options.val_fraction, options.seed)
    torch.manual_seed(options.seed)
    network = _build(options, channels, len(classes)).to(device)
    patches = Patches(training, options.patch, options.patches_per_image, options.seed)
    _check_patches(network, patches, options)
    files.check_folder(options.out)
    about = {
        "classes": classes,
        "patch": options.patch,
        "patches_per_image": options.patches_per_image,
        "training": [sample.name for sample in training],
        "validation": [sample.name for sample in validation],
    }
    trainer = Trainer(network, patches, validation, recipe, options.out, about)
    if options.resume:
        trainer.resume()
        print(f"resuming after epoch {trainer.epoch}" + (f", batch {trainer.step}" if trainer.step else ""))
    print(
        f"{options.model}: {parameter_count(network):,} parameters, {len(training)} images to train, "
        f"{len(validation)} to validate, {channels} channel(s), classes {', '.join(classes)}, {device}, {dtype}"
    )
    try:
        trainer.fit()
    except Interrupted:
        print(f"stopped; everything is in {last}: the same command with --resume goes on", file=sys.stderr)
        return 130
    print(f"best validation IoU {trainer.best:.4f}: {options.out / 'best.pt'}; log: {options.out / 'log.csv'}")
    return 0


def _build(options: argparse.Namespace, channels: int, classes: int) -> Network:
    arguments = {
        "features": options.features,
        "norm": None if options.norm == "none" else options.norm,
        "upsample": options.upsample,
        "dropout": options.dropout,
    }
    try:
        if options.model == "unet":
            return UNet(channels, classes, **arguments)
        return UNetPlusPlus(channels, classes, **arguments, deep_supervision=not options.no_deep_supervision)
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_patches(network: Network, patches: Patches, options: argparse.Namespace) -> None:
    multiple = network.topology.multiple
    if options.patch < 1 or options.patch % multiple:
        raise InputError(
            f"--patch must be a positive multiple of {multiple} for {len(options.features)} levels, not {options.patch}"
        )
    if options.patches_per_image < 1:
        raise InputError(f"--patches-per-image must be at least 1, not {options.patches_per_image}")
    smallest = len(patches) % options.batch_size or options.batch_size
    shape = (smallest, network.topology.in_channels, options.patch, options.patch)
    try:
        check_input(network, torch.empty(shape, device="meta"))
    except ValueError as error:
        raise InputError(str(error)) from error


def predict(options: argparse.Namespace, device: torch.device, dtype: str) -> None:
    """Writes `masks/<class>/<id>.png` (0 or 255) and `overlays/<id>.png` for each image."""
    if not 0.0 <= options.threshold <= 1.0:
        raise InputError(f"--threshold must lie between 0 and 1, not {options.threshold}")
    network, content = files.load_model(options.checkpoint, device)
    classes = content["about"].get("classes") or [str(index) for index in range(network.out_channels)]
    images = {options.images.stem: options.images} if options.images.is_file() else data.find_images(options.images)
    tqdm = files.need("tqdm", "commands").tqdm
    for name, path in tqdm(images.items(), desc="predicting", unit="image", disable=None):
        image = files.read_image(path)
        if image.shape[0] != network.topology.in_channels:
            takes = network.topology.in_channels
            raise InputError(f"{path} has {image.shape[0]} channel(s), the model takes {takes}: convert the image")
        masks = _masks(network, image, options, device, dtype)
        for label, mask in zip(classes, masks, strict=True):
            files.write_png(options.out / "masks" / label / f"{name}.png", mask.astype(np.uint8) * 255)
        files.write_png(options.out / "overlays" / f"{name}.png", pictures.overlay(image, masks))
    print(f"{len(images)} image(s): {options.out / 'masks'}, {options.out / 'overlays'}")


def _masks(network: Network, image: np.ndarray, options: argparse.Namespace, device: torch.device, dtype: str) -> np.ndarray:
    """bool `[classes, H, W]` of one image `[C, H, W]`."""
    x = torch.from_numpy(data.standardise(image))[None].to(device)
    try:
        with autocast(device, dtype):
            probabilities = network.predict(x, mode=options.mode, level=options.level)
    except ValueError as error:
        raise InputError(str(error)) from error
    return (probabilities[0] > options.threshold).cpu().numpy()
