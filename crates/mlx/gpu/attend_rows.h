// Decode: each row appends one token to its last block (where WRITES; else all rows were appended before) and attends to
// everything before and itself. One thread group for
// each row and key-value head; its warps share the row's blocks, a lane takes a token of a block and then some dimensions.
//
// qkv [rows or more, KV * G + 2 * KV, D]: queries, keys and values, not rotated; keys and values: the pools
// [blocks, KV, 32, D], written in place; rows [rows, 1 + blocks]: position (-1: an unused row), then the block table;
// numbers [HALF + 1 or more]: wavelengths, then the scale of scores, and where there are any what they are capped at and a
// sink for each query head; fence: orders this after the writer before. WINDOW: tokens that are seen, 0 for all.
// out [rows, KV * G * D], after: the next fence.
constexpr int EACH = D / 32;
constexpr int WIDTH = KV * (G + 2) * D;
SHARED float query[G * D];
SHARED float new_key[D];
SHARED float new_value[D];
SHARED float partial[WARPS_MAX * G * D];
SHARED float partial_max[WARPS_MAX * G];
SHARED float partial_sum[WARPS_MAX * G];

const int row = GROUP_Y;
const int head = GROUP_X;
const int local = LOCAL_X;
const int threads = LOCAL_SIZE;
const int warps = threads / 32;
const int warp = local / 32;
const int lane = local % 32;
const int columns = rows_shape[1];
const int position = rows[size_t(row) * columns];
DEVICE T* to = out + (size_t(row) * KV + head) * G * D;
if (position < 0) {
  for (int i = local; i < G * D; i += threads) {
    to[i] = T(0.0f);
  }
  return;
}
const size_t table = size_t(row) * columns + 1;
const int last = position / 32;
const size_t pool_head = size_t(head) * 32 * D;
const size_t pool_block = size_t(KV) * 32 * D;

for (int i = local; i < (G + 1) * D; i += threads) {
  const int g = i / D;
  const int d = i % D;
  // The key is turned as one more query head.
  const bool is_key = g == G;
  const size_t from = size_t(row) * WIDTH + (is_key ? KV * G + head : head * G + g) * D;
  float x = float(qkv[from + d]);
  if (d < 2 * HALF) {
    const float angle = float(position) / numbers[d % HALF];
    const int pair = d < HALF ? d + HALF : d - HALF;
    const float other = float(qkv[from + pair]);
    x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
  }
  const T turned = T(x);
  if (is_key) {
    const T value = qkv[size_t(row) * WIDTH + (KV * (G + 1) + head) * D + d];
    const size_t place = size_t(rows[table + last]) * pool_block + pool_head + size_t(position % 32) * D + d;
    if (WRITES) {
      ((DEVICE T*)keys)[place] = turned;
      ((DEVICE T*)values)[place] = value;
    }
    new_key[d] = float(turned);
    new_value[d] = float(value);
  } else {
    query[i] = float(turned) * numbers[HALF];
  }
}
BARRIER();

float largest[G];
float sum[G];
float total[G][EACH];
for (int g = 0; g < G; g++) {
  largest[g] = MINUS_INFINITY;
  sum[g] = 0.0f;
  for (int e = 0; e < EACH; e++) {
    total[g][e] = 0.0f;
  }
}
const int first = WINDOW > 0 && position >= WINDOW ? position + 1 - WINDOW : 0;
for (int b = first / 32 + warp; b <= last; b += warps) {
  const size_t block = size_t(rows[table + b]) * pool_block + pool_head;
  const int token = b * 32 + lane;
  float score[G];
  for (int g = 0; g < G; g++) {
    score[g] = 0.0f;
  }
  if (token < position) {
    const DEVICE Four<T>* key = (const DEVICE Four<T>*)(keys + block + size_t(lane) * D);
    UNROLL
    for (int d = 0; d < D / 4; d++) {
      const Four<T> x = key[d];
      const float x0 = float(x.x), x1 = float(x.y), x2 = float(x.z), x3 = float(x.w);
      for (int g = 0; g < G; g++) {
        const int at = g * D + 4 * d;
        score[g] += x0 * query[at] + x1 * query[at + 1] + x2 * query[at + 2] + x3 * query[at + 3];
      }
    }
  } else if (token == position) {
    for (int g = 0; g < G; g++) {
      for (int d = 0; d < D; d++) {
        score[g] += new_key[d] * query[g * D + d];
      }
    }
  }
  for (int g = 0; g < G; g++) {
    if (CAPPED) {
      score[g] = capped(score[g], numbers[HALF + 1]);
    }
    score[g] = token <= position && token >= first ? score[g] : MINUS_INFINITY;
    const float higher = warp_max(score[g]);
    const float next = higher > largest[g] ? higher : largest[g];
    const float shrink = EXP(largest[g] - next);
    largest[g] = next;
    score[g] = EXP(score[g] - next);
    sum[g] = sum[g] * shrink + score[g];
    for (int e = 0; e < EACH; e++) {
      total[g][e] *= shrink;
    }
  }
  const int known = b < last ? 32 : position % 32;
  UNROLL
  for (int t = 0; t < known; t++) {
    float x[EACH];
    const size_t from = block + size_t(t) * D + lane * EACH;
    if (EACH % 2 == 0) {
      for (int e = 0; e < EACH; e += 2) {
        const Two<T> two = *(const DEVICE Two<T>*)(values + from + e);
        x[e] = float(two.x);
        x[e + (EACH > 1 ? 1 : 0)] = float(two.y);
      }
    } else {
      for (int e = 0; e < EACH; e++) {
        x[e] = float(values[from + e]);
      }
    }
    for (int g = 0; g < G; g++) {
      const float weight = from_lane(score[g], t);
      for (int e = 0; e < EACH; e++) {
        total[g][e] += weight * x[e];
      }
    }
  }
  if (b == last) {
    for (int g = 0; g < G; g++) {
      const float weight = from_lane(score[g], position % 32);
      for (int e = 0; e < EACH; e++) {
        total[g][e] += weight * new_value[lane * EACH + e];
      }
    }
  }
}
for (int g = 0; g < G; g++) {
  const float all = warp_sum(sum[g]);
  if (lane == 0) {
    partial_max[warp * G + g] = largest[g];
    partial_sum[warp * G + g] = all;
  }
  for (int e = 0; e < EACH; e++) {
    partial[(warp * G + g) * D + lane * EACH + e] = total[g][e];
  }
}
BARRIER();
for (int i = local; i < G * D; i += threads) {
  const int g = i / D;
  float highest = partial_max[g];
  for (int w = 1; w < warps; w++) {
    const float x = partial_max[w * G + g];
    highest = x > highest ? x : highest;
  }
  float weights = 0.0f;
  float result = 0.0f;
  if (SINKS) {
    // A token of this score whose value is nothing.
    const float sink = numbers[HALF + 2 + head * G + g];
    highest = sink > highest ? sink : highest;
    weights = EXP(sink - highest);
  }
  for (int w = 0; w < warps; w++) {
    const float weight = EXP(partial_max[w * G + g] - highest);
    weights += weight * partial_sum[w * G + g];
    result += weight * partial[w * G * D + i];
  }
  to[i] = T(result / weights);
}
