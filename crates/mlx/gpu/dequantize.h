// A 4-bit weight as a dense one, eight numbers a thread. weight [N, K / 8] words, scales and biases [N, groups],
// out [N, K].
const size_t word = size_t(GROUP_X) * 256 + LOCAL_X;
const size_t words = size_t(weight_shape[0]) * weight_shape[1];
if (word >= words) {
  return;
}
const unsigned bits = weight[word];
const size_t group = word / (weight_shape[1] / scales_shape[1]);
const float scale = float(scales[group]);
const float bias = float(biases[group]);
Words<4> eight;
for (int j = 0; j < 4; j++) {
  eight.of[j] = four_bits<T>(bits, j, scale, bias);
}
*(Words<4>*)(out + word * 8) = eight;
