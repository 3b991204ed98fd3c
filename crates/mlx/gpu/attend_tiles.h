// Prefill of short runs: TILE consecutive tokens of a run attend to everything up to themselves; keys and values are in the
// pools already. One thread group for each tile and key-value head; its warps share the run's blocks, a lane takes a token
// of a block and then some dimensions. A block is read once for all queries of the tile.
//
// qkv [all tokens, KV * G + 2 * KV, D]: queries, keys and values, not rotated; keys and values: the pools
// [blocks, KV, 32, D]; tiles [tiles, 1 + TILE + blocks]: where a tile's first token is in qkv, positions of its tokens (-1:
// only there to fill), then their run's block table; numbers [HALF + 1 or more]: wavelengths, then the scale of scores, and where there are
// any what they are capped at and a sink for each query head; fence: orders this after the writer before. WINDOW: tokens
// that are seen, 0 for all.
// out [tiles * TILE, KV * G * D], after: the next fence.
constexpr int Q = TILE * G;
constexpr int EACH = D / 32;
SHARED Four<float> queries[Q * D / 4];
SHARED Four<float> weights[WARPS * Q * 8];
SHARED float partial[WARPS * Q * D];
SHARED float partial_max[WARPS * Q];
SHARED float partial_sum[WARPS * Q];

const int tile = GROUP_Y;
const int head = GROUP_X;
const int local = LOCAL_X;
const int warp = local / 32;
const int lane = local % 32;
const size_t table = size_t(tile) * tiles_shape[1];
DEVICE T* to = out + (size_t(tile) * TILE * KV + head) * G * D;
int position[TILE];
int last = -1;
// The first token that any query sees: positions grow, and those that only fill up come last.
int first = 0;
UNROLL_ALL
for (int t = 0; t < TILE; t++) {
  position[t] = tiles[table + 1 + t];
  last = position[t] > last ? position[t] : last;
}
if (WINDOW > 0 && position[0] >= WINDOW) {
  first = position[0] + 1 - WINDOW;
}
const size_t pool_head = size_t(head) * 32 * D;
const size_t pool_block = size_t(KV) * 32 * D;

for (int i = local; i < Q * D; i += WARPS * 32) {
  const int t = i / (G * D);
  const int d = i % D;
  const int at = tiles[table + 1 + t];
  const size_t from = (size_t(tiles[table] + t) * (G + 2) * KV + head * G + i / D % G) * D;
  float x = at < 0 ? 0.0f : float(qkv[from + d]);
  if (at >= 0 && d < 2 * HALF) {
    const float angle = float(at) / numbers[d % HALF];
    const float other = float(qkv[from + (d < HALF ? d + HALF : d - HALF)]);
    x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
  }
  ((SHARED_POINTER float*)queries)[i] = float(T(x)) * numbers[HALF];
}
BARRIER();

float largest[Q];
float sum[Q];
float total[Q][EACH];
UNROLL_ALL
for (int i = 0; i < Q; i++) {
  largest[i] = MINUS_INFINITY;
  sum[i] = 0.0f;
  UNROLL_ALL
  for (int e = 0; e < EACH; e++) {
    total[i][e] = 0.0f;
  }
}
SHARED_POINTER float* const mine = (SHARED_POINTER float*)weights + warp * Q * 32;
for (int b = first / 32 + warp; b * 32 <= last; b += WARPS) {
  const size_t block = size_t(tiles[table + 1 + TILE + b]) * pool_block + pool_head;
  const int token = b * 32 + lane;
  float score[Q];
  UNROLL_ALL
  for (int i = 0; i < Q; i++) {
    score[i] = 0.0f;
  }
  if (token <= last) {
    const DEVICE Four<T>* key = (const DEVICE Four<T>*)(keys + block + size_t(lane) * D);
    for (int d = 0; d < D / 4; d++) {
      const Four<T> x = key[d];
      const float x0 = float(x.x), x1 = float(x.y), x2 = float(x.z), x3 = float(x.w);
      UNROLL_ALL
      for (int i = 0; i < Q; i++) {
        const Four<float> query = queries[i * (D / 4) + d];
        score[i] += x0 * query.x + x1 * query.y + x2 * query.z + x3 * query.w;
      }
    }
  }
  UNROLL_ALL
  for (int i = 0; i < Q; i++) {
    const int at = position[i / G];
    const bool seen = token <= at && (WINDOW == 0 || token > at - WINDOW);
    const float bent = CAPPED ? capped(score[i], numbers[HALF + 1]) : score[i];
    const float x = seen ? bent : MINUS_INFINITY;
    const float higher = warp_max(x);
    const float next = higher > largest[i] ? higher : largest[i];
    // A warp may begin behind what a query sees: nothing came yet then.
    const float shrink = largest[i] == next ? 1.0f : EXP(largest[i] - next);
    const float weight = x == MINUS_INFINITY ? 0.0f : EXP(x - next);
    largest[i] = next;
    sum[i] = sum[i] * shrink + weight;
    mine[i * 32 + lane] = weight;
    UNROLL_ALL
    for (int e = 0; e < EACH; e++) {
      total[i][e] *= shrink;
    }
  }
  WARP_BARRIER();
  for (int t = 0; t < 32; t += 4) {
    float x[4][EACH];
    UNROLL_ALL
    for (int u = 0; u < 4; u++) {
      const size_t from = block + size_t(t + u) * D + lane * EACH;
      UNROLL_ALL
      for (int e = 0; e < EACH; e++) {
        // What is not written yet may be anything, which times nothing is not nothing.
        x[u][e] = b * 32 + t + u <= last ? float(values[from + e]) : 0.0f;
      }
    }
    UNROLL_ALL
    for (int i = 0; i < Q; i++) {
      const Four<float> weight = weights[(warp * Q + i) * 8 + t / 4];
      UNROLL_ALL
      for (int e = 0; e < EACH; e++) {
        total[i][e] += weight.x * x[0][e] + weight.y * x[1][e] + weight.z * x[2][e] + weight.w * x[3][e];
      }
    }
  }
  WARP_BARRIER();
}
UNROLL_ALL
for (int i = 0; i < Q; i++) {
  const float all = warp_sum(sum[i]);
  if (lane == 0) {
    partial_max[warp * Q + i] = largest[i];
    partial_sum[warp * Q + i] = all;
  }
  UNROLL_ALL
  for (int e = 0; e < EACH; e++) {
    partial[(warp * Q + i) * D + lane * EACH + e] = total[i][e];
  }
}
BARRIER();
for (int i = local; i < Q * D; i += WARPS * 32) {
  const int row = i / D;
  const int t = row / G;
  float highest = partial_max[row];
  for (int w = 1; w < WARPS; w++) {
    const float x = partial_max[w * Q + row];
    highest = x > highest ? x : highest;
  }
  float weight = 0.0f;
  float result = 0.0f;
  if (tiles[table + 1 + t] >= 0) {
    if (SINKS) {
      // A token of this score whose value is nothing.
      const float sink = numbers[HALF + 2 + head * G + row % G];
      highest = sink > highest ? sink : highest;
      weight = EXP(sink - highest);
    }
    for (int w = 0; w < WARPS; w++) {
      const float share = EXP(partial_max[w * Q + row] - highest);
      weight += share * partial_sum[w * Q + row];
      result += share * partial[w * Q * D + i];
    }
    result /= weight;
  }
  to[size_t(t) * KV * G * D + row % G * D + i % D] = T(result);
}
