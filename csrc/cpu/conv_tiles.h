// Convolutions of bfloat16 maps in matrix tiles (tiles.h), by direct sums: nothing is transformed, nothing rounded twice.
//
// A block of pixels with its border is copied, activated, to [blocks of 32 channels, rows, columns, 32]. There the pixels of a
// row and the first of the next are neighbours, so that any tap of 16 outputs is one tile; the outputs that fall between two
// rows are left out. Blocks of several images run together, so that weights are read once for all of them.
#pragma once

#include "conv.h"
#include "filters.h"
#include "tiles.h"

namespace unetpp {
namespace ISA {

// A copy of a plane, as tiles take it.
struct Copied {
  BFloat16* data = nullptr;
  int rows = 0, pitch = 0;  // of the copy
  int blocks = 0;           // of 32 channels
  int64_t block = 0;        // values from one to the next

  // Returns the memory behind it.
  BFloat16* place(int channels, int rows_, int pitch_, BFloat16* memory) {
    data = memory;
    rows = rows_;
    pitch = pitch_;
    blocks = (channels + TILE_CHANNELS - 1) / TILE_CHANNELS;
    // The last tile ends up to 15 pixels after the last output, whose last tap is up to 2 pixels after the last row.
    block = static_cast<int64_t>(rows * pitch + TILE_PIXELS + 2) * TILE_CHANNELS;
    return memory + blocks * block;
  }

  // From (y0, x0) of the plane on; what lies outside is zero.
  void fill(const Plane<BFloat16>& plane, int y0, int x0) const {
    const int left = std::min(pitch, std::max(0, -x0)), right = std::max(left, std::min(pitch, plane.width - x0));
    for (int y = 0; y < rows; y++) {
      const bool inside = y0 + y >= 0 && y0 + y < plane.height;
      for (int b = 0; b < blocks; b++) {
        BFloat16* to = data + b * block + static_cast<int64_t>(y) * pitch * TILE_CHANNELS;
        const int before = inside ? left : pitch, after = inside ? right : pitch;
        std::memset(to, 0, sizeof(BFloat16) * before * TILE_CHANNELS);
        std::memset(to + after * TILE_CHANNELS, 0, sizeof(BFloat16) * (pitch - after) * TILE_CHANNELS);
        if (inside) fill_pixels(plane, y0 + y, x0, before, after, b * TILE_CHANNELS, to);
      }
    }
  }

 private:
  static void fill_pixels(const Plane<BFloat16>& plane, int row, int x0, int first, int last, int c, BFloat16* to) {
    const BFloat16* from = plane.data + row * plane.row + (x0 + first) * plane.column + c;
    const int count = std::min(TILE_CHANNELS, plane.channels - c);
    to += first * TILE_CHANNELS;
    if (!plane.scale && count == TILE_CHANNELS) {
      for (int x = first; x < last; x++, from += plane.column, to += TILE_CHANNELS)
        std::memcpy(to, from, sizeof(BFloat16) * TILE_CHANNELS);
      return;
    }
    V scale[TILE_CHANNELS / LANES] = {}, shift[TILE_CHANNELS / LANES] = {};
    for (int v = 0; plane.scale && v < count; v += LANES) {
      scale[v / LANES] = load_some(plane.scale + c + v, count - v);
      shift[v / LANES] = load_some(plane.shift + c + v, count - v);
    }
    for (int x = first; x < last; x++, from += plane.column, to += TILE_CHANNELS)
      for (int v = 0; v < TILE_CHANNELS; v += LANES) {
        V value = {};
        if (v < count) {
          value = load_some(from + v, count - v);
          if (plane.scale) value = read(plane, value, scale[v / LANES], shift[v / LANES], c + v);
        }
        store(to + v, value);
      }
  }
};

// What is summed: taps of a copy, and weights [blocks of inputs, taps, 2, pairs, LANES, 2] for one block of outputs.
struct Taken {
  const BFloat16* data;
  int64_t block;
  int blocks, taps;
  int64_t offsets[9];         // values from an output's place to its taps
  const BFloat16* weights;    // of the block at hand
  const BFloat16* filter;     // of all blocks of outputs

  int64_t weights_count() const { return static_cast<int64_t>(blocks) * taps * 2 * TILE_WEIGHTS; }
};

// acc[16 R pixels, WIDTH] (+)= sum over taken copies, channels and taps, from pixel `pixel` of each copy on.
template <int R, int C>
ONCE static void tile_products(const Taken* taken, int count, int64_t pixel, bool add, float* acc) {
  TileSums<R, C> sums;
  if (add)
    sums.read(acc, WIDTH);
  else
    sums.clear();
  for (int i = 0; i < count; i++) {
    const BFloat16* weights = taken[i].weights;
    for (int b = 0; b < taken[i].blocks; b++) {
      const BFloat16* from = taken[i].data + b * taken[i].block + pixel * TILE_CHANNELS;
      for (int t = 0; t < taken[i].taps; t++, weights += 2 * TILE_WEIGHTS)
        sums.add(from + taken[i].offsets[t], TILE_CHANNELS, TILE_PIXELS * TILE_CHANNELS, weights);
    }
  }
  sums.write(acc, WIDTH);
}

// All `pixels` of a block, rounded up to whole tiles; after(n): the first n are there.
template <class F>
static void all_products(const Taken* taken, int count, int64_t pixels, int outputs, bool add, float* acc, const F& after) {
  for (int64_t p = 0; p < pixels; p += 2 * TILE_PIXELS) {
    const bool pair = p + TILE_PIXELS < pixels, wide = outputs > LANES;
    const auto products = pair ? (wide ? tile_products<2, 2> : tile_products<2, 1>)
                               : (wide ? tile_products<1, 2> : tile_products<1, 1>);
    products(taken, count, p, add, acc + p * WIDTH);
    after(std::min(pixels, p + (pair ? 2 : 1) * TILE_PIXELS));
  }
}

// A block of pixels: copies of its operands, and what its sums take: the first, then those of each phase.
template <class First>
struct TileBlock {
  static constexpr int kMost = Sum<First, BFloat16>::kMost;
  int64_t number = 0;
  int rows = 0, pitch = 0, low_pitch = 0, phases = 0;
  int count = 0, low_count = 0;  // operands of the first sum, and of each phase
  Copied copies[kMost + 2];
  Taken taken[kMost + 4 * 2];

  int64_t pixels() const { return static_cast<int64_t>(rows) * pitch; }
  int64_t low_pixels() const { return phases ? static_cast<int64_t>(rows / 2) * low_pitch : 0; }

  // Lays out the copies from `memory` on, and fills them if that is there; returns how many values they take.
  // piece: memory in which a low source is up-sampled.
  int64_t prepare(const Conv& conv, const Blocks& blocks, int64_t block, int out_blocks, BFloat16* memory, float* piece) {
    const Place at(conv, blocks, block);
    Work<First, BFloat16> work;
    operands_of(conv, at.image, at.z, out_blocks, work);
    const auto& first = work.first;
    const auto& low = work.phases[0];
    number = block;
    rows = at.rows;
    pitch = at.columns + First::r - 1;
    low_pitch = at.columns / 2 + 2;
    phases = work.phase_count;
    count = first.count;
    low_count = phases ? low.count : 0;
    BFloat16* end = memory;
    for (int i = 0; i < count; i++) end = copies[i].place(first.planes[i].channels, rows + First::r - 1, pitch, end);
    for (int i = 0; i < low_count; i++)
      end = copies[count + i].place(low.planes[i].channels, rows / 2 + 2, low_pitch, end);
    if (!memory) return end - memory;
    for (int i = 0; i < count; i++) {
      const int y0 = at.y0 + first.y_start[i], x0 = at.x0 + first.x_start[i];
      if (first.makes(i))
        copies[i].fill(up_sampled<BFloat16>(conv, at.image, first.made[i], y0, x0, copies[i].rows, pitch, piece), 0, 0);
      else
        copies[i].fill(first.planes[i], y0, x0);
      taken[i] = take<First>(conv, first, i, copies[i], 0);
    }
    for (int i = 0; i < low_count; i++) copies[count + i].fill(low.planes[i], at.y0 / 2 - 1, at.x0 / 2 - 1);
    for (int phase = 0; phase < phases; phase++)
      for (int i = 0; i < low_count; i++)
        taken[count + phase * low_count + i] = take<TwoTaps>(conv, work.phases[phase], i, copies[count + i],
                                                             phase / 2 * low_pitch + phase % 2);
    return end - memory;
  }

  // The sums of block `o` of outputs, finished and stored.
  void run(const Conv& conv, const Blocks& blocks, int o, float* acc, float* low) {
    const Place at(conv, blocks, number);
    const int outputs = conv.out.channels - o * WIDTH;
    for (int i = 0; i < count + phases * low_count; i++) taken[i].weights = taken[i].filter + o * taken[i].weights_count();
    for (int phase = 0; phase < phases; phase++) {
      all_products(taken + count + phase * low_count, low_count, low_pixels(), outputs, false, low, [](int64_t) {});
      interleave(low, rows / 2, at.columns / 2, acc + (phase / 2 * pitch + phase % 2) * WIDTH);
    }
    V totals[2] = {};
    float* stats = conv.stats ? conv.stats + number * 3 * conv.out.channels : nullptr;
    int done = 0;
    all_products(taken, count, pixels(), outputs, phases > 0, acc, [&](int64_t there) {
      const int ready = static_cast<int>(there / pitch);
      if (ready > done)
        finish_rows<BFloat16>(conv, at, done, ready, o, acc, pitch, stats ? totals : nullptr);
      done = ready;
    });
    if (conv.past) stream_end();
    if (stats) statistics(acc, at.rows, at.columns, pitch, totals, outputs, stats + o * WIDTH, conv.out.channels);
  }

 private:
  template <class T>
  static Taken take(const Conv& conv, const Sum<T, BFloat16>& sum, int i, const Copied& copy, int64_t start) {
    Taken one = {copy.data, copy.block, copy.blocks, T::r * T::r, {}, nullptr, nullptr};
    for (int t = 0; t < one.taps; t++) one.offsets[t] = (start + t / T::r * copy.pitch + t % T::r) * TILE_CHANNELS;
    const int64_t filter = one.weights_count() * ((conv.out.channels + WIDTH - 1) / WIDTH);
    one.filter = (sum.filters[i] == &conv.wa ? conv.ta : conv.tb) + sum.filter[i] * filter;
    return one;
  }
  // The pixels of a phase to every second one of every second row.
  void interleave(const float* from, int height, int width, float* to) const {
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++)
        for (int v = 0; v < WIDTH; v += LANES)
          store(to + (static_cast<int64_t>(2 * y) * pitch + 2 * x) * WIDTH + v,
                load(from + (static_cast<int64_t>(y) * low_pitch + x) * WIDTH + v));
  }
};

constexpr int TILE_GROUP = 1024;  // pixels, of several images if need be, that share weights
constexpr int TILE_BLOCKS = 16;   // of a group at most

// Blocks first_block to last_block, for some blocks of output channels.
template <class First>
static void tile_group(const Conv& conv, const Blocks& blocks, int64_t first_block, int64_t last_block, int first_out,
                       int last_out, int out_blocks) {
  TileBlock<First> group[TILE_BLOCKS];
  const int count = static_cast<int>(last_block - first_block);
  int64_t values = 0, pixels = 0, low = 0;
  for (int i = 0; i < count; i++) {
    values += group[i].prepare(conv, blocks, first_block + i, out_blocks, nullptr, nullptr);
    pixels = std::max(pixels, group[i].pixels());
    low = std::max(low, group[i].low_pixels());
  }
  const int64_t sums = (pixels + TILE_PIXELS) * WIDTH, low_sums = (low + TILE_PIXELS) * WIDTH;
  const int64_t made = conv.linear ? piece_of(conv, blocks.rows + 2, blocks.columns + 2) : 0;
  float *acc = scratch.get(sums + low_sums + made + (values + 1) / 2), *piece = acc + sums + low_sums;
  BFloat16* memory = reinterpret_cast<BFloat16*>(piece + made);
  for (int i = 0; i < count; i++) memory += group[i].prepare(conv, blocks, first_block + i, out_blocks, memory, piece);
  const TileUse use;
  for (int o = first_out; o < last_out; o++)
    for (int i = 0; i < count; i++) group[i].run(conv, blocks, o, acc, acc + sums);
}

static void conv_tiles(const Conv& conv) {
  const Blocks blocks = tile_blocks_of(conv);
  const int64_t count = static_cast<int64_t>(conv.images) * parts_of(conv, blocks);
  const int64_t at_once = std::min(TILE_BLOCKS, std::max(1, TILE_GROUP / std::max(1, blocks.rows * blocks.columns)));
  const int64_t groups = (count + at_once - 1) / at_once;
  const int out_blocks = (conv.out.channels + WIDTH - 1) / WIDTH, shares = shares_of(groups, out_blocks);
  parallel_for(groups * shares, [&](int64_t index) {
    const int64_t group = index / shares, share = index % shares;
    const int64_t first = count * group / groups, last = count * (group + 1) / groups;
    const int first_out = out_blocks * share / shares, last_out = out_blocks * (share + 1) / shares;
    const auto run = conv.geometry == Geometry::kGathered ? tile_group<TwoTaps> : tile_group<ThreeTaps>;
    run(conv, blocks, first, last, first_out, last_out, out_blocks);
  });
}

// Weights as `tile_products` takes them, [filters, blocks of outputs, blocks of inputs, taps, 2, pairs, LANES, 2].
static void pack_tiles(const Filters& filters, BFloat16* to) {
  const int out_blocks = (filters.outputs + WIDTH - 1) / WIDTH;
  const int blocks = (filters.channels + TILE_CHANNELS - 1) / TILE_CHANNELS;
  parallel_for(static_cast<int64_t>(filters.count()) * out_blocks * blocks, [&](int64_t index) {
    const int filter = index / blocks / out_blocks, o = index / blocks % out_blocks, k0 = index % blocks * TILE_CHANNELS;
    const int columns = std::min(WIDTH, filters.outputs - o * WIDTH);
    const float* from = filters.at(filter) + k0 * filters.k + static_cast<int64_t>(o) * WIDTH * filters.co;
    float taps[9 * GATHERED_CHANNELS * WIDTH];
    for (int k = 0; k < TILE_CHANNELS; k += GATHERED_CHANNELS) {
      const int given = std::max(0, std::min(GATHERED_CHANNELS, filters.channels - k0 - k));
      if (given < GATHERED_CHANNELS || columns < WIDTH) std::memset(taps, 0, sizeof taps);
      gather<0>(filters, from + k * filters.k, given, columns, taps);
      for (int t = 0; t < filters.taps; t++)
        for (int r = 0; r < GATHERED_CHANNELS; r += 2)
          for (int v = 0; v < 2; v++) {
            const float* pair = taps + (t * GATHERED_CHANNELS + r) * WIDTH + v * LANES;
            const Words low = reinterpret_cast<Words>(rounded<BFloat16>(load(pair)));
            const Words words = low >> 16 | reinterpret_cast<Words>(rounded<BFloat16>(load(pair + WIDTH)));
            std::memcpy(to + ((index * filters.taps + t) * 2 + v) * TILE_WEIGHTS + (k + r) * LANES, &words, sizeof words);
          }
    }
  });
}

}  // namespace ISA
}  // namespace unetpp
