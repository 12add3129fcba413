"""What a network can be made of: one table each for activations, norms, up-samplings and down-samplings.

An entry names the PyTorch layer, its keywords, and what each backend can do with it. To add an option that only the
reference computes, add one entry with `unsupported=reference_only("...")`: networks, checkpoints, `convert` and `explain`
all read these tables. Precisions have their table in `precision.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

ENGINES = ("triton", "cuda", "cpu")  # every backend except the reference
Option = str | tuple[str, Mapping[str, Any]]
Keywords = Mapping[str, Any]
Unsupported = Callable[[str, Keywords], str]


def every_backend(backend: str, keywords: Keywords) -> str:
    """All backends compute it."""
    return ""


def reference_only(what: str) -> Unsupported:
    """Only the reference computes it; `what` names it in the plural."""
    return lambda backend, keywords: f"{what} run on the reference"


@dataclass(frozen=True)
class Entry:
    """What all entries have.

    keywords: the option's keywords with their defaults.
    unsupported: takes the name of a backend and the keywords; returns why that backend cannot compute it, "" if it can.
        The reference computes everything and is never asked.
    """

    keywords: Keywords = field(default_factory=dict)
    unsupported: Unsupported = every_backend


@dataclass(frozen=True)
class Activation(Entry):
    """layer: the module, made with the keywords. slope: of the leaky ReLU that the backends compute, 0 for ReLU. gain: for
    the initial weights (He et al., 2015). learned: it has parameters, so each convolution has its own. scales: whether
    act(k x) = k act(x) for k > 0."""

    layer: type[nn.Module] = nn.ReLU
    slope: Callable[[Keywords], float] = lambda keywords: 0.0
    gain: Callable[[Keywords], float] = lambda keywords: nn.init.calculate_gain("relu")
    learned: bool = False
    scales: bool = True


@dataclass(frozen=True)
class Norm(Entry):
    """per_image: whether statistics are taken per image, in evaluation too; otherwise over the batch, with running
    statistics in evaluation."""

    per_image: bool = False


@dataclass(frozen=True)
class Upsample(Entry):
    """reduces: whether the number of output channels can be chosen; otherwise all channels are passed on. phases: whether
    the next convolution can be computed from the low-resolution map, phase by phase; otherwise the up-sampled map is
    materialised."""

    reduces: Callable[[Keywords], bool] = lambda keywords: bool(keywords["project"])
    phases: bool = False


def _instance_unsupported(backend: str, keywords: Keywords) -> str:
    return "" if keywords["affine"] else "norms without scale and shift run on the reference"


SMOOTH = "activations whose derivative is not told by the sign of their output"
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(),
    "leaky_relu": Activation(
        {"negative_slope": 0.01},
        layer=nn.LeakyReLU,
        slope=lambda keywords: keywords["negative_slope"],
        gain=lambda keywords: nn.init.calculate_gain("leaky_relu", keywords["negative_slope"]),
    ),
    "prelu": Activation(
        {"num_parameters": 1, "init": 0.25},
        reference_only("activations with learned slopes"),
        layer=nn.PReLU,
        gain=lambda keywords: nn.init.calculate_gain("leaky_relu", keywords["init"]),
        learned=True,
    ),
    "gelu": Activation({"approximate": "none"}, reference_only(SMOOTH), layer=nn.GELU, scales=False),
    "silu": Activation({}, reference_only(SMOOTH), layer=nn.SiLU, scales=False),
}
NORMS: dict[str, Norm] = {
    "batch": Norm({"eps": 1e-5, "momentum": 0.1}),
    "instance": Norm({"eps": 1e-5, "affine": True}, _instance_unsupported, per_image=True),
    "group": Norm(
        {"num_groups": 8, "eps": 1e-5, "affine": True}, reference_only("norms over groups of channels"), per_image=True
    ),
}
UPSAMPLES: dict[str, Upsample] = {
    "deconv": Upsample({"bias": True}, reduces=lambda keywords: True, phases=True),
    "nearest": Upsample({"project": False}, phases=True),
    "linear": Upsample({"align_corners": False, "project": False}),
    "pixelshuffle": Upsample({}, reduces=lambda keywords: True),
}
DOWNSAMPLES: dict[str, Entry] = {
    "pool": Entry(),
    "stride": Entry(),
}


def parse_option(value: Any, what: str, table: Mapping[str, Entry]) -> tuple[str, dict[str, Any]]:
    """Splits `"name"` or `("name", {keyword: value})` into the name and all of its keywords, with defaults filled in.

    Raises:
        ValueError: unknown name or keyword; the message lists the known ones.
    """
    named = isinstance(value, str)
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Mapping)
    name, keywords = (value, {}) if named else (value[0], dict(value[1])) if pair else (value, {})
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what}={value!r} is not known: use one of {sorted(table)} or a (name, {{keyword: value}}) pair")
    known = table[name].keywords
    unknown = set(keywords) - set(known)
    if unknown:
        takes = f"it takes {sorted(known)}" if known else "it takes none"
        raise ValueError(f"{what}={name!r} has no keyword {sorted(unknown)}: {takes}")
    return name, {**known, **keywords}


def reduces_channels(upsample: Option) -> bool:
    """Whether the number of output channels of an up-sampling can be chosen; otherwise all channels are passed on."""
    name, keywords = parse_option(upsample, "upsample", UPSAMPLES)
    return UPSAMPLES[name].reduces(keywords)


def learned_upsample(upsample: Option) -> dict[str, bool]:
    """Which convolutions an up-sampling has, as `Topology.gflop` takes it."""
    name, keywords = parse_option(upsample, "upsample", UPSAMPLES)
    return {
        "deconv": name == "deconv",
        "pixelshuffle": name == "pixelshuffle",
        "project": bool(keywords.get("project")),
    }


def norm_name(norm: Option | None) -> str | None:
    """The name of a norm, None for no norm."""
    return norm if norm is None or isinstance(norm, str) else norm[0]


# By the option's name.
TABLES: dict[str, Mapping[str, Any]] = {
    "downsample": DOWNSAMPLES,
    "upsample": UPSAMPLES,
    "norm": NORMS,
    "act": ACTIVATIONS,
}


def unsupported(options: Mapping[str, Any], backend: str) -> str:
    """Why a backend cannot compute a network with these options (`Network.options`); "" if it can."""
    for what, table in TABLES.items():
        if options.get(what) is not None:
            name, keywords = parse_option(options[what], what, table)
            if reason := table[name].unsupported(backend, keywords):
                return reason
    act, keywords = parse_option(options.get("act", "relu"), "act", ACTIVATIONS)
    if options.get("norm") is None and ACTIVATIONS[act].slope(keywords) < 0:
        return "without a norm, the engine needs a slope >= 0: an output that tells the sign of its input"
    return ""
