// How the kernels cut a plane into blocks. It depends on shapes alone, never on the number of threads or the
// instruction set: equal inputs give equal sums.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace unetpp {

struct Blocks {
  int unit;           // side of what cannot be cut: a tile, or 2 x 2 tiles where phases interleave
  int rows, columns;  // pixels of a block
  int down, across;   // blocks of a plane
};

static inline Blocks blocks_of(const Conv& conv) {
  const int step = conv.geometry == Geometry::kPhased ? 2 : 1;
  const int inputs = std::max(1, conv.a.channels + conv.b.channels);
  // Transformed tiles of a block stay in the L2 cache, unless there are so many weights that streaming them costs more.
  const int tiles = std::min(std::max(std::max(2800 / inputs, conv.out.channels / 8), 12), 64);
  const int units = std::max(1, tiles / (step * step));
  Blocks blocks;
  blocks.unit = 4 * step;
  const int down = std::max(1, (conv.end - conv.begin + blocks.unit - 1) / blocks.unit);
  const int across = std::max(1, (conv.out.width + blocks.unit - 1) / blocks.unit);
  const int pieces = (across + units - 1) / units;
  const int wide = (across + pieces - 1) / pieces;
  const int high = std::min(down, std::max(1, units / wide));
  blocks.rows = high * blocks.unit;
  blocks.columns = wide * blocks.unit;
  blocks.down = (down + high - 1) / high;
  blocks.across = (across + wide - 1) / wide;
  return blocks;
}

// For matrix tiles: copies of the operands stay in the L2 cache, and few pixels lie beside a block.
static inline Blocks tile_blocks_of(const Conv& conv) {
  const int unit = conv.geometry == Geometry::kPhased ? 2 : 1;
  const int inputs = std::max(32, conv.a.channels + conv.b.channels / (unit * unit));
  const int pixels = std::min(std::max((1 << 19) / inputs, 256), 4096), height = std::max(1, conv.end - conv.begin);
  Blocks blocks;
  blocks.unit = unit;
  const int pieces = std::max(1, (conv.out.width + 253) / 254);
  blocks.columns = std::max(unit, ((conv.out.width + pieces - 1) / pieces + unit - 1) / unit * unit);
  const int down = std::max(1, (height * blocks.columns + pixels - 1) / pixels);
  blocks.rows = std::max(unit, ((height + down - 1) / down + unit - 1) / unit * unit);
  blocks.down = (height + blocks.rows - 1) / blocks.rows;
  blocks.across = std::max(1, (conv.out.width + blocks.columns - 1) / blocks.columns);
  return blocks;
}

static inline int64_t parts_of(const Conv& conv, const Blocks& blocks) {
  return static_cast<int64_t>(conv.out.depth) * blocks.down * blocks.across;
}

// Blocks of an image, each with statistics of its own.
static inline int64_t parts_of(const Conv& conv, Way way) {
  return way == Way::kDirect ? conv.out.depth
                             : parts_of(conv, way == Way::kTiles ? tile_blocks_of(conv) : blocks_of(conv));
}

}  // namespace unetpp
