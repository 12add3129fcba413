// Convolutions by direct sums, of any taps, stride and phases: for maps so small that transformed weights, four times as
// many, cost more than they save.
//
// Operands are copied once per image, activated and with a border of zeros, so that every tap of every pixel is one address.
#pragma once

#include "conv.h"

namespace unetpp {
namespace ISA {

// A padded, activated copy of an operand: [D + around, H + around, W + around, channels rounded up to 4].
struct Padded {
  float* data;
  int height, width, channels, before;
  int64_t size;

  static Padded shape(const Map& map, int axes, int before, int after) {
    Padded p;
    p.before = before;
    p.channels = round_up(map.channels, 4);
    p.height = map.height + before + after;
    p.width = map.width + before + after;
    const int depth = axes == 3 ? map.depth + before + after : 1;
    p.size = static_cast<int64_t>(depth) * p.height * p.width * p.channels;
    p.data = nullptr;
    return p;
  }
  int64_t place(int z, int y, int x) const { return ((static_cast<int64_t>(z) * height + y) * width + x) * channels; }

  void fill(const Map& map, int64_t image, int axes, float slope, float* memory) {
    data = memory;
    std::memset(data, 0, sizeof(float) * size);
    for (int z = 0; z < map.depth; z++) {
      const Plane plane = plane_of(map, image, z, slope);
      for (int y = 0; y < map.height; y++)
        for (int x = 0; x < map.width; x++) {
          const float* from = plane.data + y * plane.row + x * plane.column;
          float* to = data + place(axes == 3 ? z + before : 0, y + before, x + before);
          for (int c = 0; c < map.channels; c += LANES) {
            const int count = map.channels - c;
            V value = load_some(from + c, count);
            if (plane.scale)
              value = activate(value * load_some(plane.scale + c, count) + load_some(plane.shift + c, count), slope);
            store_some(to + c, value, count);
          }
        }
    }
  }
};

// result[r] = sum over taps and k of rows[r][offset(tap) + k] weights[tap, k, :], for R rows at any addresses.
template <int R>
static void gather(const float* const* rows, const int64_t* offsets, int taps, int k, const float* weights, int64_t tap_stride,
                   V sums[R][2]) {
  for (int t = 0; t < taps; t++) {
    const float *from[R], *w = weights + t * tap_stride;
    for (int r = 0; r < R; r++) from[r] = rows[r] + offsets[t];
#pragma GCC unroll 4
    for (int i = 0; i < k; i++, w += WIDTH) {
      V w0 = load(w), w1 = load(w + LANES);
      KEEP(w0);
      KEEP(w1);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        V x = splat(from[r][i]);
        sums[r][0] += x * w0;
        sums[r][1] += x * w1;
      }
    }
  }
}

constexpr int GATHERED = 6;

struct DirectOperand {
  Padded padded;
  int taps, stride, first, count;  // per axis: taps, stride, where the first tap lies in the padded copy; taps in all
  int64_t offsets[64];
  int64_t packed;  // values of the weights of one phase

  void prepare(const Map& map, int axes, int taps_, int stride_, int first_, int out_blocks) {
    taps = taps_;
    stride = stride_;
    first = first_;
    padded = Padded::shape(map, axes, 1, taps);
    count = 0;
    for (int z = 0; z < (axes == 3 ? taps : 1); z++)
      for (int y = 0; y < taps; y++)
        for (int x = 0; x < taps; x++) offsets[count++] = padded.place(z, y, x);
    packed = static_cast<int64_t>(count) * out_blocks * padded.channels * WIDTH;
  }
};

static void direct_image(const Conv& conv, int taps, int stride, int64_t image, int o, int out_blocks) {
  const bool phased = conv.geometry == Geometry::kPhased, deep = conv.axes == 3;
  DirectOperand operands[2];
  int count = 1;
  operands[0].prepare(conv.a, conv.axes, taps, stride, 0, out_blocks);
  if (conv.b.data) operands[count++].prepare(conv.b, conv.axes, phased ? 2 : 3, 1, 0, out_blocks);
  const int step = phased ? 2 : 1;
  const int depth = deep ? conv.out.depth / step : 1, height = conv.out.height / step, width = conv.out.width / step;
  const int pixels = conv.out.depth * conv.out.height * conv.out.width;
  int64_t needed = static_cast<int64_t>(pixels) * WIDTH;
  for (int i = 0; i < count; i++) needed += operands[i].padded.size;
  float* acc = scratch.get(needed);
  float* memory = acc + static_cast<int64_t>(pixels) * WIDTH;
  const Map* maps[] = {&conv.a, &conv.b};
  const float* weights[] = {conv.ua, conv.ub};
  for (int i = 0; i < count; i++) {
    operands[i].padded.fill(*maps[i], image, conv.axes, conv.slope, memory);
    memory += operands[i].padded.size;
  }
  for (int phase = 0; phase < (phased ? (deep ? 8 : 4) : 1); phase++) {
    const int pz = phase / 4, py = phase / 2 % 2, px = phase % 2, units = depth * height * width;
    for (int u = 0; u < units; u += GATHERED) {
      V sums[GATHERED][2] = {};
      for (int i = 0; i < count; i++) {
        const DirectOperand& operand = operands[i];
        const float* rows[GATHERED];
        for (int r = 0; r < GATHERED; r++) {
          const int unit = std::min(u + r, units - 1), s = operand.stride;
          const int z = unit / (height * width), y = unit / width % height, x = unit % width;
          rows[r] = operand.padded.data + operand.padded.place(deep ? z * s + pz : 0, y * s + py, x * s + px);
        }
        const int64_t tap_stride = static_cast<int64_t>(out_blocks) * operand.padded.channels * WIDTH;
        const float* w = weights[i] + (i == 1 && phased ? phase * operand.packed : 0) + static_cast<int64_t>(o) * operand.padded.channels * WIDTH;
        gather<GATHERED>(rows, operand.offsets, operand.count, operand.padded.channels, w, tap_stride, sums);
      }
      for (int r = 0; r < GATHERED && u + r < units; r++) {
        const int z = (u + r) / (height * width), y = (u + r) / width % height, x = (u + r) % width;
        const int64_t place = ((static_cast<int64_t>(z) * (deep ? step : 1) + pz) * conv.out.height + y * step + py) * conv.out.width + x * step + px;
        store(acc + place * WIDTH, sums[r][0]);
        store(acc + place * WIDTH + LANES, sums[r][1]);
      }
    }
  }
  for (int z = 0; z < conv.out.depth; z++) {
    float* stats = conv.stats ? conv.stats + (image * conv.out.depth + z) * 3 * conv.out.channels : nullptr;
    finish(conv, image, z, 0, 0, conv.out.height, conv.out.width, conv.out.width, o,
           acc + static_cast<int64_t>(z) * conv.out.height * conv.out.width * WIDTH, stats);
  }
}

static void conv_direct(const Conv& conv, int taps, int stride) {
  const int out_blocks = (conv.out.channels + WIDTH - 1) / WIDTH;
  parallel_for(static_cast<int64_t>(conv.images) * out_blocks, [&](int64_t index) {
    direct_image(conv, taps, stride, index / out_blocks, index % out_blocks, out_blocks);
  });
}

}  // namespace ISA
}  // namespace unetpp
