// A product with few rows on CUDA's matrix units, with what comes before and after it: out [rows, N] = x [rows, K] times the
// transpose of a weight [N, K], which is dense or in 4 bits. One thread group for 16 outputs of all rows; its warps share
// K, a lane takes WORDS times 8 neighbours of it at a time.
//
// Before: x is normalized where `normed`. After: `added` is added where `adds`; where `gated` the weight is gate and up
// [2 N, K] and out is silu(gate) * up. No row sees another: a row of x is a column of the matrix units. What does not cost
// time is no constant, since compiling a kernel takes seconds.
//
// weight [N, K] as T, or [N, K / 8] words of 4-bit numbers with scales and biases [N, groups]; norm [K];
// settings [8]: `normed` (1), `adds` (2), `gated` (4), then the norm's epsilon by its bits, then `each`; added [rows, N]. K is
// a multiple of WORDS * 32, N of 16 (of 8 where gated).
//
// Where GATHERED the weight is a stack of them, [count, N, K], and row r of the product is row r / `each` of x times the
// transpose of weight experts[r]. A thread group has up to 8 rows beside each other that go through the same weight: there
// are as many groups as rows, and those whose row another one has end at once. To know that it looks back no further than
// to the last multiple of 64, where all begin anew.
constexpr int SPAN = WORDS * 32;
SHARED float partial[WARPS_MAX * TILES * 8 * 16];
SHARED float squares[WARPS_MAX * TILES * 8];

const bool normed = settings[0] & 1;
const bool adds = settings[0] & 2;
const bool gated = settings[0] & 4;
const int outputs = gated ? 8 : 16;
const int warps = LOCAL_SIZE / 32;
const int local = LOCAL_X;
const int warp = local / 32;
const int pair = local % 32 / 4;
const int part = local % 4;
const int K = x_shape[1];
const int height = weight_shape[GATHERED ? 1 : 0];
const int N = gated ? height / 2 : height;
const int groups = DENSE ? 1 : scales_shape[GATHERED ? 2 : 1];
const int in_group = K / groups;
int first = 0;
int count = x_shape[0];
int each = 1;
int expert = 0;
if constexpr (GATHERED) {
  first = GROUP_Y;
  each = settings[2];
  expert = int(experts[first]);
  int before = 0;
  while (before < first % 64 && int(experts[first - before - 1]) == expert) {
    before++;
  }
  if (before % 8 != 0) {
    return;
  }
  count = 1;
  const int end = min(first / 64 * 64 + 64, int(experts_shape[0]));
  while (count < 8 && first + count < end && int(experts[first + count]) == expert) {
    count++;
  }
}
// The units take 16 weight rows: a lane has two of them.
const int row_one = expert * height + GROUP_X * outputs + pair;
const int row_two = row_one + (gated ? N : 8);

float sum[TILES][4];
float square[TILES];
for (int tile = 0; tile < TILES; tile++) {
  square[tile] = 0.0f;
  for (int i = 0; i < 4; i++) {
    sum[tile][i] = 0.0f;
  }
}
UNROLL_TWICE
for (int k = warp * SPAN; k < K; k += warps * SPAN) {
  Words<WORDS> one, two;
  float scale_one, scale_two, bias_one, bias_two;
  if constexpr (!DENSE) {
    const size_t word = k / 8 + WORDS * part;
    one = *(const Words<WORDS>*)(weight + size_t(row_one) * (K / 8) + word);
    two = *(const Words<WORDS>*)(weight + size_t(row_two) * (K / 8) + word);
    const int group = (k + 8 * WORDS * part) / in_group;
    const size_t at_one = size_t(row_one) * groups + group;
    const size_t at_two = size_t(row_two) * groups + group;
    scale_one = float(scales[at_one]);
    scale_two = float(scales[at_two]);
    bias_one = float(biases[at_one]);
    bias_two = float(biases[at_two]);
  }
  UNROLL
  for (int i = 0; i < WORDS; i++) {
    // Which eight of K is a matter of order only, the same for weight and x: each takes the loads that suit its weight.
    const int at = k + (DENSE ? 32 * i + 8 * part : 8 * WORDS * part + 8 * i);
    Words<4> a, b;
    if constexpr (DENSE) {
      a = *(const Words<4>*)(weight + size_t(row_one) * K + at);
      b = *(const Words<4>*)(weight + size_t(row_two) * K + at);
    } else {
      for (int j = 0; j < 4; j++) {
        a.of[j] = four_bits<T>(one.of[i], j, scale_one, bias_one);
        b.of[j] = four_bits<T>(two.of[i], j, scale_two, bias_two);
      }
    }
    Words<4> factor;
    if (normed) {
      factor = *(const Words<4>*)(norm + at);
    }
    for (int tile = 0; tile < TILES; tile++) {
      // Rows past the last are its copies, never written.
      const int row = tile * 8 + pair < count ? tile * 8 + pair : count - 1;
      Words<4> c = *(const Words<4>*)(x + size_t((first + row) / each) * K + at);
      if (normed) {
        for (int j = 0; j < 4; j++) {
          const float low = Half<T>::low(c.of[j]);
          const float high = Half<T>::high(c.of[j]);
          square[tile] += low * low + high * high;
          c.of[j] = Half<T>::pack(low * Half<T>::low(factor.of[j]), high * Half<T>::high(factor.of[j]));
        }
      }
      Half<T>::multiply(sum[tile], a.of[0], b.of[0], a.of[1], b.of[1], c.of[0], c.of[1]);
      Half<T>::multiply(sum[tile], a.of[2], b.of[2], a.of[3], b.of[3], c.of[2], c.of[3]);
    }
  }
}
for (int tile = 0; tile < TILES; tile++) {
  SHARED_POINTER float* to = partial + (warp * TILES + tile) * 8 * 16;
  to[2 * part * 16 + pair] = sum[tile][0];
  to[(2 * part + 1) * 16 + pair] = sum[tile][1];
  to[2 * part * 16 + pair + 8] = sum[tile][2];
  to[(2 * part + 1) * 16 + pair + 8] = sum[tile][3];
  if (normed) {
    float all = square[tile];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    if (part == 0) {
      squares[(warp * TILES + tile) * 8 + pair] = all;
    }
  }
}
BARRIER();
for (int i = local; i < TILES * 8 * outputs; i += warps * 32) {
  const int row = i / outputs;
  const int n = i % outputs;
  if (row >= count) {
    return;
  }
  float result = 0.0f;
  float up = 0.0f;
  float length = 0.0f;
  for (int w = 0; w < warps; w++) {
    const float* from = partial + (w * TILES * 8 + row) * 16;
    result += from[n];
    up += gated ? from[n + 8] : 0.0f;
    length += normed ? squares[w * TILES * 8 + row] : 0.0f;
  }
  if (normed) {
    const float shrink = rsqrtf(length / float(K) + AS_FLOAT(settings[1]));
    result *= shrink;
    up *= shrink;
  }
  if (gated) {
    result = result / (1.0f + EXP(-result)) * up;
  }
  const size_t to = size_t(first + row) * N + GROUP_X * outputs + n;
  if (adds) {
    // As a product that is rounded before it is added.
    result = float(T(result)) + float(added[to]);
  }
  out[to] = T(result);
}
