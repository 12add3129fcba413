// Convolutions over a prefix and a low source that are never concatenated or up-sampled, block by block of output pixels:
// transform the tiles of every operand, multiply, transform back into the block, finish, store. A block stays in the cache.
//
//     geometry    operand a                             operand b
//     plain       3 taps                                none, or 3 taps
//     phased      3 taps                                2 taps for each phase (py, px): output pixel 2u + p
//     gathered    4 taps at stride 2: 2 taps on each of the 4 lattices of every second pixel
//
// In 3D the taps along depth are further operands of the same sum.
#pragma once

#include "blocks.h"
#include "winograd.h"

namespace unetpp {
namespace ISA {

// A distance between the n x n points of a transform: whole pages would put all of them into the same few sets of a cache.
INLINE int64_t spread(int64_t values) { return values % 1024 == 0 ? values + 32 : values; }

// Operands of one sum in the transformed domain, and the output pixels that it is for: step * i + (oy, ox).
template <class T, class E>
struct Sum {
  static constexpr int kMost = 16;
  int count = 0, step = 1, oy = 0, ox = 0;
  Plane<E> planes[kMost];
  int y_start[kMost], x_start[kMost];  // where the first tap of output (0, 0) lies
  const float* weights[kMost];         // [n * n, blocks of outputs, k, WIDTH]
  int down = 0, across = 0;            // tiles in a block
  float* tiles[kMost];                 // [n * n, tiles, channels rounded up]

  void add(const Plane<E>& plane, int y, int x, const float* packed) {
    planes[count] = plane;
    y_start[count] = y;
    x_start[count] = x;
    weights[count++] = packed;
  }
  int64_t size() const {
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += T::n * T::n * stride(i);
    return total;
  }
  // From point to point of the transformed tiles of operand i.
  int64_t stride(int i) const { return spread(static_cast<int64_t>(down) * across * round_up(planes[i].channels, LANES)); }
  // Values of the packed weights of one operand.
  static int64_t packed(int channels, int blocks) {
    return static_cast<int64_t>(T::n) * T::n * blocks * round_up(channels, 4) * WIDTH;
  }
  float* transform_inputs(int y0, int x0, float* memory) {
    for (int i = 0; i < count; i++) {
      const int padded = round_up(planes[i].channels, LANES);
      tiles[i] = memory;
      for (int ty = 0; ty < down; ty++)
        for (int tx = 0; tx < across; tx++)
          transform<T, false>(planes[i], y0 / step + ty * T::m + y_start[i], x0 / step + tx * T::m + x_start[i],
                              memory + (ty * across + tx) * padded, stride(i));
      memory += T::n * T::n * stride(i);
    }
    return memory;
  }
  // Adds the outputs of block `o` of `blocks` blocks of output channels to acc [rows, columns, WIDTH]; writes where `first`.
  void outputs(int o, int blocks, float* products, float* acc, int rows, int columns, bool first) const {
    const int number = down * across;
    const int64_t product = spread(static_cast<int64_t>(number) * WIDTH);
    for (int t = 0; t < T::n * T::n; t++) {
      Segment segments[kMost];
      for (int i = 0; i < count; i++) {
        const int padded = round_up(planes[i].channels, LANES), k = round_up(planes[i].channels, 4);
        segments[i] = {tiles[i] + t * stride(i), padded,
                       weights[i] + (static_cast<int64_t>(t) * blocks + o) * k * WIDTH, k};
      }
      multiply_rows(segments, count, number, products + t * product, WIDTH);
    }
    for (int j = 0; j < number; j++)
      for (int v = 0; v < WIDTH; v += LANES) {
        V y[T::m][T::m];
        inverse<T>(products + j * WIDTH + v, product, y);
        const int top = j / across * T::m * step + oy, left = j % across * T::m * step + ox;
        for (int i = 0; i < T::m && top + i * step < rows; i++)
          for (int k = 0; k < T::m && left + k * step < columns; k++) {
            float* place = acc + (static_cast<int64_t>(top + i * step) * columns + left + k * step) * WIDTH + v;
            store(place, first ? y[i][k] : load(place) + y[i][k]);
          }
      }
  }
};

// Whether the result goes past the caches: it is large, and nothing of it was read.
template <class E>
INLINE bool passes_caches(const Conv& conv) {
  const Map& out = conv.out;
  const int64_t pixels = static_cast<int64_t>(conv.images) * out.depth * out.height * out.width;
  return !conv.add && pixels * out.channels * static_cast<int64_t>(sizeof(E)) >= (16 << 20);
}

INLINE int border_class(int place, int size) { return place == size - 1 ? 2 : place == 0 ? 0 : 1; }

// Count, mean and sum of squared deviations of each channel of a block of `pixels`, into stats [3, channels]; totals: sums.
static void statistics(const float* acc, int64_t pixels, const V* totals, int count, float* stats, int channels) {
  const float number = static_cast<float>(pixels);
  for (int v = 0; v < count; v += LANES, acc += LANES, stats += LANES, totals++) {
    // A mean far from zero is rounded; what remains of it is found beside the squares of the deviations.
    const V near = *totals / number;
    V rest = {}, squares = {};
    for (int64_t p = 0; p < pixels; p++) {
      const V deviation = load(acc + p * WIDTH) - near;
      rest += deviation;
      squares += deviation * deviation;
    }
    rest /= number;
    store_some(stats, splat(number), count - v);
    store_some(stats + channels, near + rest, count - v);
    store_some(stats + 2 * channels, squares - rest * rest * number, count - v);
  }
}

// out = (out +) act(acc + bias + border class) for a block of rows x columns pixels; acc becomes what was stored if there
// are stats.
template <class E>
static void finish(const Conv& conv, int64_t image, int z, int y0, int x0, int rows, int columns, int block, float* acc,
                   float* stats) {
  const Map& out = conv.out;
  const int first = block * WIDTH, count = std::min(WIDTH, out.channels - first);
  const int depth_class = conv.axes == 3 ? border_class(z, out.depth) * 9 : 0;
  const bool past = passes_caches<E>(conv);
  V bias[2] = {}, totals[2] = {};
  for (int v = 0; conv.bias && v < count; v += LANES) bias[v / LANES] = load_some(conv.bias + first + v, count - v);
  float* from = acc;
  for (int y = 0; y < rows; y++) {
    const int row_class = depth_class + border_class(y0 + y, out.height) * 3;
    E* place = at<E>(out, image, (static_cast<int64_t>(z) * out.height + y0 + y) * out.width + x0) + first;
    for (int x = 0; x < columns; x++, place += out.pixel, from += WIDTH)
      for (int v = 0; v < count; v += LANES) {
        V value = load(from + v) + bias[v / LANES];
        if (conv.border) {
          const int64_t row = row_class + border_class(x0 + x, out.width);
          value += load_some(conv.border + row * out.channels + first + v, count - v);
        }
        if (conv.act) value = activate(value, conv.slope);
        if (conv.add) value += load_some(place + v, count - v);
        value = past ? stream_some(place + v, value, count - v) : store_some(place + v, value, count - v);
        if (!stats) continue;
        store(from + v, value);
        totals[v / LANES] += value;
      }
  }
  if (past) stream_end();
  if (stats) statistics(acc, static_cast<int64_t>(rows) * columns, totals, count, stats + first, out.channels);
}

// The sums of one block: the first over a, and with phases one more for each of the 4 in the plane.
template <class First, class E>
struct Work {
  Sum<First, E> first;
  Sum<TwoTaps, E> phases[4];
  int phase_count = 0;
};

// Operands of output plane z of an image.
template <class First, class E>
static void operands_of(const Conv& conv, int64_t image, int z, int blocks, Work<First, E>& work) {
  const bool deep = conv.axes == 3;
  const Map &a = conv.a, &b = conv.b;
  if (conv.geometry == Geometry::kGathered) {
    const int64_t packed = Sum<First, E>::packed(a.channels, blocks);
    for (int q = 0; q < (deep ? 4 : 1); q++) {
      const int from = deep ? 2 * z - 1 + q : 0;
      if (from < 0 || from >= a.depth) continue;
      for (int parity = 0; parity < 4; parity++) {
        const int py = parity / 2, px = parity % 2;
        work.first.add(plane_of<E>(a, image, from, conv.slope, 2, py, px), -py, -px, conv.ua + (q * 4 + parity) * packed);
      }
    }
    return;
  }
  const Map* maps[] = {&a, conv.geometry == Geometry::kPlain && b.data ? &b : nullptr};
  const float* weights[] = {conv.ua, conv.ub};
  for (int i = 0; i < 2; i++)
    for (int t = 0; maps[i] && t < (deep ? 3 : 1); t++) {
      const int from = deep ? z - 1 + t : 0;
      if (from >= 0 && from < maps[i]->depth)
        work.first.add(plane_of<E>(*maps[i], image, from, conv.slope), -1, -1,
                       weights[i] + t * Sum<First, E>::packed(maps[i]->channels, blocks));
    }
  if (conv.geometry != Geometry::kPhased || !b.data) return;
  work.phase_count = 4;
  const int pz = deep ? z % 2 : 0, depth_taps = deep ? 2 : 1;
  const int64_t packed = Sum<TwoTaps, E>::packed(b.channels, blocks);
  for (int phase = 0; phase < 4; phase++) {
    Sum<TwoTaps, E>& sum = work.phases[phase];
    sum.step = 2;
    sum.oy = phase / 2;
    sum.ox = phase % 2;
    for (int t = 0; t < depth_taps; t++) {
      const int from = deep ? z / 2 + pz - 1 + t : 0;
      if (from >= 0 && from < b.depth)
        sum.add(plane_of<E>(b, image, from, conv.slope), sum.oy - 1, sum.ox - 1,
                conv.ub + ((pz * 4 + phase) * depth_taps + t) * packed);
    }
  }
}

template <class First, class E>
static void conv_block(const Conv& conv, const Blocks& blocks, int64_t block, int first_out, int last_out, int out_blocks) {
  const int per_plane = blocks.down * blocks.across;
  const int64_t image = block / per_plane / conv.out.depth;
  const int z = block / per_plane % conv.out.depth;
  const int y0 = block % per_plane / blocks.across * blocks.rows, x0 = block % blocks.across * blocks.columns;
  const int rows = std::min(blocks.rows, conv.out.height - y0), columns = std::min(blocks.columns, conv.out.width - x0);
  Work<First, E> work;
  operands_of(conv, image, z, out_blocks, work);
  work.first.down = (rows + 3) / 4;
  work.first.across = (columns + 3) / 4;
  int64_t needed = work.first.size(), tiles = static_cast<int64_t>(work.first.down) * work.first.across;
  for (int i = 0; i < work.phase_count; i++) {
    work.phases[i].down = (rows + 7) / 8;
    work.phases[i].across = (columns + 7) / 8;
    needed += work.phases[i].size();
  }
  const int64_t products = 36 * spread(tiles * WIDTH), pixels = static_cast<int64_t>(rows) * columns * WIDTH;
  float* memory = scratch.get(needed + products + pixels);
  float *product = memory, *acc = product + products;
  float* rest = work.first.transform_inputs(y0, x0, acc + pixels);
  for (int i = 0; i < work.phase_count; i++) rest = work.phases[i].transform_inputs(y0, x0, rest);
  float* stats = conv.stats ? conv.stats + block * 3 * conv.out.channels : nullptr;
  for (int o = first_out; o < last_out; o++) {
    work.first.outputs(o, out_blocks, product, acc, rows, columns, true);
    for (int i = 0; i < work.phase_count; i++) work.phases[i].outputs(o, out_blocks, product, acc, rows, columns, false);
    finish<E>(conv, image, z, y0, x0, rows, columns, o, acc, stats);
  }
}

// Few pieces of work are divided by output channels too, so that no thread waits; the inputs are then transformed again.
INLINE int shares_of(int64_t count, int out_blocks) {
  const int64_t wanted = threads() == 1 || count == 0 ? 1 : (2 * threads() + count - 1) / count;
  return static_cast<int>(std::min<int64_t>(out_blocks, wanted));
}

template <class E>
static void conv_winograd(const Conv& conv) {
  const Blocks blocks = blocks_of(conv);
  const int64_t count = static_cast<int64_t>(conv.images) * winograd_parts(conv);
  const int out_blocks = (conv.out.channels + WIDTH - 1) / WIDTH;
  const int shares = shares_of(count, out_blocks);
  parallel_for(count * shares, [&](int64_t index) {
    const int share = index % shares;
    const int first = out_blocks * share / shares, last = out_blocks * (share + 1) / shares;
    if (conv.geometry == Geometry::kGathered)
      conv_block<TwoTaps, E>(conv, blocks, index / shares, first, last, out_blocks);
    else
      conv_block<ThreeTaps, E>(conv, blocks, index / shares, first, last, out_blocks);
  });
}

}  // namespace ISA
}  // namespace unetpp
