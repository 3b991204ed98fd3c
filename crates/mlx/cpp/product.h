// Products of few or many rows with a weight that is read once, as it lies: out [rows, outputs] = x [rows, width] times the
// transpose of a weight [outputs, width]. A BLAS packs the weight anew at each product, which for few rows takes as long
// as the product itself, and those that distributions have know no AVX-512 on processors younger than they are.
//
// A row's sums are taken in the same order whatever other rows there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

namespace {

// Weight rows of one unit of work: with a width of 2048 as much as half of a core's second cache holds.
constexpr int64_t PRODUCT_UNIT = 48;

// As much of the width as eight rows of x and a tile's weights keep in the first cache.
constexpr int64_t PRODUCT_SPAN = 768;

// `count` of the width: rows of x and weight lie `width` apart, rows of out `outputs`. Sums are added to out or, first, set.
using ProductTile = void (*)(
    const float* x, const float* weight, int64_t width, int64_t count, float* out, int64_t outputs, bool first);

struct ProductTiles {
  int64_t rows_worth; // up to how many rows of x it is faster than OpenBLAS 0.3
  int64_t rows_max; // rows of x at once
  int64_t lanes; // `width` is a multiple of it
  // For each number of rows up to `rows_max`: a tile of `outputs` weight rows, and one of a single weight row.
  struct {
    ProductTile many;
    int64_t outputs;
    ProductTile one;
  } of[8];
};

#if defined(__x86_64__) && defined(__GNUC__)
typedef float Lanes4 __attribute__((vector_size(16), aligned(4)));
typedef float Lanes8 __attribute__((vector_size(32), aligned(4)));
typedef float Lanes16 __attribute__((vector_size(64), aligned(4)));

// Four partial sums of a vector's.
__attribute__((target("avx2,fma"), always_inline)) inline Lanes4 fold_256(Lanes8 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
__attribute__((target("avx512f"), always_inline)) inline Lanes4 fold_512(Lanes16 v) {
  const Lanes8 halves = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
}

// The sums of four of those, each (0 + 2) + (1 + 3).
__attribute__((always_inline)) inline Lanes4 fold_four(Lanes4 a, Lanes4 b, Lanes4 c, Lanes4 d) {
  const Lanes4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Lanes4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// A tile keeps ROWS * OUTPUTS sums, OUTPUTS weights and an x in registers, and asks for the next tile's weights.
#define PRODUCT_TILES(NAME, TARGET, LANES, FOLD)                                                               \
  template <int ROWS, int OUTPUTS>                                                                             \
  __attribute__((target(TARGET))) void NAME(                                                                   \
      const float* x, const float* weight, int64_t width, int64_t count, float* out, int64_t outputs, bool first) { \
    LANES sums[ROWS * OUTPUTS] = {};                                                                           \
    for (int64_t k = 0; k < count; k += sizeof(LANES) / 4) {                                                   \
      LANES weights[OUTPUTS];                                                                                  \
      _Pragma("GCC unroll 8") for (int o = 0; o < OUTPUTS; o++) {                                              \
        weights[o] = *reinterpret_cast<const LANES*>(weight + o * width + k);                                  \
        __builtin_prefetch(weight + (OUTPUTS + o) * width + k);                                                \
      }                                                                                                        \
      _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                                                 \
        LANES xs = *reinterpret_cast<const LANES*>(x + r * width + k);                                         \
        /* Loaded once, not once for each weight. */                                                           \
        asm("" : "+v"(xs));                                                                                    \
        _Pragma("GCC unroll 8") for (int o = 0; o < OUTPUTS; o++) {                                            \
          sums[r * OUTPUTS + o] += weights[o] * xs;                                                            \
        }                                                                                                      \
      }                                                                                                        \
    }                                                                                                          \
    const auto set = [&](int i, float sum) {                                                                   \
      float& to = out[i / OUTPUTS * outputs + i % OUTPUTS];                                                    \
      to = first ? sum : to + sum;                                                                             \
    };                                                                                                         \
    constexpr int FOURS = ROWS * OUTPUTS / 4 * 4;                                                              \
    _Pragma("GCC unroll 8") for (int i = 0; i < FOURS; i += 4) {                                               \
      const Lanes4 four =                                                                                      \
          fold_four(FOLD(sums[i]), FOLD(sums[i + 1]), FOLD(sums[i + 2]), FOLD(sums[i + 3]));                   \
      set(i, four[0]);                                                                                         \
      set(i + 1, four[1]);                                                                                     \
      set(i + 2, four[2]);                                                                                     \
      set(i + 3, four[3]);                                                                                     \
    }                                                                                                          \
    _Pragma("GCC unroll 8") for (int i = FOURS; i < ROWS * OUTPUTS; i++) {                                     \
      const Lanes4 four = FOLD(sums[i]);                                                                       \
      set(i, (four[0] + four[2]) + (four[1] + four[3]));                                                       \
    }                                                                                                          \
  }

PRODUCT_TILES(product_tile_512, "avx512f", Lanes16, fold_512)
PRODUCT_TILES(product_tile_256, "avx2,fma", Lanes8, fold_256)

// Products of this machine; none where it has neither instruction set.
inline const ProductTiles* product_tiles() {
  static const ProductTiles wide = {
      // OpenBLAS has AVX2 only where the processor is younger than it.
      std::numeric_limits<int32_t>::max(), 8, 16,
      {{product_tile_512<1, 8>, 8, product_tile_512<1, 1>},
       {product_tile_512<2, 8>, 8, product_tile_512<2, 1>},
       {product_tile_512<3, 6>, 6, product_tile_512<3, 1>},
       {product_tile_512<4, 6>, 6, product_tile_512<4, 1>},
       {product_tile_512<5, 3>, 3, product_tile_512<5, 1>},
       {product_tile_512<6, 3>, 3, product_tile_512<6, 1>},
       {product_tile_512<7, 3>, 3, product_tile_512<7, 1>},
       {product_tile_512<8, 3>, 3, product_tile_512<8, 1>}}};
  static const ProductTiles narrow = {
      16, 4, 8,
      {{product_tile_256<1, 8>, 8, product_tile_256<1, 1>},
       {product_tile_256<2, 4>, 4, product_tile_256<2, 1>},
       {product_tile_256<3, 3>, 3, product_tile_256<3, 1>},
       {product_tile_256<4, 3>, 3, product_tile_256<4, 1>}}};
  if (__builtin_cpu_supports("avx512f")) {
    return &wide;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &narrow : nullptr;
}
#else
inline const ProductTiles* product_tiles() {
  return nullptr;
}
#endif

inline void product(
    const float* x, const float* weight, float* out, int64_t rows, int64_t outputs, int64_t width) {
  const ProductTiles& tiles = *product_tiles();
  // Where x begins and ends with cache lines it is read twice as fast; it is read once for each tile.
  static thread_local std::vector<float> copy;
  copy.resize(rows * width + 16);
  float* aligned = copy.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 64 != 0) {
    aligned++;
  }
  std::memcpy(aligned, x, rows * width * sizeof(float));
  const int64_t units = (outputs + PRODUCT_UNIT - 1) / PRODUCT_UNIT;
  parallel(units, rows * outputs * width, [&, aligned](int64_t unit) {
    const int64_t last = std::min(outputs, (unit + 1) * PRODUCT_UNIT);
    for (int64_t k = 0; k < width; k += PRODUCT_SPAN) {
      const int64_t count = std::min(PRODUCT_SPAN, width - k);
      for (int64_t row = 0; row < rows; row += tiles.rows_max) {
        const auto& tile = tiles.of[std::min(tiles.rows_max, rows - row) - 1];
        const float* from = aligned + row * width + k;
        float* to = out + row * outputs;
        int64_t at = unit * PRODUCT_UNIT;
        for (; at + tile.outputs <= last; at += tile.outputs) {
          tile.many(from, weight + at * width + k, width, count, to + at, outputs, k == 0);
        }
        for (; at < last; at++) {
          tile.one(from, weight + at * width + k, width, count, to + at, outputs, k == 0);
        }
      }
    }
  });
}

} // namespace
