// Prefill: the queries of a run, rotated. q [count, H, D], tokens any stride apart; table [1 + blocks]: start first;
// numbers [HALF + 1]: wavelengths first. turned [H, count, D].
const int d = GLOBAL_X;
const int token = GLOBAL_Y;
const int head = GLOBAL_Z;
const int count = q_shape[0];
if (d >= D || token >= count || head >= H) {
  return;
}
const size_t from = size_t(token) * q_strides[0] + size_t(head) * D;
float x = float(q[from + d]);
if (d < 2 * HALF) {
  const float angle = float(table[0] + token) / numbers[d % HALF];
  const float other = float(q[from + (d < HALF ? d + HALF : d - HALF)]);
  x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
}
turned[(size_t(head) * count + token) * D + d] = T(x);
