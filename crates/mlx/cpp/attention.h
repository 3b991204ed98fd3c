// Attention over blocks of KV, which are read where they lie and written in place; f32.
//
// Pools: keys [blocks, kv_heads, dim, BLOCK], values [blocks, kv_heads, BLOCK, dim]; a block holds BLOCK tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 32;

// Unaligned, and never passed to or returned from a function that is not inlined.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

struct Pool {
  float* data;
  int64_t kv_heads, dim;

  // The part of one head in one block.
  float* at(int64_t block, int64_t head) const {
    return data + (block * kv_heads + head) * BLOCK * dim;
  }
};

void write_key(const Pool& pool, int64_t block, int64_t head, int64_t offset, const float* from) {
  float* to = pool.at(block, head) + offset;
  for (int64_t d = 0; d < pool.dim; d++) {
    to[d * BLOCK] = from[d];
  }
}

void write_value(const Pool& pool, int64_t block, int64_t head, int64_t offset, const float* from) {
  std::memcpy(pool.at(block, head) + offset * pool.dim, from, pool.dim * sizeof(float));
}

// Query rows that go through a block together: so many sums fit into registers, and a block is read so many times less.
constexpr int64_t ROWS_AT_ONCE = 4;

// The operation over all lanes, halves against halves.
#define REDUCE(NAME, COMBINED)                                                                            \
  inline __attribute__((always_inline)) float NAME(const Lanes& lanes) {                                  \
    Lanes x = lanes, y;                                                                                   \
    y = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);              \
    x = COMBINED;                                                                                         \
    y = __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);              \
    x = COMBINED;                                                                                         \
    y = __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);              \
    x = COMBINED;                                                                                         \
    y = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);              \
    x = COMBINED;                                                                                         \
    return x[0];                                                                                          \
  }
REDUCE(largest_lane, x > y ? x : y)
REDUCE(sum_of_lanes, x + y)

// What a row's softmax has come to.
struct Softmax {
  float largest, total;
};

// What bounds a row's view and its scores; 0 for none.
struct Bounds {
  // So many tokens are seen, the row's own among them.
  int64_t window = 0;
  // Scores become cap * tanh(score / cap).
  float cap = 0.0f;
};

// out += weights times values over the first `tokens` of a block, for ROWS_AT_ONCE rows and `VECTORS` vectors of each.
template <int VECTORS>
inline __attribute__((always_inline)) void add_values(
    const float* weights, const float* values, float* out, int64_t dim, int64_t tokens) {
  Lanes sums[VECTORS * ROWS_AT_ONCE];
  for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
    for (int i = 0; i < VECTORS; i++) {
      sums[VECTORS * r + i] = *reinterpret_cast<const Lanes*>(out + r * dim + i * LANES);
    }
  }
  for (int64_t t = 0; t < tokens; t++) {
    for (int i = 0; i < VECTORS; i++) {
      const Lanes value = *reinterpret_cast<const Lanes*>(values + t * dim + i * LANES);
      for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        sums[VECTORS * r + i] += weights[r * BLOCK + t] * value;
      }
    }
  }
  for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
    for (int i = 0; i < VECTORS; i++) {
      *reinterpret_cast<Lanes*>(out + r * dim + i * LANES) = sums[VECTORS * r + i];
    }
  }
}

// `count` query rows of one head over its whole context, each seeing the first `seen[row]` tokens, or the last of them
// where there is a window: q and out [count, dim], count a multiple of ROWS_AT_ONCE; `softmax` begins as what no token
// stands for; blocks are taken in order, each by all rows while it is in the first
// cache, with sums that are scaled down whenever a larger score comes (online softmax, Milakov and Gimelshein 2018).
WIDE void attend(
    const float* q_all, const Pool& keys, const Pool& values, int64_t head, const int32_t* table, const int64_t* seen,
    int64_t count, float scale, Bounds bounds, float* out_all, Softmax* softmax) {
  const int64_t dim = keys.dim;
  std::fill(out_all, out_all + count * dim, 0.0f);
  const int64_t longest = *std::max_element(seen, seen + count);
  // The first token that a row sees. Rows that only fill up see none.
  const auto begin = [&](int64_t row) {
    return bounds.window > 0 ? std::max<int64_t>(seen[row] - bounds.window, 0) : 0;
  };
  int64_t earliest = longest;
  for (int64_t row = 0; row < count; row++) {
    earliest = seen[row] > 0 ? std::min(earliest, begin(row)) : earliest;
  }
  for (int64_t b = earliest / BLOCK; b * BLOCK < longest; b++) {
    const float* block = keys.at(table[b], head);
    const float* v = values.at(table[b], head);
    for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
      const int64_t length = *std::max_element(seen + first, seen + first + ROWS_AT_ONCE);
      if (b * BLOCK >= length) {
        continue;
      }
      const float* q = q_all + first * dim;
      float* out = out_all + first * dim;
      Lanes sums[2 * ROWS_AT_ONCE] = {};
      for (int64_t d = 0; d < dim; d++) {
        const Lanes low = *reinterpret_cast<const Lanes*>(block + d * BLOCK);
        const Lanes high = *reinterpret_cast<const Lanes*>(block + d * BLOCK + LANES);
        for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
          sums[2 * r] += q[r * dim + d] * low;
          sums[2 * r + 1] += q[r * dim + d] * high;
        }
      }
      alignas(64) float weights[ROWS_AT_ONCE * BLOCK];
      std::memcpy(weights, sums, sizeof(weights));
      for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        float* w = weights + r * BLOCK;
        Lanes* halves = reinterpret_cast<Lanes*>(w);
        Softmax& row = softmax[first + r];
        const int64_t visible = std::clamp<int64_t>(seen[first + r] - b * BLOCK, 0, BLOCK);
        const int64_t hidden = std::clamp<int64_t>(begin(first + r) - b * BLOCK, 0, BLOCK);
        if (visible <= hidden) {
          std::fill(w, w + BLOCK, 0.0f);
          continue;
        }
        if (bounds.cap > 0.0f) {
          const float into = 2.0f * scale / bounds.cap, back = bounds.cap / scale;
          for (int64_t t = 0; t < BLOCK; t++) {
            w[t] = back * (1.0f - 2.0f / (exponential(into * w[t]) + 1.0f));
          }
        }
        std::fill(w, w + hidden, -std::numeric_limits<float>::infinity());
        std::fill(w + visible, w + BLOCK, -std::numeric_limits<float>::infinity());
        const float highest = std::max(row.largest, largest_lane(halves[0] > halves[1] ? halves[0] : halves[1]));
        const float shrink = highest == row.largest ? 1.0f : exponential((row.largest - highest) * scale);
        row.largest = highest;
        for (int64_t t = 0; t < BLOCK; t++) {
          w[t] = exponential((w[t] - highest) * scale);
        }
        std::fill(w, w + hidden, 0.0f);
        std::fill(w + visible, w + BLOCK, 0.0f);
        row.total = row.total * shrink + sum_of_lanes(halves[0] + halves[1]);
        if (shrink != 1.0f) {
          for (int64_t d = 0; d < dim; d++) {
            out[r * dim + d] *= shrink;
          }
        }
      }
      const int64_t tokens = std::min(length - b * BLOCK, BLOCK);
      int64_t d = 0;
      for (; d + 2 * LANES <= dim; d += 2 * LANES) {
        add_values<2>(weights, v + d, out + d, dim, tokens);
      }
      for (; d + LANES <= dim; d += LANES) {
        add_values<1>(weights, v + d, out + d, dim, tokens);
      }
      for (; d < dim; d++) {
        for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
          for (int64_t t = 0; t < tokens; t++) {
            out[r * dim + d] += weights[r * BLOCK + t] * v[t * dim + d];
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < count; r++) {
    const float inverse = softmax[r].total > 0.0f ? 1.0f / softmax[r].total : 0.0f;
    for (int64_t d = 0; d < dim; d++) {
      out_all[r * dim + d] *= inverse;
    }
  }
}

struct Attention {
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride; // of a token
  Pool keys, values;
  const int32_t* rows; // [rows, columns]: position, then the block table
  int64_t count, columns, heads;
  float scale;
  Bounds bounds;
  const float* sinks; // [heads], or null
  float* out; // [rows, heads * dim]
};

// The query heads of one key-value head of some tokens, brought together, attended, and put where they belong.
// token(i) gives the i-th token's index, and how many positions it sees.
template <class Token>
void attend_tokens(
    const Attention& a, int64_t head, const int32_t* table, int64_t count, const Token& token, float* out) {
  const int64_t dim = a.keys.dim, group = a.heads / a.keys.kv_heads, rows = count * group;
  const int64_t padded = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
  static thread_local std::vector<float> q, attended;
  static thread_local std::vector<int64_t> seen;
  static thread_local std::vector<Softmax> softmax;
  q.assign(padded * dim, 0.0f);
  attended.resize(padded * dim);
  seen.assign(padded, 0);
  softmax.assign(padded, Softmax{-std::numeric_limits<float>::infinity(), 0.0f});
  for (int64_t i = 0; i < count; i++) {
    const auto [index, visible] = token(i);
    std::memcpy(q.data() + i * group * dim, a.q + index * a.q_stride + head * group * dim, group * dim * sizeof(float));
    std::fill_n(seen.data() + i * group, group, visible);
    for (int64_t g = 0; a.sinks && g < group; g++) {
      // As a token of this score whose value is nothing.
      softmax[i * group + g] = {a.sinks[head * group + g] / a.scale, 1.0f};
    }
  }
  attend(q.data(), a.keys, a.values, head, table, seen.data(), padded, a.scale, a.bounds, attended.data(),
         softmax.data());
  for (int64_t i = 0; i < count; i++) {
    const int64_t index = token(i).first;
    std::memcpy(out + (index * a.heads + head * group) * dim, attended.data() + i * group * dim,
                group * dim * sizeof(float));
  }
}

// Appends each row's key and value to its last block and attends to everything before and itself.
void attend_rows(const Attention& a) {
  const int64_t kv_heads = a.keys.kv_heads, dim = a.keys.dim;
  int64_t work = 0;
  for (int64_t row = 0; row < a.count; row++) {
    work += (a.rows[row * a.columns] + 1) * a.heads * dim;
  }
  parallel(a.count * kv_heads, work, [&](int64_t unit) {
    const int64_t row = unit / kv_heads, head = unit % kv_heads;
    const int64_t position = a.rows[row * a.columns];
    const int32_t* table = a.rows + row * a.columns + 1;
    write_key(a.keys, table[position / BLOCK], head, position % BLOCK, a.k + row * a.k_stride + head * dim);
    write_value(a.values, table[position / BLOCK], head, position % BLOCK, a.v + row * a.v_stride + head * dim);
    attend_tokens(a, head, table, 1, [&](int64_t) { return std::pair(row, position + 1); }, a.out);
  });
}

// Tokens of a run that go through the blocks together: their queries and results stay in the first cache.
constexpr int64_t RUN_TOKENS = 16;
// And of a short run, so that there is work for all threads.
constexpr int64_t SHORT_RUN_TOKENS = 4;
// Runs of fewer tokens are short ones.
constexpr int64_t RUN_SHORT = 64;

// Appends a run of tokens and attends, each to everything before and itself: `rows` is [1 + blocks], start and table.
void attend_run(const Attention& a) {
  const int64_t kv_heads = a.keys.kv_heads, dim = a.keys.dim, start = a.rows[0];
  const int32_t* table = a.rows + 1;
  const int64_t work = a.count * (start + a.count) * a.heads * dim;
  parallel(kv_heads, work, [&](int64_t head) {
    for (int64_t token = 0; token < a.count; token++) {
      const int64_t position = start + token, block = table[position / BLOCK];
      write_key(a.keys, block, head, position % BLOCK, a.k + token * a.k_stride + head * dim);
      write_value(a.values, block, head, position % BLOCK, a.v + token * a.v_stride + head * dim);
    }
  });
  if (a.out == nullptr) {
    return;
  }
  const int64_t most = a.count < RUN_SHORT ? SHORT_RUN_TOKENS : RUN_TOKENS;
  const int64_t parts = (a.count + most - 1) / most;
  parallel(kv_heads * parts, work, [&](int64_t unit) {
    // The last parts see most: they begin first.
    const int64_t head = unit % kv_heads, first = (parts - 1 - unit / kv_heads) * most;
    const int64_t count = std::min(most, a.count - first);
    const auto token = [&](int64_t i) { return std::pair(first + i, start + first + i + 1); };
    attend_tokens(a, head, table, count, token, a.out);
  });
}

} // namespace
