// The epilogue of conv.h's kernel: bias, border, activation, addition, the store, and the stored values' statistics.
// Included by conv.h only.
#pragma once

// Transposes 4 x 4 values across four lanes: value i of lane q becomes value q of lane i. Its own inverse.
HW_FUNCTION void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = lane() & 1, high = lane() & 2;
  HW_UNROLL
  for (int k = 0; k < 4; k += 2) {
    const uint32_t got = hw::shuffle_xor(odd ? v[k] : v[k + 1], 1);
    (odd ? v[k] : v[k + 1]) = got;
  }
  HW_UNROLL
  for (int k = 0; k < 2; ++k) {
    const uint32_t got = hw::shuffle_xor(high ? v[k] : v[k + 2], 2);
    (high ? v[k] : v[k + 2]) = got;
  }
}

HW_FUNCTION int border_class(int place, int size) { return place == size - 1 ? 2 : place == 0 ? 0 : 1; }

// A thread's values of one pixel: channels co + 8 n + {0, 1}; four lanes hold all 32 channels.
template <typename T>
struct Values {
  float v[4][2];

  HW_FUNCTION void add_vector(const float* vector, int co, int channels) {
    HW_UNROLL
    for (int n = 0; n < 4; ++n)
      HW_UNROLL
      for (int e = 0; e < 2; ++e)
        if (co + 8 * n + e < channels) v[n][e] += vector[co + 8 * n + e];
  }

  HW_FUNCTION void add(const Values& other) {
    HW_UNROLL
    for (int n = 0; n < 4; ++n)
      HW_UNROLL
      for (int e = 0; e < 2; ++e) v[n][e] += other.v[n][e];
  }

  // As four words of two values each.
  HW_FUNCTION void pack(uint32_t (&words)[4]) const {
    HW_UNROLL
    for (int n = 0; n < 4; ++n) words[n] = hw::pack<T>(v[n][0], v[n][1]);
  }
  HW_FUNCTION void unpack(const uint32_t (&words)[4]) {
    HW_UNROLL
    for (int n = 0; n < 4; ++n) {
      const hw::Pair pair = hw::unpack<T>(words[n]);
      v[n][0] = pair.first, v[n][1] = pair.second;
    }
  }

  // Adds the values stored at `pixel`. Every lane has to call it; `inside`: the lane's pixel exists.
  HW_FUNCTION void add_map(const char* pixel, bool inside, int co, int channels, bool vector) {
    Values old{};
    if constexpr (sizeof(T) == 2) {
      if (vector) {
        const int first = co + 6 * (lane() % 4);  // co is 2 (lane % 4) past the 32 channels' first
        hw::Vec vec{};
        if (inside && first < channels) vec = *reinterpret_cast<const hw::Vec*>(pixel + first * sizeof(T));
        transpose_quad(vec.word);
        old.unpack(vec.word);
      } else if (inside) {
        HW_UNROLL
        for (int n = 0; n < 4; ++n) {
          const int count = clamp(channels - co - 8 * n, 0, 2);
          const hw::Pair pair = hw::unpack<T>(load_values<T>(pixel + (co + 8 * n) * sizeof(T), count).word[0]);
          old.v[n][0] = pair.first, old.v[n][1] = pair.second;
        }
      }
    } else if (inside) {
      old.add_vector(reinterpret_cast<const float*>(pixel), co, channels);
    }
    add(old);
  }

  // Stores the values, and keeps them as rounded by the store.
  HW_FUNCTION void store(char* pixel, bool inside, int co, int channels, bool vector) {
    if constexpr (sizeof(T) == 2) {
      hw::Vec vec;
      pack(vec.word);
      unpack(vec.word);
      if (vector) {
        transpose_quad(vec.word);
        const int first = co + 6 * (lane() % 4);
        if (inside && first < channels) *reinterpret_cast<hw::Vec*>(pixel + first * sizeof(T)) = vec;
        return;
      }
      HW_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int channel = co + 8 * (k / 2) + k % 2;
        const auto value = static_cast<uint16_t>(vec.word[k / 2] >> 16 * (k % 2));
        if (inside && channel < channels) reinterpret_cast<uint16_t*>(pixel)[channel] = value;
      }
    } else {
      HW_UNROLL
      for (int n = 0; n < 4; ++n) {
        float* to = reinterpret_cast<float*>(pixel) + co + 8 * n;
        if (inside && vector && co + 8 * n < channels) {
          *reinterpret_cast<hw::Pair*>(to) = {v[n][0], v[n][1]};
        } else if (inside) {
          if (co + 8 * n < channels) to[0] = v[n][0];
          if (co + 8 * n + 1 < channels) to[1] = v[n][1];
        }
      }
    }
  }
};

// The sums over the block's pixels, in a fixed order: over rows within a thread, over pixels of a row by shuffles, over
// warps in `memory`, [warps, 32].
template <typename TRAITS>
HW_FUNCTION void add_up(float (&sums)[4][2], uint32_t memory, const Place<TRAITS>& place) {
  const int warp = hw::thread() / 32, quad = lane() % 4;
  HW_UNROLL
  for (int k = 0; k < 8; ++k) {
    float& sum = sums[k / 2][k % 2];
    HW_UNROLL
    for (int mask = 4; mask < 32; mask *= 2) sum += hw::shuffle_xor(sum, mask);
    if (lane() < 4) hw::store_shared(memory + (warp * 32 + k / 2 * 8 + quad * 2 + k % 2) * 4, sum);
  }
  hw::barrier();
  HW_UNROLL
  for (int k = 0; k < 8; ++k) {
    float sum = 0;
    for (int pixels = 0; pixels < TRAITS::PIXEL_WARPS; ++pixels) {
      const int from = (place.part * TRAITS::PIXEL_WARPS + pixels) * 32 + k / 2 * 8 + quad * 2 + k % 2;
      sum += hw::load_shared<float>(memory + from * 4);
    }
    sums[k / 2][k % 2] = sum;
  }
}

// Count, mean and sum of squared deviations from that mean, over the block's pixels; acc holds the stored values.
template <typename TRAITS>
HW_FUNCTION void store_statistics(const float (&acc)[TRAITS::M][4][4], const ConvArguments& p, const Place<TRAITS>& place) {
  const int rows = clamp(p.height - place.y, 0, TRAITS::OUT_ROWS);
  const float count = static_cast<float>(rows * clamp(p.width - place.x, 0, TRAITS::OUT_COLUMNS));
  float mean[4][2] = {}, squares[4][2] = {};
  HW_UNROLL
  for (int k = 0; k < TRAITS::M * 16; ++k) {
    const int m = k / 16, n = k / 4 % 4, half = k / 2 % 2, e = k % 2;
    if (place.inside(p, m, half)) mean[n][e] += acc[m][n][half * 2 + e];
  }
  hw::barrier();  // the stages are no longer used
  add_up(mean, 0, place);
  HW_UNROLL
  for (int k = 0; k < 8; ++k) mean[k / 2][k % 2] /= count;
  HW_UNROLL
  for (int k = 0; k < TRAITS::M * 16; ++k) {
    const int m = k / 16, n = k / 4 % 4, half = k / 2 % 2, e = k % 2;
    const float deviation = acc[m][n][half * 2 + e] - mean[n][e];
    if (place.inside(p, m, half)) squares[n][e] += deviation * deviation;
  }
  add_up(squares, TRAITS::WARPS * 32 * sizeof(float), place);
  if (hw::thread() / 32 % TRAITS::PIXEL_WARPS || lane() >= 4) return;
  float* to = p.stats + static_cast<int64_t>(place.tile) * 3 * p.channels;
  HW_UNROLL
  for (int k = 0; k < 8; ++k) {
    const int co = place.co + place.part * 32 + k / 2 * 8 + lane() * 2 + k % 2;
    if (co >= p.channels) continue;
    to[co] = count;
    to[p.channels + co] = mean[k / 2][k % 2];
    to[2 * p.channels + co] = squares[k / 2][k % 2];
  }
}

template <typename TRAITS>
HW_FUNCTION void finish(float (&acc)[TRAITS::M][4][4], const ConvArguments& p, const Place<TRAITS>& place) {
  using T = typename TRAITS::T;
  const int co = place.co + place.part * 32 + lane() % 4 * 2;
  Values<T> bias{};
  if (p.bias) bias.add_vector(p.bias, co, p.channels);
  char* image = p.out + place.image * p.out_image_stride * static_cast<int64_t>(sizeof(T));
  HW_UNROLL
  for (int k = 0; k < TRAITS::M * 2; ++k) {
    const int m = k / 2, half = k % 2, y = place.row(m), x = place.column(half);
    const bool inside = place.inside(p, m, half);
    Values<T> values;
    HW_UNROLL
    for (int n = 0; n < 4; ++n) values.v[n][0] = acc[m][n][half * 2], values.v[n][1] = acc[m][n][half * 2 + 1];
    values.add(bias);
    if (p.border) {
      const int plane = p.deep ? border_class(place.z, p.depth) * 9 : 0;
      const int row = inside ? plane + border_class(y, p.height) * 3 + border_class(x, p.width) : 0;
      values.add_vector(p.border + row * p.channels, co, p.channels);
    }
    if (p.act) {
      HW_UNROLL
      for (int e = 0; e < 8; ++e) values.v[e / 2][e % 2] = activate(values.v[e / 2][e % 2], p.slope);
    }
    const int64_t number = (static_cast<int64_t>(place.z) * p.height + y) * p.width + x;
    char* pixel = image + number * p.out_pixel_stride * static_cast<int64_t>(sizeof(T));
    if (p.add) values.add_map(pixel, inside, co, p.channels, p.vector_out);
    values.store(pixel, inside, co, p.channels, p.vector_out);
    HW_UNROLL
    for (int n = 0; n < 4; ++n) acc[m][n][half * 2] = values.v[n][0], acc[m][n][half * 2 + 1] = values.v[n][1];
  }
  if (p.stats) store_statistics<TRAITS>(acc, p, place);
}
