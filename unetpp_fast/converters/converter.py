"""Conversion of trained networks from other implementations of UNet++, and back.

A peer is recognised by the names of its weights. Each of our tensors is a copy of one of the peer's; if the peer
concatenates in another order, the input channels of each node's first convolution are permuted. Anything without a
counterpart is refused with the reason, and the outputs of a converted module are compared with the original's on a small
image.
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

from ..architecture.options import TABLES, parse_option
from ..architecture.precision import without_tf32
from ..architecture.wrappers import hint, unwrapped
from ..common import torch_files
from ..common.errors import first_line
from ..execution.built import changed
from ..models.architectures import from_config
from ..models.encoder_network import EncodedNetwork
from ..models.network import Network
from ..models.prediction import evaluating, small_image
from .peer import Peer
from .registry import PEERS
from .wrapped_weights import find, own_names

AGREEMENT = 1e-2  # bound on max|a - b| / max|a|: far above rounding, far below the error of a different graph
TORCH_FILES = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".model")


def convert(source: nn.Module | Mapping[str, Any] | str | os.PathLike, **options: Any) -> Network | EncodedNetwork:
    """Converts a UNet++ of another implementation to a trainable model of this package with the same outputs.

    It takes MONAI's `BasicUNetPlusPlus`, the `NestedUNet`s of pytorch-nested-unet, bigmb and UNET-ZOO, nnU-Net++'s
    `Generic_UNetPlusPlus`, segmentation_models_pytorch's `UnetPlusPlus` (and its 3D port) and the networks of the paper's
    Keras code. Outputs keep the peer's form: MONAI's list; nnU-Net++'s tuple, X(0,5) first; probabilities if the peer
    returns them (UNET-ZOO, Keras, a final activation); otherwise logits, a list with deep supervision. `predict` always
    uses the logits. Weights are copied, with their precision and device; frozen parameters stay frozen.

    Args:
        source: the peer's module, which is not changed; or its state_dict; or a checkpoint, as a dictionary or a file, that
            holds one at any place and behind any prefix (Lightning, MONAI, nnU-Net, nn.DataParallel, torch.compile); or, for
            Keras, an HDF5 file or the arrays by `layer/kernel:0`. A model of this package is returned unchanged.
        options: for a state_dict, what its names and shapes leave open; by default as the peer's. `act` and `norm` as in
            `UNetPlusPlus` (MONAI, nnU-Net++), `upsample` (the `NestedUNet`s), `dropout` (MONAI, Keras) and
            `deep_supervision` (MONAI: False, nnU-Net++: True). A MONAI or nnU-Net++ state_dict with norm weights but no
            running statistics is taken for instance norm.

    Returns:
        A `Network`, or an `EncodedNetwork` (smp). Its layers are in training or evaluation mode as the module's, in
        training mode from a state_dict.

    Raises:
        ValueError: the source is not a known UNet++, a part of it has no counterpart, or names or shapes do not fit; the
            message says which and why.
        TypeError: the source is none of the above.
    """
    if isinstance(source, nn.Module):
        source = unwrapped(source)
    if isinstance(source, (Network, EncodedNetwork)):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(Path(source))
    if isinstance(source, nn.Module):
        if options:
            raise ValueError(f"{sorted(options)} cannot be given for a module, which has them itself: only for a state_dict")
        return _convert_module(source)
    if not isinstance(source, Mapping):
        raise TypeError(f"convert takes a module, a state_dict or {_file_kinds()}, not {type(source).__name__}")
    state = _weights(source)
    if isinstance(state, (Network, EncodedNetwork)):
        return state
    peer = _recognise(state, "state_dict")
    if peer.needs_module:
        raise peer.fail(peer.needs_module)
    unknown = sorted(set(options) - set(peer.open_options))
    if unknown:
        takes = f"{list(peer.open_options)} can be" if peer.open_options else "nothing can be"
        raise ValueError(f"{unknown} cannot be given for a state_dict of {peer.title}: {takes}")
    network: Any = peer.from_state(state, options)
    return network


def _read_file(path: Path) -> Mapping[str, Tensor]:
    peer = next((peer for peer in PEERS.values() if path.suffix in peer.file_endings), None)
    if peer is None and path.suffix in TORCH_FILES:
        content = torch_files.read(path, "checkpoint")
        return content if isinstance(content, Mapping) else {}
    if peer is None:
        raise ValueError(f"{path} is not {_file_kinds()}, nor a checkpoint ({', '.join(TORCH_FILES)})")
    return peer.read_file(path)


def _file_kinds() -> str:
    return " or ".join(peer.file_kind for peer in PEERS.values() if peer.file_kind)


def to_state_dict(model: Network | EncodedNetwork, peer: str) -> dict[str, Tensor] | dict[str, np.ndarray]:
    """The weights of a model under a peer's names, in its order and layout: the exact inverse of `convert`.

    Args:
        model: from `convert`, or any model of this package with the peer's structure.
        peer: "monai", "nested-unet" (bigmb's too), "unet-zoo", "nnunet", "smp" or "keras".

    Returns:
        Copies that the peer's `load_state_dict(..., strict=True)` takes; for Keras, arrays under the names of its weights.

    Raises:
        ValueError: there is no such peer, or the model cannot be one of it; the message says what differs.
    """
    if peer not in PEERS:
        raise ValueError(f"peer={peer!r} is not known: use one of {sorted(PEERS)}")
    target, model = PEERS[peer], unwrapped(model)
    if not isinstance(model, target.model):
        raise ValueError(f"this {type(model).__name__} cannot be written as a {target.title}")
    if why := changed(getattr(model, "nest", model)):
        raise ValueError(f"this model cannot be written as a {target.title}: {why}")
    own = model.state_dict()
    try:
        state = {pair.theirs: pair.to_theirs(own[pair.ours]) for pair in target.pairs(model)}
    except KeyError as error:
        raise ValueError(f"this model cannot be written as a {target.title}, which has no {error.args[0]!r}") from None
    if isinstance(model, Network):
        _check_fits(target, model, state)
    return target.written(state)


def _check_fits(peer: Peer, model: Network, state: dict[str, Tensor]) -> None:
    """Raises ValueError unless the weights, converted back, give the same network."""
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
    """What two networks must have in common to compute the same from the same weights; options with all keywords."""
    options = {
        key: parse_option(value, key, TABLES[key]) if key in TABLES and value is not None else value
        for key, value in network.options.items()
        if key != "odd_sizes"
    }
    return {
        "heads": network.topology.heads,
        "nodes": network.topology.nodes,
        "spare heads": network.spare_heads,
        **options,
    }


def _convert_module(module: nn.Module) -> Network | EncodedNetwork:
    peer = _recognise(module.state_dict(), type(module).__name__, hint(module))
    try:
        network: Any = peer.convert(module)
    except (AttributeError, IndexError, KeyError) as error:
        raise peer.fail(f"its class is built differently ({type(error).__name__}: {error})") from error
    _carry_modes(peer, module, network)
    _compare(peer, module, network)
    return network


def _carry_modes(peer: Peer, module: nn.Module, network: Network | EncodedNetwork) -> None:
    """Freezes parameters and sets training modes as in the module; a copied encoder has both already."""
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
    """Compares the outputs on a small image, in eval mode: a class with these weights may compute something else."""
    weight = next(network.parameters())
    if weight.device.type == "meta":
        return
    if weight.dtype.itemsize < 4:
        module, network = copy.deepcopy(module).float(), copy.deepcopy(network).float()
    # An encoder's kernels may be larger than the least image.
    image = network.sample() if network.over_encoder else small_image(network, network.multiple)
    try:
        with evaluating(module), evaluating(network), without_tf32():
            expected, actual = module(image), network(image)
    except (RuntimeError, TypeError, ValueError) as error:
        size = list(image.shape[2:])
        raise peer.fail(f"it does not run on an image of {size} pixels, for comparison: {first_line(error)}") from error
    if type(expected) is not type(actual) and not isinstance(expected, Tensor):
        raise peer.fail(f"its class returns a {type(expected).__name__}, expected a {type(actual).__name__}")
    pairs = [(expected, actual)] if isinstance(actual, Tensor) else list(zip(expected, actual, strict=True))
    for theirs, ours in pairs:
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > AGREEMENT * theirs.abs().max():
            raise peer.fail("its class computes something else from these weights: its forward pass was changed")


def _recognise(state: Mapping[str, Tensor], what: str, inside: str = "") -> Peer:
    """The peer whose names most of the weights have."""
    peer = max(PEERS.values(), key=lambda candidate: candidate.claims(state))
    if not peer.claims(state):
        names, known = ", ".join(list(state)[:3]) or "none", ", ".join(peer.title for peer in PEERS.values())
        raise ValueError(f"this {what} is not of a known UNet++ (its weights: {names}){inside}: convert takes {known}")
    if peer.model is Network and any(value.ndim == 3 for value in state.values()):
        raise peer.fail("its convolutions have 1 spatial axis; unetpp_fast has 2 and 3")
    return peer


def _weights(source: Mapping[str, Any]) -> Network | EncodedNetwork | Mapping[str, Tensor]:
    """Tensors by the peers' plain names, from a checkpoint, a state_dict or arrays; of a checkpoint of this package the
    network.

    Raises:
        ValueError: there are none; for common kinds of checkpoint the message says where the weights are.
    """
    if isinstance(source.get("config"), Mapping) and isinstance(source.get("model"), Mapping):
        network = from_config(source["config"])
        network.load_state_dict(source["model"])
        return network
    found = find(
        source, lambda state: max(own_names(state), *(peer.claims(peer.plain_names(state)) for peer in PEERS.values()))
    )
    if found and own_names(found.state) == found.count:
        extra = "; uf.load_optimized reads those of an optimized module" if "_extra_state" in source else ""
        raise ValueError(
            "these are weights of this package's network, without its settings: build the network as it was and call its"
            f" load_state_dict, or give a checkpoint of `unetpp-fast train`{extra}"
        )
    inside = [name for name in ("state_dict", "model_state_dict", "model", "net") if isinstance(source.get(name), Mapping)]
    if found is None and inside and source[inside[0]]:
        source = source[inside[0]]  # weights, of a network that nothing here knows
        inside = []
    bad = next((name for name, value in source.items() if not isinstance(value, (Tensor, np.ndarray))), None)
    if bad is not None and (found is None or not found.place):
        hint = f"give its [{inside[0]!r}]" if inside else "give only the weights"
        raise ValueError(f"this is not a state_dict: {bad!r} is a {type(source[bad]).__name__}; {hint}")
    state: Mapping[str, Tensor] = {
        name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for name, value in (found.state if found else source).items()
    }
    for peer in PEERS.values():
        state = peer.plain_names(state)
    return state
