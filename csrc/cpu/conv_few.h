// Winograd convolutions of many channels over few tiles. Streaming transformed weights, four to eleven times as many, would
// take longer than the products: so the weights stay as they are, and are transformed in the cache, a panel of input channels
// and one block of output channels at a time, for many tiles of as many images as that takes.
//
// Sums are added in the order of conv.h: the results have the same bits.
#pragma once

#include "conv.h"
#include "filters.h"

namespace unetpp {
namespace ISA {

constexpr int TILES_AT_ONCE = 128;  // that a panel is multiplied with, as far as whole blocks allow

// The products of all tiles for block o of output channels; the panel holds transformed weights.
template <class T, class E>
static void multiply_panels(const Sum<T, E>& sum, int o, float* panels, float* products) {
  constexpr int64_t point = STRETCH * WIDTH + LANES;
  struct Part {
    int operand, k, rows, place;
  } parts[STRETCH];
  int used = 0;
  const auto add = [&](int i, int k, int rows, int place) {
    panel<T>(*sum.filters[i], sum.filter[i], o, k, rows, panels + place * WIDTH, point);
    parts[used++] = {i, k, rows, place};
  };
  const auto multiply_points = [&](bool first) {
    for (int t = 0; t < sum.points; t++) {
      Segment segments[STRETCH];
      for (int s = 0; s < used; s++) {
        const Part& part = parts[s];
        segments[s] = {sum.tiles[part.operand] + t * sum.stride(part.operand) + part.k, sum.padded(part.operand),
                       panels + t * point + part.place * WIDTH, part.rows};
      }
      float* result = products + t * sum.product();
      if (first)
        multiply_rows<false>(segments, used, sum.total, result, WIDTH);
      else
        multiply_rows<true>(segments, used, sum.total, result, WIDTH);
    }
    used = 0;
  };
  each_stretch(sum.count, [&](int i) { return round_up(sum.planes[i].channels, 4); }, add, multiply_points);
}

// Blocks first_block to last_block, for some blocks of output channels.
template <class First, class E>
static void conv_group(const Conv& conv, const Blocks& blocks, int64_t first_block, int64_t last_block, int first_out,
                       int last_out, int out_blocks) {
  Work<First, E> work;  // of the block at hand
  const auto begin = [&](int64_t block) {
    const Place at(conv, blocks, block);
    work.first.count = 0;
    for (auto& sum : work.phases) sum.count = 0;
    operands_of(conv, at.image, at.z, out_blocks, work);
    work.each([&](auto& sum, bool) { sum.cut(at.rows, at.columns); });
    return at;
  };
  int64_t pixels = 0, needed = 0, products = 0, piece = 0;
  for (int64_t block = first_block; block < last_block; block++) {
    const Place at = begin(block);
    work.each([&](auto& sum, bool) {
      sum.total += sum.number();
      piece = std::max(piece, sum.piece(conv));
    });
    pixels += static_cast<int64_t>(at.rows) * at.columns;
  }
  work.each([&](auto& sum, bool) {
    needed += sum.size();
    products = std::max(products, sum.points * sum.product());
  });
  constexpr int64_t panels = 36 * (STRETCH * WIDTH + LANES);
  float* memory = scratch.get(panels + piece + products + pixels * WIDTH + needed);
  float *pieces = memory + panels, *product = pieces + piece, *acc = product + products, *rest = acc + pixels * WIDTH;
  work.each([&](auto& sum, bool) { rest = sum.place(rest); });
  // body(place, block, its first tiles in the first sum and in the others, its pixels)
  const auto each_block = [&](const auto& body) {
    int64_t tile = 0, phase_tile = 0;
    float* mine = acc;
    for (int64_t block = first_block; block < last_block; block++) {
      const Place at = begin(block);
      body(at, block, tile, phase_tile, mine);
      tile += work.first.number();
      phase_tile += work.phases[0].number();
      mine += static_cast<int64_t>(at.rows) * at.columns * WIDTH;
    }
  };
  each_block([&](const Place& at, int64_t, int64_t tile, int64_t phase_tile, float*) {
    work.each([&](auto& sum, bool first) {
      sum.transform_inputs(conv, at, first ? tile : phase_tile, pieces);
    });
  });
  for (int o = first_out; o < last_out; o++) {
    work.each([&](auto& sum, bool is_first) {
      multiply_panels(sum, o, memory, product);
      each_block([&](const Place& at, int64_t, int64_t tile, int64_t phase_tile, float* mine) {
        sum.outputs(product, is_first ? tile : phase_tile, mine, at.rows, at.columns, work.writes(is_first));
      });
    });
    each_block([&](const Place& at, int64_t block, int64_t, int64_t, float* mine) {
      finish_block<E>(conv, at, block, o, mine);
    });
  }
}

template <class E>
static void conv_few(const Conv& conv) {
  const Blocks blocks = blocks_of(conv);
  const int64_t count = static_cast<int64_t>(conv.images) * parts_of(conv, blocks);
  const int tiles = std::max(1, blocks.rows / 4 * (blocks.columns / 4)), at_once = std::max(1, TILES_AT_ONCE / tiles);
  const int64_t groups = (count + at_once - 1) / at_once;
  const int out_blocks = (conv.out.channels + WIDTH - 1) / WIDTH, shares = shares_of(groups, out_blocks);
  parallel_for(groups * shares, [&](int64_t index) {
    const int64_t group = index / shares, share = index % shares;
    const int64_t first = count * group / groups, last = count * (group + 1) / groups;
    const int first_out = out_blocks * share / shares, last_out = out_blocks * (share + 1) / shares;
    if (conv.geometry == Geometry::kGathered)
      conv_group<TwoTaps, E>(conv, blocks, first, last, first_out, last_out, out_blocks);
    else
      conv_group<ThreeTaps, E>(conv, blocks, first, last, first_out, last_out, out_blocks);
  });
}

}  // namespace ISA
}  // namespace unetpp
