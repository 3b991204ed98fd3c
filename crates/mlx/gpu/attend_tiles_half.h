// Prefill on CUDA's matrix units: TILE = 16 consecutive tokens of a run attend to everything up to themselves; keys and
// values are in the pools already. One thread group for each tile and key-value head: 16 * G query rows, 16 to a warp, and
// SETS sets of such warps that share the run's blocks (online softmax in registers as in FlashAttention-2,
// arXiv 2307.08691; keys and values are read from the pools without a detour).
//
// qkv [all tokens, KV * G + 2 * KV, D]: queries, keys and values, not rotated; keys and values: the pools
// [blocks, KV, 32, D]; tiles [tiles, 1 + 16 + blocks]: where a tile's first token is in qkv, positions of its tokens (-1:
// only there to fill), then their run's block table; numbers [HALF + 1]: wavelengths, then the scale of scores; fence: orders this after the writer before.
// out [tiles * 16, KV * G * D], after: the next fence. T is a half-precision type, D a multiple of 64.
//
// What a lane holds: of queries, scores and sums the rows `lane / 4` and 8 below. The numbers summed over are permuted
// alike on both sides, so that a lane reads eight neighbours at once.
constexpr int STEPS = D / 16;
constexpr int KEPT = D / 2 + 4;
constexpr int QUERY_WORDS = 16 * G * D / 2;
constexpr int MERGE_WORDS = SETS > 1 ? G * 32 * KEPT : 1;
SHARED Words<4> memory[(QUERY_WORDS > MERGE_WORDS ? QUERY_WORDS : MERGE_WORDS) / 4 + 1];

const int tile = GROUP_Y;
const int head = GROUP_X;
const int local = LOCAL_X;
const int lane = local % 32;
const int set = local / 32 / G;
const int warp = local / 32 % G;
const size_t table = size_t(tile) * tiles_shape[1];
const size_t pool_head = size_t(head) * 32 * D;
const size_t pool_block = size_t(KV) * 32 * D;

// Queries, rotated, in the order of rows.
T* query = (T*)memory;
for (int i = local; i < 16 * G * D; i += SETS * G * 32) {
  const int row = i / D;
  const int d = i % D;
  const int at = tiles[table + 1 + row / G];
  const size_t from = (size_t(tiles[table] + row / G) * (G + 2) * KV + head * G + row % G) * D;
  float x = at < 0 ? 0.0f : float(qkv[from + d]);
  if (at >= 0 && d < 2 * HALF) {
    const float angle = float(at) / numbers[d % HALF];
    const float other = float(qkv[from + (d < HALF ? d + HALF : d - HALF)]);
    x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
  }
  query[i] = T(x);
}
BARRIER();

const int upper = warp * 16 + lane / 4;
const int upper_position = tiles[table + 1 + upper / G];
const int lower_position = tiles[table + 1 + (upper + 8) / G];
int last = -1;
for (int t = warp * 16 / G; t <= (warp * 16 + 15) / G; t++) {
  const int at = tiles[table + 1 + t];
  last = at > last ? at : last;
}
unsigned wanted[STEPS][4];
UNROLL_ALL
for (int c = 0; c < D / 32; c++) {
  const Words<4> above = *(const Words<4>*)(query + upper * D + c * 32 + lane % 4 * 8);
  const Words<4> below = *(const Words<4>*)(query + (upper + 8) * D + c * 32 + lane % 4 * 8);
  UNROLL_ALL
  for (int s = 0; s < 2; s++) {
    wanted[2 * c + s][0] = above.of[2 * s];
    wanted[2 * c + s][1] = below.of[2 * s];
    wanted[2 * c + s][2] = above.of[2 * s + 1];
    wanted[2 * c + s][3] = below.of[2 * s + 1];
  }
}
BARRIER();

const float scale = numbers[HALF];
float total[D / 8][4];
float largest[2] = {MINUS_INFINITY, MINUS_INFINITY};
float sum[2] = {0.0f, 0.0f};
UNROLL_ALL
for (int i = 0; i < D / 8; i++) {
  UNROLL_ALL
  for (int j = 0; j < 4; j++) {
    total[i][j] = 0.0f;
  }
}
for (int b = set; b * 32 <= last; b += SETS) {
  const size_t block = size_t(tiles[table + 1 + TILE + b]) * pool_block + pool_head;
  float score[4][4];
  UNROLL_ALL
  for (int n = 0; n < 4; n++) {
    UNROLL_ALL
    for (int j = 0; j < 4; j++) {
      score[n][j] = 0.0f;
    }
    const T* key = keys + block + (n * 8 + lane / 4) * D + lane % 4 * 8;
    UNROLL_ALL
    for (int c = 0; c < D / 32; c++) {
      const Words<4> x = *(const Words<4>*)(key + c * 32);
      UNROLL_ALL
      for (int s = 0; s < 2; s++) {
        const unsigned* a = wanted[2 * c + s];
        Half<T>::multiply(score[n], a[0], a[1], a[2], a[3], x.of[2 * s], x.of[2 * s + 1]);
      }
    }
  }
  unsigned weight[4][2];
  UNROLL_ALL
  for (int half = 0; half < 2; half++) {
    const int position = half == 0 ? upper_position : lower_position;
    float highest = largest[half];
    UNROLL_ALL
    for (int n = 0; n < 4; n++) {
      UNROLL_ALL
      for (int j = 2 * half; j < 2 * half + 2; j++) {
        const int token = b * 32 + n * 8 + lane % 4 * 2 + j % 2;
        score[n][j] = token <= position ? score[n][j] * scale : MINUS_INFINITY;
        highest = fmaxf(highest, score[n][j]);
      }
    }
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
    // Nothing may have come yet: a row that is only there to fill, or that sees no token of this set's blocks.
    const float shrink = largest[half] == highest ? 1.0f : EXP(largest[half] - highest);
    largest[half] = highest;
    sum[half] *= shrink;
    UNROLL_ALL
    for (int n = 0; n < 4; n++) {
      const float one = score[n][2 * half];
      const float two = score[n][2 * half + 1];
      const float first = one == MINUS_INFINITY ? 0.0f : EXP(one - highest);
      const float second = two == MINUS_INFINITY ? 0.0f : EXP(two - highest);
      sum[half] += first + second;
      weight[n][half] = Half<T>::pack(first, second);
    }
    UNROLL_ALL
    for (int i = 0; i < D / 8; i++) {
      total[i][2 * half] *= shrink;
      total[i][2 * half + 1] *= shrink;
    }
  }
  UNROLL_ALL
  for (int j = 0; j < 2; j++) {
    const int first = j * 16 + lane % 4 * 2;
    UNROLL_ALL
    for (int c = 0; c < D / 64; c++) {
      Words<4> x[4];
      UNROLL_ALL
      for (int u = 0; u < 4; u++) {
        const int token = first + u % 2 + u / 2 * 8;
        x[u] = *(const Words<4>*)(values + block + token * D + c * 64 + lane / 4 * 8);
        UNROLL_ALL
        for (int w = 0; w < 4; w++) {
          // What is not written yet may be anything, which times nothing is not nothing.
          x[u].of[w] = b * 32 + token <= last ? x[u].of[w] : 0u;
        }
      }
      UNROLL_ALL
      for (int i = 0; i < 8; i++) {
        const unsigned order = i % 2 == 0 ? 0x5410u : 0x7632u;
        const unsigned one = __byte_perm(x[0].of[i / 2], x[1].of[i / 2], order);
        const unsigned two = __byte_perm(x[2].of[i / 2], x[3].of[i / 2], order);
        Half<T>::multiply(
            total[c * 8 + i], weight[2 * j][0], weight[2 * j][1], weight[2 * j + 1][0], weight[2 * j + 1][1], one, two);
      }
    }
  }
}
UNROLL_ALL
for (int half = 0; half < 2; half++) {
  sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
  sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
}
float* kept = (float*)memory + warp * 32 * KEPT + lane;
for (int from = 1; from < SETS; from++) {
  BARRIER();
  if (set == from) {
    UNROLL_ALL
    for (int i = 0; i < D / 8; i++) {
      UNROLL_ALL
      for (int j = 0; j < 4; j++) {
        kept[(i * 4 + j) * 32] = total[i][j];
      }
    }
    UNROLL_ALL
    for (int half = 0; half < 2; half++) {
      kept[(D / 2 + half) * 32] = largest[half];
      kept[(D / 2 + 2 + half) * 32] = sum[half];
    }
  }
  BARRIER();
  if (set == 0) {
    UNROLL_ALL
    for (int half = 0; half < 2; half++) {
      const float other = kept[(D / 2 + half) * 32];
      const float highest = fmaxf(largest[half], other);
      const float ours = largest[half] == highest ? 1.0f : EXP(largest[half] - highest);
      const float theirs = other == highest ? 1.0f : EXP(other - highest);
      largest[half] = highest;
      sum[half] = sum[half] * ours + kept[(D / 2 + 2 + half) * 32] * theirs;
      UNROLL_ALL
      for (int i = 0; i < D / 8; i++) {
        UNROLL_ALL
        for (int j = 2 * half; j < 2 * half + 2; j++) {
          total[i][j] = total[i][j] * ours + kept[(i * 4 + j) * 32] * theirs;
        }
      }
    }
  }
}
if (set > 0) {
  return;
}
UNROLL_ALL
for (int half = 0; half < 2; half++) {
  const int row = upper + 8 * half;
  const float inverse = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
  T* to = out + ((size_t(tile) * 16 + row / G) * KV * G + size_t(head) * G + row % G) * D;
  UNROLL_ALL
  for (int c = 0; c < D / 64; c++) {
    UNROLL_ALL
    for (int e = 0; e < 2; e++) {
      Words<4> words;
      UNROLL_ALL
      for (int i = 0; i < 8; i += 2) {
        const float one = total[c * 8 + i][2 * half + e] * inverse;
        const float two = total[c * 8 + i + 1][2 * half + e] * inverse;
        words.of[i / 2] = Half<T>::pack(one, two);
      }
      *(Words<4>*)(to + c * 64 + (lane % 4 * 2 + e) * 8) = words;
    }
  }
}
