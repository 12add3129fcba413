// The beginning and the end of conv.h's kernel: bias and border; activation, addition, the store, and statistics of what
// was stored. Included by conv.h only.
//
// Products leave a thread with pairs of channels of many pixels. Each warp writes its rows to shared memory, one after
// another, and reads them as pieces of 16 bytes, which it stores and from which it takes the statistics.
#pragma once

// A row of a warp: 16 pixels by 32 channels. A lane has one piece of every `APART`-th pixel.
template <typename T>
struct WarpRow {
  using PIXELS = Rows<T, 32>;
  static constexpr int BYTES = 16 * PIXELS::BYTES, VECTOR = Format<T>::VECTOR;
  static constexpr int APART = 32 / PIXELS::PIECES, COUNT = 16 / APART;

  HW_FUNCTION static int piece(int lane) { return lane % PIXELS::PIECES; }
  HW_FUNCTION static int pixel(int lane, int k) { return lane / PIXELS::PIECES + k * APART; }
  HW_FUNCTION static uint32_t at(int lane, int k) { return PIXELS::at(pixel(lane, k), piece(lane)); }
  // Of a thread's pair n of pixel lane / 4 + 8 half, as products leave it.
  HW_FUNCTION static uint32_t at_pair(int lane, int half, int n) {
    const int byte = (8 * n + lane % 4 * 2) * static_cast<int>(sizeof(T));
    return PIXELS::at(lane / 4 + 8 * half, byte / 16) + byte % 16;
  }
};

template <typename T>
HW_FUNCTION hw::Pair load_pair(uint32_t at) {
  if constexpr (Format<T>::TF32)
    return hw::load_shared<hw::Pair>(at);
  else
    return hw::unpack<T>(hw::load_shared<uint32_t>(at));
}

template <typename T, bool RELU>
HW_FUNCTION void store_pair(uint32_t at, float first, float second) {
  if constexpr (Format<T>::TF32)
    hw::store_shared(at, hw::Pair{first, second});
  else
    hw::store_shared(at, RELU ? hw::pack_relu<T>(first, second) : hw::pack<T>(first, second));
}

template <typename T>
HW_FUNCTION void unpack_piece(float (&values)[Format<T>::VECTOR], const hw::Vec& piece) {
  HW_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (Format<T>::TF32) {
      values[w] = hw::as_float(piece.word[w]);
    } else {
      const hw::Pair pair = hw::unpack<T>(piece.word[w]);
      values[2 * w] = pair.first, values[2 * w + 1] = pair.second;
    }
  }
}

HW_FUNCTION int border_class(int place, int size) { return place == size - 1 ? 2 : place == 0 ? 0 : 1; }

// A thread's channels co + 8 n + {0, 1} of a vector, zeros past its end.
HW_FUNCTION void load_vector(float (&to)[4][2], const float* vector, int co, int channels) {
  if (co + 25 < channels) {  // all, without a comparison each
    HW_UNROLL
    for (int k = 0; k < 8; ++k) to[k / 2][k % 2] = vector[co + k / 2 * 8 + k % 2];
    return;
  }
  HW_UNROLL
  for (int k = 0; k < 8; ++k) {
    const int channel = co + k / 2 * 8 + k % 2;
    to[k / 2][k % 2] = channel < channels ? vector[channel] : 0.0f;
  }
}

// Sums begin with bias and border, whose rows differ by pixel only where the block touches the border.
template <typename TRAITS>
HW_FUNCTION void begin(float (&acc)[TRAITS::M][4][4], const ConvArguments& p, const Place<TRAITS>& place) {
  const int co = place.co + place.part * 32 + place.lane % 4 * 2, plane = p.deep ? border_class(place.z, p.depth) * 9 : 0;
  const bool within = place.y > 0 && place.y + TRAITS::OUT_ROWS < p.height && place.x > 0 &&
                      place.x + TRAITS::OUT_COLUMNS < p.width;
  float same[4][2] = {};
  if (p.bias) load_vector(same, p.bias, co, p.channels);
  if (p.border && within) {
    float inner[4][2];
    load_vector(inner, p.border + (plane + 4) * p.channels, co, p.channels);
    HW_UNROLL
    for (int k = 0; k < 8; ++k) same[k / 2][k % 2] += inner[k / 2][k % 2];
  }
  HW_UNROLL
  for (int k = 0; k < TRAITS::M * 16; ++k) acc[k / 16][k / 4 % 4][k % 4] = same[k / 4 % 4][k % 2];
  if (!p.border || within) return;
  HW_UNROLL
  for (int k = 0; k < TRAITS::M * 2; ++k) {
    const int m = k / 2, half = k % 2;
    const int row = plane + border_class(place.row(m), p.height) * 3 + border_class(place.column(half), p.width);
    float own[4][2];
    load_vector(own, p.border + row * p.channels, co, p.channels);
    HW_UNROLL
    for (int n = 0; n < 8; ++n) acc[m][n / 2][half * 2 + n % 2] += own[n / 2][n % 2];
  }
}

// A thread's pieces of the map that a warp writes.
template <typename TRAITS>
struct Pieces {
  using T = typename TRAITS::T;
  using ROW = WarpRow<T>;
  char* first;
  int row_bytes, step_bytes;  // from row to row, and from a thread's pixel to its next
  int rows, columns, count;   // that are inside the map; values of a piece

  HW_FUNCTION Pieces(const ConvArguments& p, const Place<TRAITS>& place) {
    const int y = place.row(0), x = place.x + ROW::pixel(place.lane, 0) * TRAITS::WARP_COLUMNS + place.parity;
    const int co = place.co + place.part * 32 + ROW::piece(place.lane) * ROW::VECTOR;
    char* plane = p.out + place.image * p.out_image_bytes + place.z * p.out_plane_bytes + co * sizeof(T);
    row_bytes = p.out_row_bytes;
    step_bytes = ROW::APART * TRAITS::WARP_COLUMNS * p.out_pixel_bytes;
    first = hw::kept(hw::advance(hw::advance(plane, x, p.out_pixel_bytes), y, row_bytes));
    rows = p.height - y;
    count = clamp(p.channels - co, 0, ROW::VECTOR);
    columns = count ? p.width - x : 0;
  }
  HW_FUNCTION bool inside(int m, int k) const { return m < rows && k * ROW::APART * TRAITS::WARP_COLUMNS < columns; }
  HW_FUNCTION char* at(int m, int k) const { return hw::advance(hw::advance(first, m, row_bytes), k, step_bytes); }
};

// Adds what the map holds, by way of two rows of shared memory in turn: one may still be read.
template <typename TRAITS>
HW_FUNCTION void add_map(float (&acc)[TRAITS::M][4][4], const Pieces<TRAITS>& pieces, bool vector, uint32_t memory,
                         int lane) {
  using T = typename TRAITS::T;
  using ROW = WarpRow<T>;
  hw::Vec old[TRAITS::M][ROW::COUNT];
  HW_UNROLL
  for (int i = 0; i < TRAITS::M * ROW::COUNT; ++i) {
    const int m = i / ROW::COUNT, k = i % ROW::COUNT;
    old[m][k] = load_piece<T>(pieces.at(m, k), pieces.inside(m, k) ? pieces.count : 0, vector);
  }
  HW_UNROLL
  for (int m = 0; m < TRAITS::M; ++m) {
    const uint32_t row = memory + m % 2 * ROW::BYTES;
    HW_UNROLL
    for (int k = 0; k < ROW::COUNT; ++k) hw::store_shared(row + ROW::at(lane, k), old[m][k]);
    hw::warp_barrier();
    HW_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int half = k / 4, n = k % 4;
      const hw::Pair pair = load_pair<T>(row + ROW::at_pair(lane, half, n));
      acc[m][n][half * 2] += pair.first, acc[m][n][half * 2 + 1] += pair.second;
    }
  }
}

// Stores the values, through ReLU if RELU, by 16 bytes or one by one, and returns them as stored.
template <typename TRAITS, bool RELU, bool VECTOR>
HW_FUNCTION void store_map(hw::Vec (&stored)[TRAITS::M][WarpRow<typename TRAITS::T>::COUNT],
                           const float (&acc)[TRAITS::M][4][4], const Pieces<TRAITS>& pieces, uint32_t memory, int lane) {
  using T = typename TRAITS::T;
  using ROW = WarpRow<T>;
  HW_UNROLL
  for (int m = 0; m < TRAITS::M; ++m) {
    const uint32_t row = memory + m % 2 * ROW::BYTES;
    HW_UNROLL
    for (int k = 0; k < 8; ++k) {
      const int half = k / 4, n = k % 4;
      store_pair<T, RELU>(row + ROW::at_pair(lane, half, n), acc[m][n][half * 2], acc[m][n][half * 2 + 1]);
    }
    hw::warp_barrier();
    HW_UNROLL
    for (int k = 0; k < ROW::COUNT; ++k) {
      const uint32_t from = row + ROW::at(lane, k);
      stored[m][k] = hw::load_shared<hw::Vec>(from);
      char* to = pieces.at(m, k);
      if constexpr (VECTOR) {
        if (pieces.inside(m, k)) *reinterpret_cast<hw::Vec*>(to) = stored[m][k];
      } else {
        HW_NO_UNROLL
        for (int v = 0; v < (pieces.inside(m, k) ? pieces.count : 0); ++v)
          reinterpret_cast<Bits<T>*>(to)[v] = hw::load_shared<Bits<T>>(from + v * sizeof(T));
      }
    }
  }
}

// Mean of values and sum of their squared deviations from it, put together by Chan, Golub and LeVeque's formula.
struct Moments {
  float mean, squares;

  // count: of the values so far; share: the others' part of all.
  HW_FUNCTION void add(const Moments& other, float count, float share) {
    const float apart = other.mean - mean;
    mean += apart * share;
    squares += other.squares + apart * apart * (count * share);
  }
  HW_FUNCTION static float share(float count, float other) { return other * inverse(count + other); }
  HW_FUNCTION static float inverse(float count) { return hw::reciprocal(count == 0 ? 1.0f : count); }
};

// Count, mean and sum of squared deviations from it over the block's pixels, in a fixed order: over a thread's pixels, over
// the lanes with the same piece, which end with one channel each, over warps in `memory`.
template <typename TRAITS>
HW_FUNCTION void store_statistics(const hw::Vec (&stored)[TRAITS::M][WarpRow<typename TRAITS::T>::COUNT],
                                  const ConvArguments& p, const Place<TRAITS>& place, const Pieces<TRAITS>& pieces,
                                  uint32_t memory) {
  using T = typename TRAITS::T;
  using ROW = WarpRow<T>;
  constexpr int VECTOR = ROW::VECTOR, PIECES = TRAITS::M * ROW::COUNT;
  const auto inside = [&](int i) { return pieces.inside(i / ROW::COUNT, i % ROW::COUNT); };
  Moments moments[VECTOR] = {};
  float values[PIECES][VECTOR], count = 0;
  HW_UNROLL
  for (int i = 0; i < PIECES; ++i) {
    unpack_piece<T>(values[i], stored[i / ROW::COUNT][i % ROW::COUNT]);
    HW_UNROLL
    for (int v = 0; v < VECTOR; ++v) moments[v].mean = inside(i) ? moments[v].mean + values[i][v] : moments[v].mean;
    count = inside(i) ? count + 1 : count;
  }
  const float part = Moments::inverse(count);
  HW_UNROLL
  for (int v = 0; v < VECTOR; ++v) moments[v].mean *= part;
  HW_UNROLL
  for (int i = 0; i < PIECES; ++i) {
    HW_UNROLL
    for (int v = 0; v < VECTOR; ++v) {
      const float apart = values[i][v] - moments[v].mean;
      moments[v].squares = inside(i) ? moments[v].squares + apart * apart : moments[v].squares;
    }
  }
  int channel = ROW::piece(place.lane) * VECTOR;
  HW_UNROLL
  for (int half = VECTOR / 2, mask = ROW::PIXELS::PIECES; half; half /= 2, mask *= 2) {
    const bool upper = place.lane & mask;
    const float other = hw::shuffle_xor(count, mask), share = Moments::share(count, other);
    HW_UNROLL
    for (int v = 0; v < half; ++v) {
      const Moments given = upper ? moments[v] : moments[v + half];
      if (upper) moments[v] = moments[v + half];
      moments[v].add({hw::shuffle_xor(given.mean, mask), hw::shuffle_xor(given.squares, mask)}, count, share);
    }
    count += other;
    channel += upper ? half : 0;
  }
  hw::store_shared(memory + (place.warp * 32 + channel) * 16,
                   hw::Vec{{hw::as_bits(count), hw::as_bits(moments[0].mean), hw::as_bits(moments[0].squares), 0}});
  hw::barrier();
  const int co = place.co + place.part * 32 + place.lane;
  if (place.warp % TRAITS::PIXEL_WARPS || co >= p.channels) return;
  Moments all = {};
  float total = 0;
  HW_UNROLL
  for (int k = 0; k < TRAITS::PIXEL_WARPS; ++k) {
    const hw::Vec found = hw::load_shared<hw::Vec>(memory + (place.warp * 32 + place.lane) * 16 + k * 32 * 16);
    const float other = hw::as_float(found.word[0]);
    all.add({hw::as_float(found.word[1]), hw::as_float(found.word[2])}, total, Moments::share(total, other));
    total += other;
  }
  const int64_t row = int64_t{hw::block_z()} * p.tiles_y + hw::block_y();
  float* to = p.stats + (row * p.tiles_x + place.x / TRAITS::OUT_COLUMNS) * 3 * p.channels + co;
  to[0] = total;
  to[p.channels] = all.mean;
  to[2 * p.channels] = all.squares;
}

template <typename TRAITS>
HW_FUNCTION void finish(float (&acc)[TRAITS::M][4][4], const ConvArguments& p, const Place<TRAITS>& place) {
  using T = typename TRAITS::T;
  using ROW = WarpRow<T>;
  using IF_HALF = std::bool_constant<!Format<T>::TF32>;
  constexpr int ROWS = TRAITS::WARPS * 2 * ROW::BYTES;
  static_assert(ROWS + TRAITS::WARPS * 32 * 16 <= TRAITS::SHARED, "rows of the warps, and their statistics");
  const Pieces<TRAITS> pieces(p, place);
  const uint32_t memory = place.warp * 2 * ROW::BYTES;
  const bool relu = p.act && p.relu && !p.add && !Format<T>::TF32;
  hw::barrier();  // the stages are no longer used
  if (p.act && !relu) {
    HW_UNROLL
    for (int k = 0; k < TRAITS::M * 16; ++k)
      acc[k / 16][k / 4 % 4][k % 4] = activate(acc[k / 16][k / 4 % 4][k % 4], p.slope);
  }
  if (p.add) add_map<TRAITS>(acc, pieces, p.vector_out, memory, place.lane);
  hw::Vec stored[TRAITS::M][ROW::COUNT];
  const auto store = [&](auto through_relu) {
    if (p.vector_out)
      store_map<TRAITS, through_relu, true>(stored, acc, pieces, memory, place.lane);
    else
      store_map<TRAITS, through_relu, false>(stored, acc, pieces, memory, place.lane);
  };
  relu ? store(IF_HALF{}) : store(std::false_type{});
  if (p.stats) store_statistics<TRAITS>(stored, p, place, pieces, ROWS);
}
