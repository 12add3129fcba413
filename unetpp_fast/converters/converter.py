"""Networks that other implementations of UNet++ trained, as networks of this package, and back.

A peer's weights are recognised by their names. Every tensor of ours is a copy of one of theirs, for the peers that
concatenate in another order with the input channels of a node's first convolution permuted. What has no counterpart is
refused with its reason; a converted module is run beside the original once, on a small image.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.encoder_network import EncodedNetwork
from ..models.network import Network
from ..models.prediction import evaluating
from .keras import SUFFIXES, plain_names, read_file
from .peer import fill
from .registry import PEERS, Peer

AGREEMENT = 1e-2  # of the largest output: far above rounding, far below what another graph gives
PREFIXES = ("module.", "_orig_mod.")  # of nn.DataParallel and torch.compile


def convert(source: nn.Module | Mapping[str, Any] | str | os.PathLike, **options: Any) -> Network | EncodedNetwork:
    """A UNet++ of another implementation as a trainable model of this package with the same outputs.

    Known are MONAI's `BasicUNetPlusPlus`, the `NestedUNet`s of pytorch-nested-unet, bigmb and UNET-ZOO, nnU-Net++'s
    `Generic_UNetPlusPlus`, segmentation_models_pytorch's `UnetPlusPlus` (and its 3D port) and the networks of the paper's
    Keras code. Outputs keep the peer's form: MONAI's list; nnU-Net++'s tuple, X(0,5) first; probabilities where the peer
    returns them (UNET-ZOO, Keras, a final activation); else logits, a list with deep supervision. `predict` takes
    the logits in any case. Weights are copied, with their precision and device; what was frozen stays frozen.

    Args:
        source: the peer's module, on which nothing is changed; or its state_dict; or, of Keras, an HDF5 file or the arrays
            by `layer/kernel:0`. The prefix that nn.DataParallel or torch.compile puts before every name is dropped. A
            model of this package is returned as it is.
        options: for a state_dict, what its names and shapes leave open; else the peer's defaults. `act` and `norm` as in
            `UNetPlusPlus` (MONAI, nnU-Net++), `upsample` (the `NestedUNet`s), `dropout` (MONAI, Keras) and
            `deep_supervision` (MONAI: False, nnU-Net++: True). A MONAI or nnU-Net++ state_dict with norm weights and
            no running statistics is taken for instance norm.

    Returns:
        A `Network`, or an `EncodedNetwork` (smp); its layers are in the modes of the module's, in training mode from a
        state_dict.

    Raises:
        ValueError: nothing known, something of it has no counterpart, or names or shapes do not fit; the message says
            what and why.
        TypeError: source is none of the above.
    """
    if isinstance(source, nn.Module):
        source = _unwrapped(source)
    if isinstance(source, (Network, EncodedNetwork)):
        return source
    if isinstance(source, (str, os.PathLike)):
        if Path(source).suffix not in SUFFIXES:
            raise ValueError(
                f"{source} is no HDF5 file of Keras: load it first, torch.load({str(source)!r}, weights_only=True)"
            )
        source = read_file(Path(source))
    if isinstance(source, nn.Module):
        if options:
            raise ValueError(
                f"{sorted(options)} cannot be given for a module, which tells them itself: only for a state_dict"
            )
        return _convert_module(source)
    if not isinstance(source, Mapping):
        raise TypeError(f"convert takes a module, a state_dict or an HDF5 file of Keras, not {type(source).__name__}")
    state = _tensors(source)
    peer = _recognise(state, "state_dict")
    if peer.name == "smp":
        raise peer.fail("a state_dict does not hold the encoder's code: load it into the smp model and give that")
    unknown = sorted(set(options) - set(peer.open_options))
    if unknown:
        takes = f"{list(peer.open_options)} can be" if peer.open_options else "nothing can be"
        raise ValueError(f"{unknown} cannot be given for a state_dict of {peer.title}: {takes}")
    return _from_state(peer, state, options)


def to_state_dict(model: Network | EncodedNetwork, peer: str) -> dict[str, Tensor] | dict[str, np.ndarray]:
    """The weights of a model under a peer's names, in its order and layout: `convert` backwards, exactly.

    Args:
        model: from `convert`, or any model of this package that has the peer's structure.
        peer: "monai", "nested-unet" (bigmb's too), "unet-zoo", "nnunet", "smp" or "keras".

    Returns:
        What the peer's `load_state_dict(..., strict=True)` takes; for Keras arrays by `layer/kernel:0`. Copies.

    Raises:
        ValueError: no such peer, or the model is not one that the peer can hold; the message says what differs.
    """
    if peer not in PEERS:
        raise ValueError(f"peer={peer!r} is not known: use one of {sorted(PEERS)}")
    found = PEERS[peer]
    if isinstance(model, EncodedNetwork) != (peer == "smp") or not isinstance(model, (Network, EncodedNetwork)):
        raise ValueError(f"this {type(model).__name__} cannot be written as a {found.title}")
    own = model.state_dict()
    try:
        state = {pair.theirs: pair.to_theirs(own[pair.ours]) for pair in found.pairs(model)}
    except KeyError as error:
        raise ValueError(f"this model cannot be written as a {found.title}, which has no {error.args[0]!r}") from None
    if isinstance(model, Network):
        _check_fits(found, model, state)
    return {name: value.cpu().numpy() for name, value in state.items()} if peer == "keras" else state


def _check_fits(peer: Peer, model: Network, state: dict[str, Tensor]) -> None:
    """Whether the weights, read again as the peer's, give this very network."""
    given = {key: model.options[key] for key in peer.open_options if key in model.options}
    if "deep_supervision" in peer.open_options:
        given["deep_supervision"] = model.deep_supervision
    try:
        again = peer.read(state, given)
    except ValueError as error:
        reason = str(error).partition("cannot be converted: ")[2]
        raise ValueError(f"this model cannot be written as a {peer.title}: {reason}") from None
    mine, theirs = _structure(model), _structure(again)
    for key, value in theirs.items():
        if mine[key] != value:
            raise ValueError(f"this model cannot be written as a {peer.title}: its {key} is {mine[key]!r}, not {value!r}")
    own = model.state_dict()
    for name, value in peer.constants(again).items():
        if not torch.equal(own[name], value.to(own[name])):
            raise ValueError(f"this model cannot be written as a {peer.title}: {name} is no longer the identity")


def _structure(network: Network) -> dict[str, Any]:
    """What two networks must share to compute the same from the same weights."""
    options = {key: _plain(value) for key, value in network.options.items() if key not in ("odd_sizes",)}
    return {
        "heads": network.topology.heads,
        "nodes": network.topology.nodes,
        "spare heads": network.spare_heads,
        **options,
    }


def _plain(option: Any) -> Any:
    """An option in one spelling: defaults written out."""
    defaults = {
        "batch": {"eps": 1e-5, "momentum": 0.1},
        "instance": {"eps": 1e-5, "affine": True},
        "leaky_relu": {"negative_slope": 0.01},
        "deconv": {"bias": True},
        "linear": {"align_corners": False, "project": False},
        "nearest": {"project": False},
    }
    if isinstance(option, str):
        option = (option, {})
    return (option[0], {**defaults.get(option[0], {}), **option[1]}) if isinstance(option, (tuple, list)) else option


def _from_state(peer: Peer, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> Network:
    network = peer.read(state, given)
    fill(peer, network, peer.pairs(network), state, peer.constants(network))
    return network.to(next(iter(network.parameters())).device)  # reads what was measured on this GPU


def _convert_module(module: nn.Module) -> Network | EncodedNetwork:
    state = module.state_dict()
    peer = _recognise(state, type(module).__name__)
    try:
        network = peer.convert(module) if peer.name == "smp" else _from_state(peer, state, peer.inspect(module))
    except (AttributeError, IndexError, KeyError) as error:
        raise peer.fail(f"its class is not built as that one is ({type(error).__name__}: {error})") from error
    _carry_modes(peer, module, network)
    _compare(peer, module, network)
    return network


def _carry_modes(peer: Peer, module: nn.Module, network: Network | EncodedNetwork) -> None:
    """What is frozen, and which layers are in training mode, as in the module; a copied encoder has it already."""
    network.training = module.training
    for name, part in network.named_children():
        if name != "encoder":
            part.train(module.training)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    modes = {name: layer.training for name, layer in module.named_modules()}
    for pair in peer.pairs(network):
        if pair.theirs in frozen:
            network.get_parameter(pair.ours).requires_grad_(False)
        network.get_submodule(pair.ours.rpartition(".")[0]).training = modes[pair.theirs.rpartition(".")[0]]


def _compare(peer: Peer, module: nn.Module, network: Network | EncodedNetwork) -> None:
    """Runs both in eval mode on one small image: a class with these weights may still compute something else."""
    weight = next(network.parameters())
    if weight.device.type == "meta":
        return
    topology = network.topology
    multiple = network.multiple if isinstance(network, EncodedNetwork) else topology.multiple
    size = [multiple] * (topology.spatial_dims - 1) + [2 * multiple]  # two pixels at the lowest level
    image = torch.linspace(-1, 1, topology.in_channels * multiple**topology.spatial_dims * 2, dtype=torch.float64)
    image = (37 * image).sin().reshape(1, topology.in_channels, *size).to(weight.device)
    if weight.dtype.itemsize < 4:
        module, network = copy.deepcopy(module).float(), copy.deepcopy(network).float()
    image = image.to(next(network.parameters()).dtype)
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with evaluating(module), evaluating(network):
            expected, found = module(image), network(image)
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise peer.fail(f"it cannot be run beside the converted one on an image of {size} pixels: {first}") from error
    finally:
        convolutions.fp32_precision = before
    if type(expected) is not type(found) and not isinstance(expected, Tensor):
        raise peer.fail(f"its class returns a {type(expected).__name__}, expected a {type(found).__name__}")
    pairs = [(expected, found)] if isinstance(found, Tensor) else list(zip(expected, found, strict=True))
    for theirs, ours in pairs:
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > AGREEMENT * theirs.abs().max():
            raise peer.fail("its class computes something else from these weights: its forward pass was changed")


def _recognise(state: Mapping[str, Tensor], what: str) -> Peer:
    """The peer to which the names of most of the weights belong."""
    peer = max(PEERS.values(), key=lambda candidate: candidate.claims(state))
    if not peer.claims(state):
        names, known = ", ".join(list(state)[:3]) or "none", ", ".join(each.title for each in PEERS.values())
        raise ValueError(f"this {what} is of no known UNet++ (its weights: {names}): convert takes {known}")
    if peer.name != "smp" and any(value.ndim == 3 for value in state.values()):
        raise peer.fail("its convolutions have 1 spatial axis; unetpp_fast has 2 and 3")
    return peer


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(module, "_orig_mod"):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def _tensors(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state_dict without the prefix of a wrapper, or arrays of Keras as tensors.

    Raises:
        ValueError: it holds something else; for the usual checkpoints the message says where the weights are.
    """
    bad = next((name for name, value in source.items() if not isinstance(value, (Tensor, np.ndarray))), None)
    if bad is not None:
        inside = [
            name for name in ("state_dict", "model_state_dict", "model", "net") if isinstance(source.get(name), Mapping)
        ]
        hint = f"give its [{inside[0]!r}]" if inside else "give the weights alone"
        raise ValueError(f"this is no state_dict: {bad!r} is a {type(source[bad]).__name__}; {hint}")
    state = dict(source)
    while prefix := next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), ""):
        state = {name[len(prefix) :]: value for name, value in state.items()}
    return plain_names(state)
