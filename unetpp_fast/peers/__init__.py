"""The implementations of UNet++ whose weights `convert` reads and `to_state_dict` writes, one file a family."""

from .common import Pair, Peer, State
from .keras import Keras
from .monai import Monai
from .nested import Nested, UnetZoo
from .nnunet import NnUnet
from .smp import Smp

PEERS: dict[str, Peer] = {peer.name: peer for peer in (Monai(), Nested(), UnetZoo(), NnUnet(), Smp(), Keras())}

__all__ = ["PEERS", "Keras", "Pair", "Peer", "Smp", "State"]
