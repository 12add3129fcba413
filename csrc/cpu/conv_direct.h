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
  float* data = nullptr;
  int depth, height, width, channels, front;  // front: rows and columns of zeros before the map, planes of zeros in 3D

  Padded() = default;
  // times: as large as the map.
  Padded(const Map& map, bool deep, int taps, int times) {
    const int around = 1 + std::max(1, taps - 2);
    depth = deep ? map.depth * times + around : 1;
    height = map.height * times + around;
    width = map.width * times + around;
    channels = round_up(map.channels, 4);
    front = deep ? 1 : 0;
  }
  int64_t size() const { return static_cast<int64_t>(depth) * height * width * channels; }
  int64_t place(int z, int y, int x) const { return ((static_cast<int64_t>(z) * height + y) * width + x) * channels; }

  template <class E>
  void fill(const Map& map, int64_t image, float slope) {
    std::memset(data, 0, sizeof(float) * size());
    for (int z = 0; z < map.depth; z++) {
      const Plane<E> plane = plane_of<E>(map, image, z, slope);
      for (int y = 0; y < map.height; y++)
        for (int x = 0; x < map.width; x++) {
          const E* from = plane.data + y * plane.row + x * plane.column;
          float* to = data + place(z + front, y + 1, x + 1);
          for (int c = 0; c < map.channels; c += LANES) {
            const int count = map.channels - c;
            V value = load_some(from + c, count);
            if (plane.scale)
              value = read(plane, value, load_some(plane.scale + c, count), load_some(plane.shift + c, count), c);
            store_some(to + c, value, count);
          }
        }
    }
  }

  // With the linearly up-sampled low source; `work`: of `work_of` values.
  template <class E>
  void fill_up_sampled(const Conv& conv, int64_t image, float* work) {
    std::memset(data, 0, sizeof(float) * size());
    const Map& out = conv.out;
    for (int z = 0; z < out.depth; z++)
      for (int y = 0; y < out.height; y++)
        up_sample<E>(conv.b, conv.axes, conv.align_corners, conv.slope, image, z, y, 0, 1, out.width,
                     data + place(z + front, y + 1, 1), channels, work);
  }
};

constexpr int GATHERED = 6;  // pixels at a time; more gain nothing

struct DirectOperand {
  Padded padded;
  int stride = 1, taps = 0;  // taps in all
  int64_t offsets[64];       // of the taps, in the padded copy
  const float* weights;      // [phases, taps, blocks of outputs, channels, WIDTH]
  int64_t block, tap, phase;

  void prepare(const Map& map, bool deep, int taps_, int stride_, const float* packed, int out_blocks, bool phased,
               int times = 1) {
    padded = Padded(map, deep, taps_, times);
    stride = stride_;
    for (int z = 0; z < (deep ? taps_ : 1); z++)
      for (int y = 0; y < taps_; y++)
        for (int x = 0; x < taps_; x++) offsets[taps++] = padded.place(z, y, x);
    weights = packed;
    block = static_cast<int64_t>(padded.channels) * WIDTH;
    tap = block * out_blocks;
    phase = phased ? tap * taps : 0;
  }
};

// The pixels that are computed together: for each, where its first tap lies in the operands' copies, and its place in acc.
struct Group {
  const float* rows[2][GATHERED];
  float* places[GATHERED];
};

// places[r] = sum over operands, taps and k of rows[r][offset(tap) + k] weights[tap, k, :], each tap's products summed by
// themselves, which keeps rounding errors small; weights: of a phase and block.
template <int R>
static void gather(const DirectOperand* operands, int count, const Group& group, const float* const* weights) {
  bool first = true;
  for (int i = 0; i < count; i++)
    for (int t = 0; t < operands[i].taps; t++) {
      const float *from[R], *w = weights[i] + t * operands[i].tap;
      for (int r = 0; r < R; r++) from[r] = group.rows[i][r] + operands[i].offsets[t];
      const int channels = operands[i].padded.channels;
      V sums[R][2] = {};
#pragma GCC unroll 4
      for (int k = 0; k < channels; k++, w += WIDTH) {
        V w0 = load(w), w1 = load(w + LANES);
        KEEP(w0);
        KEEP(w1);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          const V x = splat(from[r][k]);
          sums[r][0] += x * w0;
          sums[r][1] += x * w1;
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) {
          float* place = group.places[r] + v * LANES;
          store(place, first ? sums[r][v] : load(place) + sums[r][v]);
        }
      first = false;
    }
}

// One block of outputs of an image, all its pixels, into acc.
static void direct_sums(const Conv& conv, const DirectOperand* operands, int count, int o, float* acc) {
  const bool phased = conv.geometry == Geometry::kPhased, deep = conv.axes == 3;
  const int step = phased ? 2 : 1, z_step = deep ? step : 1;
  const int height = conv.out.height / step, width = conv.out.width / step;
  const int units = conv.out.depth / z_step * height * width;
  for (int phase = 0; phase < (phased ? (deep ? 8 : 4) : 1); phase++) {
    const int pz = phase / 4, py = phase / 2 % 2, px = phase % 2;
    const float* weights[2];
    for (int i = 0; i < count; i++) weights[i] = operands[i].weights + phase * operands[i].phase + o * operands[i].block;
    for_pieces<GATHERED>(units, [&](int first, auto rows) {
      Group group;
      for (int r = 0; r < rows; r++) {
        const int z = (first + r) / (height * width), y = (first + r) / width % height, x = (first + r) % width;
        for (int i = 0; i < count; i++) {
          const Padded& padded = operands[i].padded;
          const int s = operands[i].stride;
          group.rows[i][r] = padded.data + padded.place(deep ? z * s + pz : 0, y * s + py, x * s + px);
        }
        const int64_t plane = static_cast<int64_t>(z) * z_step + pz;
        group.places[r] = acc + ((plane * conv.out.height + y * step + py) * conv.out.width + x * step + px) * WIDTH;
      }
      gather<rows>(operands, count, group, weights);
    });
  }
}

template <class E>
static void direct_image(const Conv& conv, int taps, int stride, int64_t image, int first_out, int last_out,
                         int out_blocks) {
  const bool phased = conv.geometry == Geometry::kPhased, deep = conv.axes == 3;
  DirectOperand operands[2];
  int count = 1;
  operands[0].prepare(conv.a, deep, taps, stride, conv.ua, out_blocks, false);
  if (conv.b.data) operands[count++].prepare(conv.b, deep, phased ? 2 : 3, 1, conv.ub, out_blocks, phased,
                                             conv.linear ? 2 : 1);
  const int64_t plane = static_cast<int64_t>(conv.out.height) * conv.out.width * WIDTH;
  int64_t needed = conv.out.depth * plane;
  for (int i = 0; i < count; i++) needed += operands[i].padded.size();
  if (conv.linear) needed += work_of(conv.b, conv.out.width);
  float* acc = scratch.get(needed);
  float* memory = acc + conv.out.depth * plane;
  for (int i = 0; i < count; i++) {
    operands[i].padded.data = memory;
    if (i && conv.linear)
      operands[i].padded.fill_up_sampled<E>(conv, image, memory + operands[i].padded.size());
    else
      operands[i].padded.fill<E>(i ? conv.b : conv.a, image, conv.slope);
    memory += operands[i].padded.size();
  }
  const Blocks planes = {1, conv.out.height, conv.out.width, 1, 1};
  for (int o = first_out; o < last_out; o++) {
    direct_sums(conv, operands, count, o, acc);
    for (int z = 0; z < conv.out.depth; z++) {
      float* stats = conv.stats ? conv.stats + (image * conv.out.depth + z) * 3 * conv.out.channels : nullptr;
      finish<E>(conv, Place(conv, planes, image * conv.out.depth + z), o, acc + z * plane, stats);
    }
  }
}

template <class E>
static void conv_direct(const Conv& conv, int taps, int stride) {
  const int out_blocks = (conv.out.channels + WIDTH - 1) / WIDTH, shares = shares_of(conv.images, out_blocks);
  parallel_for(static_cast<int64_t>(conv.images) * shares, [&](int64_t index) {
    const int share = index % shares;
    direct_image<E>(conv, taps, stride, index / shares, out_blocks * share / shares, out_blocks * (share + 1) / shares,
                    out_blocks);
  });
}

}  // namespace ISA
}  // namespace unetpp
