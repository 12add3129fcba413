"""smp's `UnetPlusPlus` over the families of encoders that smp has, with random weights."""

from __future__ import annotations

from support.helpers import build
from support.peer_libraries import library
from torch import nn

DECODER = (48, 40, 32, 24, 16)


def of_smp(name: str, depth: int, channels: int, gate: str | None, interpolation: str) -> nn.Module:
    """In eval mode, in which random paths are off. smp's constructor refuses mit, whose first map has no channels, although
    its decoder runs over it: there the parts are put together."""
    smp, widths = library("segmentation_models_pytorch"), DECODER[-depth:]
    options = {"encoder_weights": None, "classes": 2, "decoder_channels": widths}
    options |= {"decoder_attention_type": gate, "decoder_interpolation": interpolation, "encoder_depth": depth}
    if not name.startswith("mit"):
        return build(smp.UnetPlusPlus, name, in_channels=channels, **options).eval()

    def assembled() -> nn.Module:
        model = smp.UnetPlusPlus("resnet18", in_channels=channels, **options)
        model.encoder = smp.encoders.get_encoder(name, in_channels=channels, depth=depth, weights=None)
        model.decoder = smp.decoders.unetplusplus.decoder.UnetPlusPlusDecoder(
            model.encoder.out_channels, widths, depth, attention_type=gate, interpolation_mode=interpolation
        )
        return model

    return build(assembled).eval()
