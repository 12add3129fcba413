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
#include "linear.h"

namespace unetpp {
namespace ISA {

// A distance between the n x n points of a transform: whole pages would put all of them into the same few sets of a cache.
INLINE int64_t spread(int64_t values) { return values % 1024 == 0 ? values + 32 : values; }

// Where a block lies.
struct Place {
  int64_t image;
  int z, y0, x0, rows, columns;

  Place(const Conv& conv, const Blocks& blocks, int64_t block) {
    const int per_plane = blocks.down * blocks.across;
    image = block / per_plane / conv.out.depth;
    z = block / per_plane % conv.out.depth;
    y0 = conv.begin + static_cast<int>(block % per_plane / blocks.across) * blocks.rows;
    x0 = block % blocks.across * blocks.columns;
    rows = std::min(blocks.rows, conv.end - y0);
    columns = std::min(blocks.columns, conv.out.width - x0);
  }
};

// Operands of one sum in the transformed domain, and the output pixels that it is for: step * i + (oy, ox).
template <class T, class E>
struct Sum {
  static constexpr int kMost = 16, points = T::n * T::n;
  int count = 0, step = 1, oy = 0, ox = 0;
  Plane<E> planes[kMost];  // without data: plane `made[i]` of the up-sampled low source
  int made[kMost];
  int y_start[kMost], x_start[kMost];  // where the first tap of output (0, 0) lies
  const float* weights[kMost];         // [points, blocks of outputs, k, WIDTH], if they are packed
  const Filters* filters[kMost];       // those that the weights are one of
  int filter[kMost];
  int down = 0, across = 0;  // tiles in a block
  int64_t total = 0;         // tiles that are multiplied together: of one block or of several
  float* tiles[kMost];       // [points, total, channels rounded up]

  // The first tap of output (0, 0) lies at (y, x); its weights are filter `index` of those that are packed, or of `from`.
  void add(const Plane<E>& plane, int y, int x, const float* packed, const Filters& from, int index, int out_blocks) {
    planes[count] = plane;
    y_start[count] = y;
    x_start[count] = x;
    const int64_t values = static_cast<int64_t>(points) * out_blocks * round_up(plane.channels, 4) * WIDTH;
    weights[count] = packed ? packed + index * values : nullptr;
    filters[count] = &from;
    filter[count++] = index;
  }
  void add_made(int channels, int z, const float* packed, const Filters& from, int index, int out_blocks) {
    made[count] = z;
    add({nullptr, 0, 0, 0, 0, channels, nullptr, nullptr, 0, 0}, -1, -1, packed, from, index, out_blocks);
  }
  bool makes(int i) const { return !planes[i].data; }
  // Values of memory in which a piece is up-sampled.
  int64_t piece(const Conv& conv) const { return conv.linear ? piece_of(conv, down * T::m + 2, across * T::m + 2) : 0; }
  void cut(int rows, int columns) {
    down = (rows + T::m * step - 1) / (T::m * step);
    across = (columns + T::m * step - 1) / (T::m * step);
  }
  int64_t number() const { return static_cast<int64_t>(down) * across; }
  int padded(int i) const { return round_up(planes[i].channels, LANES); }
  // From point to point of the transformed tiles of operand i, and of the products.
  int64_t stride(int i) const { return spread(total * padded(i)); }
  int64_t product() const { return spread(total * WIDTH); }
  int64_t size() const {
    int64_t values = 0;
    for (int i = 0; i < count; i++) values += points * stride(i);
    return values;
  }
  float* place(float* memory) {
    for (int i = 0; i < count; i++) {
      tiles[i] = memory;
      memory += points * stride(i);
    }
    return memory;
  }
  // Transforms the tiles of a block, which are number `first_tile` and the following of all; `memory`: for `piece`.
  void transform_inputs(const Conv& conv, const Place& at, int64_t first_tile, float* memory) const {
    for (int i = 0; i < count; i++) {
      int y0 = at.y0 / step + y_start[i], x0 = at.x0 / step + x_start[i];
      Plane<E> plane = planes[i];
      if (makes(i)) {
        plane = up_sampled<E>(conv, at.image, made[i], y0, x0, down * T::m + 2, across * T::m + 2, memory);
        y0 = x0 = 0;
      }
      for (int ty = 0; ty < down; ty++)
        for (int tx = 0; tx < across; tx++)
          transform<T, false>(plane, y0 + ty * T::m, x0 + tx * T::m, tiles[i] + (first_tile + ty * across + tx) * padded(i),
                              stride(i));
    }
  }
  // Products of all tiles for block `o` of `blocks` blocks of output channels.
  void multiply_block(int o, int blocks, float* products) const {
    for (int t = 0; t < points; t++) {
      Segment segments[kMost];
      for (int i = 0; i < count; i++) {
        const int k = round_up(planes[i].channels, 4);
        segments[i] = {tiles[i] + t * stride(i), padded(i),
                       weights[i] + (static_cast<int64_t>(t) * blocks + o) * k * WIDTH, k};
      }
      multiply_all(segments, count, total, products + t * product(), WIDTH);
    }
  }
  // Adds the outputs of a block to acc [rows, columns, WIDTH]; writes where `first`.
  ONCE void outputs(const float* products, int64_t first_tile, float* acc, int rows, int columns, bool first) const {
    for (int64_t j = 0; j < number(); j++)
      for (int v = 0; v < WIDTH; v += LANES) {
        V y[T::m][T::m];
        inverse<T>(products + (first_tile + j) * WIDTH + v, product(), y);
        const int top = j / across * T::m * step + oy, left = j % across * T::m * step + ox;
        for (int i = 0; i < T::m && top + i * step < rows; i++)
          for (int k = 0; k < T::m && left + k * step < columns; k++) {
            float* place = acc + (static_cast<int64_t>(top + i * step) * columns + left + k * step) * WIDTH + v;
            store(place, first ? y[i][k] : load(place) + y[i][k]);
          }
      }
  }
};

INLINE int border_class(int place, int size) { return place == size - 1 ? 2 : place == 0 ? 0 : 1; }

// Count, mean and sum of squared deviations of each channel of a block of rows x columns pixels, `pitch` pixels from row to
// row, into stats [3, channels]; totals: sums.
static void statistics(const float* acc, int rows, int columns, int64_t pitch, const V* totals, int count, float* stats,
                       int channels) {
  const float number = static_cast<float>(static_cast<int64_t>(rows) * columns);
  count = std::min(count, WIDTH);
  for (int v = 0; v < count; v += LANES, acc += LANES, stats += LANES, totals++) {
    // A mean far from zero is rounded; what remains of it is found beside the squares of the deviations.
    const V near = *totals / number;
    V rest = {}, squares = {};
    for (int y = 0; y < rows; y++) {  // summed row by row, which keeps rounding errors small
      V row = {}, row_squares = {};
      for (int x = 0; x < columns; x++) {
        const V deviation = load(acc + (y * pitch + x) * WIDTH) - near;
        row += deviation;
        row_squares += deviation * deviation;
      }
      rest += row;
      squares += row_squares;
    }
    rest /= number;
    store_some(stats, splat(number), count - v);
    store_some(stats + channels, near + rest, count - v);
    store_some(stats + 2 * channels, squares - rest * rest * number, count - v);
  }
}

// out = (out +) act(acc + bias + border class) for rows `first_row` to `last_row` of a block of pixels, `pitch` pixels from row
// to row; with totals acc becomes what was stored, whose sums are added to totals.
template <class E>
static void finish_rows(const Conv& conv, const Place& here, int first_row, int last_row, int block, float* acc,
                        int64_t pitch, V* totals) {
  const Map& out = conv.out;
  const int first = block * WIDTH, count = std::min(WIDTH, out.channels - first);
  const int depth_class = conv.axes == 3 ? border_class(here.z, out.depth) * 9 : 0;
  const bool add = conv.add, past = conv.past;
  const Activation act = conv.act;
  const float slope = conv.slope, *border = conv.border;
  V bias[2] = {};
  for (int v = 0; conv.bias && v < count; v += LANES) bias[v / LANES] = load_some(conv.bias + first + v, count - v);
  for (int y = first_row; y < last_row; y++) {
    const int row_class = depth_class + border_class(here.y0 + y, out.height) * 3;
    const int64_t row = static_cast<int64_t>(here.z) * out.height + here.y0 + y - out.origin;
    E* place = at<E>(out, here.image, row * out.width + here.x0) + first;
    float* from = acc + y * pitch * WIDTH;
    for (int x = 0; x < here.columns; x++, place += out.pixel, from += WIDTH)
      for (int v = 0; v < count; v += LANES) {
        V value = load(from + v) + bias[v / LANES];
        if (border) {
          const int64_t row = row_class + border_class(here.x0 + x, out.width);
          value += load_some(border + row * out.channels + first + v, count - v);
        }
        if (act != Activation::kNone) value = activate(value, act, slope);
        if (add) value += load_some(place + v, count - v);
        value = past ? stream_some(place + v, value, count - v) : store_some(place + v, value, count - v);
        if (!totals) continue;
        store(from + v, value);
        totals[v / LANES] += value;
      }
  }
}

// A whole block, with its statistics if there are some.
template <class E>
static void finish(const Conv& conv, const Place& here, int block, float* acc, float* stats) {
  V totals[2] = {};
  finish_rows<E>(conv, here, 0, here.rows, block, acc, here.columns, stats ? totals : nullptr);
  if (conv.past) stream_end();
  const int first = block * WIDTH;
  if (stats)
    statistics(acc, here.rows, here.columns, here.columns, totals, conv.out.channels - first, stats + first,
               conv.out.channels);
}

// The sums of one block: the first over a, and with phases one more for each of the 4 in the plane.
template <class First, class E>
struct Work {
  Sum<First, E> first;
  Sum<TwoTaps, E> phases[4];
  int phase_count = 0;

  // body(sum, whether it is the first); without channels in a, there is none of it.
  template <class F>
  void each(const F& body) {
    if (first.count) body(first, true);
    for (int i = 0; i < phase_count; i++) body(phases[i], false);
  }
  // Whether a sum's outputs are the first of their pixels.
  bool writes(bool is_first) const { return is_first || !first.count; }
};

// Operands of output plane z of an image.
template <class First, class E>
static void operands_of(const Conv& conv, int64_t image, int z, int blocks, Work<First, E>& work) {
  const bool deep = conv.axes == 3;
  const Map &a = conv.a, &b = conv.b;
  if (conv.geometry == Geometry::kGathered) {
    for (int q = 0; q < (deep ? 4 : 1); q++) {
      const int from = deep ? 2 * z - 1 + q : 0;
      if (from < 0 || from >= a.depth) continue;
      for (int parity = 0; parity < 4; parity++) {
        const int py = parity / 2, px = parity % 2;  // taps 1 and 3 meet even pixels, and are the last of each pair
        work.first.add(plane_of<E>(a, image, from, conv.slope, 2, py, px), -py, -px, conv.ua, conv.wa, q * 4 + 3 - parity,
                       blocks);
      }
    }
    return;
  }
  const Map* maps[] = {a.channels ? &a : nullptr, conv.geometry == Geometry::kPlain && b.data ? &b : nullptr};
  const float* packed[] = {conv.ua, conv.ub};
  const Filters* filters[] = {&conv.wa, &conv.wb};
  for (int i = 0; i < 2; i++)
    for (int t = 0; maps[i] && t < (deep ? 3 : 1); t++) {
      const int from = deep ? z - 1 + t : 0;
      if (from < 0 || from >= a.depth) continue;
      if (i == 1 && conv.linear)
        work.first.add_made(b.channels, from, conv.ub, conv.wb, t, blocks);
      else
        work.first.add(plane_of<E>(*maps[i], image, from, conv.slope), -1, -1, packed[i], *filters[i], t, blocks);
    }
  if (conv.geometry != Geometry::kPhased || !b.data) return;
  work.phase_count = 4;
  const int pz = deep ? z % 2 : 0, depth_taps = deep ? 2 : 1;
  for (int phase = 0; phase < 4; phase++) {
    Sum<TwoTaps, E>& sum = work.phases[phase];
    sum.step = 2;
    sum.oy = phase / 2;
    sum.ox = phase % 2;
    for (int t = 0; t < depth_taps; t++) {
      const int from = deep ? z / 2 + pz - 1 + t : 0;
      if (from >= 0 && from < b.depth)
        sum.add(plane_of<E>(b, image, from, conv.slope), sum.oy - 1, sum.ox - 1, conv.ub, conv.wb,
                (pz * 4 + phase) * depth_taps + t, blocks);
    }
  }
}

template <class E>
INLINE void finish_block(const Conv& conv, const Place& at, int64_t block, int o, float* acc) {
  float* stats = conv.stats ? conv.stats + block * 3 * conv.out.channels : nullptr;
  finish<E>(conv, at, o, acc, stats);
}

template <class First, class E>
static void conv_block(const Conv& conv, const Blocks& blocks, int64_t block, int first_out, int last_out, int out_blocks) {
  const Place at(conv, blocks, block);
  Work<First, E> work;
  operands_of(conv, at.image, at.z, out_blocks, work);
  int64_t needed = 0, products = 0, piece = 0;
  work.each([&](auto& sum, bool) {
    sum.cut(at.rows, at.columns);
    sum.total = sum.number();
    needed += sum.size();
    piece = std::max(piece, sum.piece(conv));
    products = std::max(products, sum.points * sum.product());
  });
  float* memory = scratch.get(piece + needed + products + static_cast<int64_t>(at.rows) * at.columns * WIDTH);
  float *product = memory + piece, *acc = product + products;
  float* rest = acc + static_cast<int64_t>(at.rows) * at.columns * WIDTH;
  work.each([&](auto& sum, bool) {
    rest = sum.place(rest);
    sum.transform_inputs(conv, at, 0, memory);
  });
  for (int o = first_out; o < last_out; o++) {
    work.each([&](auto& sum, bool first) {
      sum.multiply_block(o, out_blocks, product);
      sum.outputs(product, 0, acc, at.rows, at.columns, work.writes(first));
    });
    finish_block<E>(conv, at, block, o, acc);
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
  const int64_t count = static_cast<int64_t>(conv.images) * parts_of(conv, blocks);
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
