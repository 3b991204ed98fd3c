// Prefill: a run of tokens is rotated and appended to its blocks; everything up to its end is copied together for the
// attention that follows. One thread for each dimension, position and key-value head.
//
// qkv [tokens, KV * G + 2 * KV, D]: queries, keys and values of all tokens of the step; keys and values: the pools
// [blocks, KV, 32, D], written in place; table [3 + blocks]: start, the run's first token among the step's, how many it
// has, then its blocks; numbers [HALF + 1]: wavelengths first; fence: orders this after the writer before.
// all_keys and all_values [KV, start + count, D], after: the next fence.
const int d = GLOBAL_X;
const int position = GLOBAL_Y;
const int head = GLOBAL_Z;
const int start = table[0];
const int length = start + table[2];
if (d >= D || position >= length || head >= KV) {
  return;
}
const size_t place = (size_t(table[3 + position / 32]) * KV + head) * 32 * D + size_t(position % 32) * D + d;
const size_t to = (size_t(head) * length + position) * D + d;
if (position < start) {
  all_keys[to] = keys[place];
  all_values[to] = values[place];
} else {
  const size_t from = (size_t(table[1] + position - start) * (G + 2) * KV + KV * G + head) * D;
  float x = float(qkv[from + d]);
  if (d < 2 * HALF) {
    const float angle = float(position) / numbers[d % HALF];
    const float other = float(qkv[from + (d < HALF ? d + HALF : d - HALF)]);
    x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
  }
  const T key = T(x);
  const T value = qkv[from + KV * D + d];
  ((DEVICE T*)keys)[place] = key;
  ((DEVICE T*)values)[place] = value;
  all_keys[to] = key;
  all_values[to] = value;
}
