// Prefill: the queries of a run, rotated. qkv [tokens, KV * G + 2 * KV, D]: queries, keys and values of all tokens of the
// step; table [3 + blocks]: start, the run's first token among the step's, how many it has; numbers [HALF + 1]: wavelengths
// first. turned [KV * G, count, D].
const int d = GLOBAL_X;
const int token = GLOBAL_Y;
const int head = GLOBAL_Z;
const int count = table[2];
if (d >= D || token >= count || head >= KV * G) {
  return;
}
const size_t from = (size_t(table[1] + token) * (G + 2) * KV + head) * D;
float x = float(qkv[from + d]);
if (d < 2 * HALF) {
  const float angle = float(table[0] + token) / numbers[d % HALF];
  const float other = float(qkv[from + (d < HALF ? d + HALF : d - HALF)]);
  x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
}
turned[(size_t(head) * count + token) * D + d] = T(x);
