"""Implementations of UNet++ that tests cannot install, rewritten with their known graph, weight names, order of
concatenation and form of outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = (3, 5, 4, 6, 7)


class NestedBlock(nn.Module):
    """pytorch-nested-unet, bigmb."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, padding=1), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class ZooBlock(nn.Module):
    """UNET-ZOO."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        first = [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*first, nn.Conv2d(cout, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class NestedUNet(nn.Module):
    """The `NestedUNet`s: X(i,0..j-1), then the map up-sampled with align_corners=True; UNET-ZOO ends in a sigmoid."""

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        deep_supervision: bool = False,
        features: tuple[int, ...] = FEATURES,
        zoo: bool = False,
    ):
        super().__init__()
        f, block = features, ZooBlock if zoo else NestedBlock
        self.deep_supervision, self.zoo = deep_supervision, zoo
        self.pool = nn.MaxPool2d(2, 2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        for j in range(5):
            for i in range(5 - j):
                cin = j * f[i] + f[i + 1] if j else f[i - 1] if i else channels
                setattr(self, f"conv{i}_{j}", block(cin, f[i]))
        for name in ("final1", "final2", "final3", "final4") if deep_supervision else ("final",):
            setattr(self, name, nn.Conv2d(f[0], classes, 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = {}
        for i in range(5):
            maps[i, 0] = getattr(self, f"conv{i}_0")(self.pool(maps[i - 1, 0]) if i else x)
        for j in range(1, 5):
            for i in range(5 - j):
                operands = [maps[i, column] for column in range(j)] + [self.up(maps[i + 1, j - 1])]
                maps[i, j] = getattr(self, f"conv{i}_{j}")(torch.cat(operands, 1))
        final = torch.sigmoid if self.zoo else (lambda logits: logits)
        if self.deep_supervision:
            return [final(getattr(self, f"final{j}")(maps[0, j])) for j in range(1, 5)]
        return final(self.final(maps[0, 4]))


class NnBlock(nn.Module):
    def __init__(
        self, cin: int, cout: int, dims: int, stride=1, norm: str = "instance", dropout: float = 0.0, kernel=(3, 3, 3)
    ):
        super().__init__()
        kernel = kernel[:dims]
        padding = [taps // 2 for taps in kernel]
        self.conv = (nn.Conv2d, nn.Conv3d)[dims - 2](cin, cout, kernel, stride=stride, padding=padding)
        self.dropout = (nn.Dropout2d, nn.Dropout3d)[dims - 2](dropout) if dropout else None
        kinds = {"instance": (nn.InstanceNorm2d, nn.InstanceNorm3d), "batch": (nn.BatchNorm2d, nn.BatchNorm3d)}
        options = {"eps": 1e-5, "affine": True}
        self.instnorm = kinds[norm][dims - 2](cout, **options)
        self.lrelu = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.lrelu(self.instnorm(x if self.dropout is None else self.dropout(x)))


class NnStack(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class NnUnet(nn.Module):
    """nnU-Net++: `loc{z}.{u}` is X(4-z-u,u+1), `seg_outputs.{n}` is the head on X(0,5-n); the deepest output comes first.

    strides: `pool_op_kernel_sizes`; kernels: `conv_kernel_sizes`. As in nnU-Net, X(i,j) has the kernel of level i + 1.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        dims: int = 2,
        features: tuple[int, ...] = (2, 3, 4, 5, 6, 6),
        deep_supervision: bool = True,
        final: str = "none",
        head_bias: bool = False,
        strides=(2,) * 5,
        kernels=((3, 3, 3),) * 6,
        **block,
    ):
        super().__init__()
        f = features
        self._deep_supervision = self.do_ds = deep_supervision
        self.upscale_logits = False
        self.final_nonlin = {"none": lambda x: x, "softmax": lambda x: F.softmax(x, 1), "tanh": torch.tanh}[final]
        conv, deconv = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dims - 2]

        def make(level: int, cin: int, cout: int, stride=1) -> NnBlock:
            return NnBlock(cin, cout, dims, stride, kernel=kernels[level], **block)

        encoder = [NnStack(make(0, channels, f[0]), make(0, f[0], f[0]))]
        encoder += [NnStack(make(i, f[i - 1], f[i], strides[i - 1]), make(i, f[i], f[i])) for i in range(1, 5)]
        encoder.append(nn.Sequential(NnStack(make(5, f[4], f[5], strides[4])), NnStack(make(5, f[5], f[5]))))
        self.conv_blocks_context = nn.ModuleList(encoder)
        for z in range(5):
            nodes, ups = [], []
            for u in range(5 - z):
                i = 4 - z - u
                inner = NnStack(make(i + 1, f[i] * (u + 2), f[i])), NnStack(make(i + 1, f[i], f[i]))
                nodes.append(nn.Sequential(*inner))
                ups.append(deconv(f[i + 1], f[i], strides[i], strides[i], bias=False))
            setattr(self, f"loc{z}", nn.ModuleList(nodes))
            setattr(self, f"up{z}", nn.ModuleList(ups))
        self.seg_outputs = nn.ModuleList(conv(f[0], classes, 1, bias=head_bias) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        maps = {}
        for i, stage in enumerate(self.conv_blocks_context):
            maps[i, 0] = x = stage(x)
        for j in range(1, 6):
            for i in range(6 - j):
                z, u = 5 - i - j, j - 1
                up = getattr(self, f"up{z}")[u](maps[i + 1, j - 1])
                maps[i, j] = getattr(self, f"loc{z}")[u](torch.cat([*(maps[i, c] for c in range(j)), up], 1))
        outputs = [self.final_nonlin(self.seg_outputs[n](maps[0, 5 - n])) for n in range(5)]
        return tuple(outputs) if self._deep_supervision and self.do_ds else outputs[0]


class SmpEncoder(nn.Module):
    """As an encoder of smp: a list of maps, each half as large as the last, the image first, and their `out_channels`."""

    def __init__(self, channels: int, widths: tuple[int, ...], dims: int):
        super().__init__()
        self.out_channels = (channels, *widths)
        conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
        self.stages = nn.ModuleList(
            nn.Sequential(conv(cin, cout, 3, stride=2, padding=1, bias=False), norm(cout), nn.GELU())
            for cin, cout in zip(self.out_channels, widths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features


class SCSEModule(nn.Module):
    def __init__(self, channels: int, dims: int):
        super().__init__()
        conv, pool = ((nn.Conv2d, nn.AdaptiveAvgPool2d), (nn.Conv3d, nn.AdaptiveAvgPool3d))[dims - 2]
        few = channels // 16
        self.cSE = nn.Sequential(pool(1), conv(channels, few, 1), nn.ReLU(), conv(few, channels, 1), nn.Sigmoid())
        self.sSE = nn.Sequential(conv(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cSE(x) + x * self.sSE(x)


class SmpBlock(nn.Module):
    def __init__(self, cin: int, skip: int, cout: int, dims: int, norm: bool, attention: str | None, mode: str):
        super().__init__()
        conv, bn = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]

        def layer(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(conv(a, b, 3, padding=1, bias=not norm), bn(b) if norm else nn.Identity(), nn.ReLU())

        def gate(channels: int) -> nn.Module:
            holder = nn.Module()
            holder.attention = SCSEModule(channels, dims) if attention == "scse" else nn.Identity()
            return holder

        self.conv1, self.attention1 = layer(cin + skip, cout), gate(cin + skip)
        self.conv2, self.attention2 = layer(cout, cout), gate(cout)
        self.interpolation_mode = mode

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode=self.interpolation_mode)
        if skips:
            x = self.attention1.attention(torch.cat([x, *skips], dim=1))
        return self.attention2.attention(self.conv2(self.conv1(x)))


class UnetPlusPlus(nn.Module):
    """smp: block x_{d}_{l} is X(D-1-l,l-d+1); it reads the up-sampled map, then X(i,j-1) to X(i,0)."""

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1,
        widths: tuple[int, ...] = (16, 18, 17, 20, 19),
        decoder: tuple[int, ...] = (23, 22, 21, 18, 16),
        dims: int = 2,
        attention: str | None = None,
        norm: bool = True,
        mode: str = "nearest",
        activation: nn.Module | None = None,
        center: bool = False,
        head_kernel: int = 3,
    ):
        super().__init__()
        self.encoder = SmpEncoder(channels, widths, dims)
        w, self.depth = widths[::-1], len(widths) - 1
        self.decoder = nn.Module()
        self.decoder.center = nn.Sequential(nn.Conv2d(w[0], w[0], 3)) if center else nn.Identity()
        self.decoder.blocks = nn.ModuleDict()
        for level in range(self.depth):
            for d in range(level + 1):
                low = (w[0], *decoder)[level] if d == 0 else w[level]
                out = w[level + 1] if d else decoder[level]
                skip = w[level + 1] * (level + 1 - d)
                self.decoder.blocks[f"x_{d}_{level}"] = SmpBlock(low, skip, out, dims, norm, attention, mode)
        last = SmpBlock(decoder[-2], 0, decoder[-1], dims, norm, attention, mode)
        self.decoder.blocks[f"x_0_{self.depth}"] = last
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2](decoder[-1], classes, head_kernel, padding=head_kernel // 2)
        final = nn.Module()
        final.activation = activation or nn.Identity()
        final.forward = lambda x: final.activation(x)
        self.segmentation_head = nn.Sequential(conv, nn.Identity(), final)
        self.classification_head = None

    def forward(self, x: Tensor) -> Tensor:
        features, dense = self.encoder(x)[1:][::-1], {}
        blocks = self.decoder.blocks
        for distance in range(self.depth):
            for d in range(self.depth - distance):
                level = d + distance
                low = dense[d, level - 1] if distance else features[d]
                skips = [dense[k, level] for k in range(d + 1, level + 1)] + [features[level + 1]]
                dense[d, level] = blocks[f"x_{d}_{level}"](low, skips)
        x = blocks[f"x_0_{self.depth}"](dense[0, self.depth - 1], [])
        return self.segmentation_head[2].activation(self.segmentation_head[0](x))


def keras_arrays(
    features: tuple[int, ...] = FEATURES, channels: int = 1, classes: int = 1, heads: tuple[str, ...] = ("output_4",)
) -> dict[str, np.ndarray]:
    """Random weights of the paper's Keras networks: U-Net if the head is "output", otherwise UNet++."""
    random, arrays = np.random.default_rng(5), {}

    def add(layer: str, cin: int, cout: int, taps: int, transposed: bool = False) -> None:
        shape = (taps, taps, cout, cin) if transposed else (taps, taps, cin, cout)
        arrays[f"{layer}/kernel:0"] = (random.normal(size=shape) / np.sqrt(taps * taps * cin)).astype(np.float32)
        arrays[f"{layer}/bias:0"] = random.normal(size=cout).astype(np.float32) / 3

    for i, j in keras_grid(heads):
        f, place = features[i], f"{i + 1}{j + 1}"
        skips = 0 if not j else 1 if heads == ("output",) else j
        if j:
            add(f"up{place}", features[i + 1], f, 2, transposed=True)
        add(f"conv{place}_1", f * (skips + 1) if j else features[i - 1] if i else channels, f, 3)
        add(f"conv{place}_2", f, f, 3)
    for head in heads:
        add(head, features[0], classes, 1)
    return arrays


def keras_grid(heads: tuple[str, ...]) -> list[tuple[int, int]]:
    """(level, column) of every node."""
    if heads == ("output",):
        return [(i, 0) for i in range(5)] + [(4 - j, j) for j in range(1, 5)]
    return [(i, j) for j in range(5) for i in range(5 - j)]


def keras_forward(arrays: dict[str, np.ndarray], x: Tensor, heads: tuple[str, ...] = ("output_4",)) -> list[Tensor]:
    """Keras' inference, channels last: probabilities `[N, H, W, classes]` per head."""
    weights = {name: torch.from_numpy(array).to(x.dtype) for name, array in arrays.items()}

    def conv(x: Tensor, layer: str) -> Tensor:
        kernel = weights[f"{layer}/kernel:0"]
        padded = F.pad(x, (0, 0) + (kernel.shape[0] // 2,) * 4)
        windows = padded.unfold(1, kernel.shape[0], 1).unfold(2, kernel.shape[1], 1)
        return torch.einsum("nyxihw,hwio->nyxo", windows, kernel) + weights[f"{layer}/bias:0"]

    def deconv(x: Tensor, layer: str) -> Tensor:
        n, height, width, _ = x.shape
        pixels = torch.einsum("nyxi,pqoi->nypxqo", x, weights[f"{layer}/kernel:0"])
        return pixels.reshape(n, 2 * height, 2 * width, -1) + weights[f"{layer}/bias:0"]

    maps = {}
    for i, j in keras_grid(heads):
        place = f"{i + 1}{j + 1}"
        if j:
            columns = [0] if heads == ("output",) else range(j)
            operand = torch.cat([deconv(maps[i + 1, j - 1], f"up{place}"), *(maps[i, c] for c in columns)], dim=-1)
        else:
            operand = x if i == 0 else maps[i - 1, 0].unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax(dim=(2, 4))
        maps[i, j] = conv(conv(operand, f"conv{place}_1").relu(), f"conv{place}_2").relu()
    columns = [4 if head == "output" else int(head[-1]) for head in heads]
    return [conv(maps[0, column], head).sigmoid() for column, head in zip(columns, heads, strict=True)]
