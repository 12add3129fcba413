"""Networks as folders that others can load, here or on the Hugging Face Hub: weights as safetensors, a config, a card.

Nothing of it is a pickle: loading runs no code of the folder. The packages of the extra `hub` are imported where they are
needed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor, nn

from ..common.atomic_files import write_atomic
from ..common.errors import InputError, first_line
from ..common.extras import need
from ..common.version import __version__
from .model_card import model_card
from .normalisation import Normalisation

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1
EXTRA = "hub"
TRAINED_ON = ("exclusive", "normalisation", "spacing")  # of a config: no arguments of the network


class Pretrained:
    """What every network has whose `config`, plain data, is enough for its class's `from_config` to build it again.

    A class that defines `from_config(config, backend="auto")` is known to `from_pretrained` by its name.
    """

    kinds: ClassVar[dict[str, Any]] = {}
    exclusive = False  # its classes exclude one another: set by a training with such a loss
    normalisation: Normalisation | None = None  # how whole numbers are prepared: set by a training
    spacing: tuple[float, ...] | None = (
        None  # of the voxels, in mm along each axis: set by a training that resampled volumes
    )

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "from_config" in cls.__dict__:
            Pretrained.kinds[cls.__name__] = cls

    def _trained_on(self) -> dict[str, Any]:
        """What a training has set, for `config`."""
        found: dict[str, Any] = {"exclusive": True} if self.exclusive else {}
        found |= {"normalisation": self.normalisation.config} if self.normalisation else {}
        return found | ({"spacing": list(self.spacing)} if self.spacing else {})

    def _take_over(self, config: Mapping[str, Any]) -> None:
        """Sets what `_trained_on` gave."""
        self.exclusive = config.get("exclusive", False)
        self.normalisation = Normalisation.from_config(config.get("normalisation"))
        self.spacing = _spacing(config.get("spacing"))

    def save_pretrained(self, folder: str | os.PathLike, *, run: str | os.PathLike | None = None) -> Path:
        """Writes `model.safetensors`, `README.md` and `config.json`, each atomically and the config last.

        Args:
            folder: made if it does not exist; what was saved there before is replaced.
            run: the folder of `unetpp-fast train`, whose figures and settings the README then has.

        Returns:
            The folder. `from_pretrained` gives a network with the same weights, in their precision, and the same outputs.

        Raises:
            InputError: the network has no config, the folder has a `config.json` of something else, `run` is no run, or
                safetensors is not installed.
            WriteError: a file cannot be written.
        """
        return _save(self, Path(folder), Path(folder).resolve().name, run)

    def push_to_hub(
        self,
        repo: str,
        *,
        run: str | os.PathLike | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a network of unetpp_fast",
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository of the Hugging Face Hub, in one commit.

        Args:
            repo: "name" or "owner/name"; made if it does not exist, `private` or as the owner's default.
            run: as in `save_pretrained`.
            token: default that of `hf auth login`.
            message: of the commit.

        Returns:
            The repository's address.

        Raises:
            InputError: as `save_pretrained`, huggingface_hub is not installed, or the Hub refuses; the message says why.
        """
        hub = need("huggingface_hub", EXTRA)
        with tempfile.TemporaryDirectory() as folder:
            _save(self, Path(folder), repo, run)
            try:
                api = hub.HfApi(token=token)
                address = api.create_repo(repo_id=repo, private=private, exist_ok=True)
                api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
            except Exception as error:  # of the Hub or of the network: there are dozens
                raise InputError(f"cannot upload to {repo!r} on the Hugging Face Hub: {first_line(error)}") from error
        return str(address)


def from_pretrained(
    source: str | os.PathLike,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """The network, in eval mode, that `save_pretrained` or `push_to_hub` wrote.

    Args:
        source: a folder, or "owner/name" on the Hugging Face Hub, which is downloaded and kept by huggingface_hub.
        backend: as in `UNetPlusPlus`.
        device: to put the network on.
        revision: of a repository: a branch, a tag or a commit; fix it where others can write.
        token: for private repositories; default that of `hf auth login`.

    Raises:
        InputError: there is no such folder or repository, a file is missing, damaged or of something else, weights and
            config do not fit, or a package of the extra `hub` is missing; the message says what to do.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(os.fspath(source), revision, token)
    content = _read_config(folder / CONFIG)
    load = need("safetensors.torch", EXTRA).load_file
    try:
        state = load(folder / WEIGHTS, device=str(device))
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{folder / WEIGHTS} cannot be read: {first_line(error)}") from error
    try:
        with torch.random.fork_rng(devices=[]):
            network = Pretrained.kinds[content["kind"]].from_config(content["config"], backend=backend)
        network.load_state_dict(state, assign=True)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} does not hold the weights of the network it describes: {first_line(error)}") from error
    return network.to(device).eval()


def _spacing(numbers: Any) -> tuple[float, ...] | None:
    """Sizes of a voxel in a config."""
    if numbers is None:
        return None
    try:
        found = tuple(float(value) for value in numbers)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 < value < math.inf for value in found):
        raise InputError(f"{numbers!r} is no spacing of voxels: expected positive numbers")
    return found


def _save(network: Any, folder: Path, name: str, run: str | os.PathLike | None) -> Path:
    config, kind = getattr(network, "config", None), _kind(network)
    if config is None or kind is None or config.get("encoder", "") is None:
        raise InputError(
            f"this {type(network).__name__} has no config from which it could be built again (its encoder is another"
            " library's module): save its state_dict(), and load it into a model that is built and converted as before"
        )
    if (folder / CONFIG).exists():
        _read_config(folder / CONFIG, "save to another folder")
    card = model_card(network, name, None if run is None else Path(run))
    packed = need("safetensors.torch", EXTRA).save(_separate(network.state_dict()), metadata={"format": "pt"})
    content = {"library_name": "unetpp_fast", "format": FORMAT, "version": __version__, "kind": kind, "config": config}
    for file, data in ((WEIGHTS, packed), (CARD, card.encode()), (CONFIG, json.dumps(content, indent=1).encode() + b"\n")):
        write_atomic(folder / file, partial(_write, data))
    return folder


def _write(data: bytes, stream: BinaryIO) -> None:
    stream.write(data)


def _kind(network: Pretrained) -> str | None:
    """The name of the class that builds such a network from its config; None if none does."""
    return next((cls.__name__ for cls in type(network).__mro__ if Pretrained.kinds.get(cls.__name__) is cls), None)


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each contiguous and in memory of its own, as the format asks for."""
    found, places = {}, set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in places else value
        places.add(place)
    return found


def _download(name: str, revision: str | None, token: str | None) -> Path:
    """The folder into which huggingface_hub puts a repository's files that a network needs."""
    hub = need("huggingface_hub", EXTRA)
    try:
        found = hub.snapshot_download(name, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS])
    except Exception as error:  # of the Hub or of the network: there are dozens
        raise InputError(
            f"{name} is no folder, and cannot be loaded from the Hugging Face Hub: {first_line(error)}"
        ) from error
    return Path(found)


def _read_config(path: Path, advice: str = "it is no network that save_pretrained wrote") -> dict[str, Any]:
    """The content of a config that this version can use."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: {advice}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): {advice}") from error
    if not isinstance(content, dict) or content.get("library_name") != "unetpp_fast" or "config" not in content:
        raise InputError(f"{path} is of something else: {advice}")
    if content.get("format") != FORMAT or content.get("kind") not in Pretrained.kinds:
        written, known = content.get("version", "unknown"), sorted(Pretrained.kinds)
        raise InputError(
            f"{path} is a {content.get('kind')!r} of format {content.get('format')!r}, by version {written}; this version,"
            f" {__version__}, knows {known} of format {FORMAT}: install the version that wrote it"
        )
    return content
