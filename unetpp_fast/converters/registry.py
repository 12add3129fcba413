"""The implementations of UNet++ that `convert` reads and `to_state_dict` writes.

To add one, write a subclass of `Peer` in a file here and list it in `PEERS`.
"""

from __future__ import annotations

from .keras import Keras
from .monai import Monai
from .nested_unet import Nested, UnetZoo
from .nnunet import NnUnet
from .peer import Peer
from .smp import Smp

PEERS: dict[str, Peer] = {peer.name: peer for peer in (Monai(), Nested(), UnetZoo(), NnUnet(), Smp(), Keras())}
