// Prefill of short runs: each token's key, rotated, and its value are written where the run's table says. One thread for
// each dimension, key-value head and token.
//
// qkv [all tokens, KV * G + 2 * KV, D]: queries, keys and values; keys and values: the pools [blocks, KV, 32, D], written
// in place; tiles [tiles, 1 + TILE + blocks]: where the first of TILE tokens of a run is in qkv, their positions (-1: only
// there to fill), then the run's block table; numbers [HALF + 1]: wavelengths first; fence: orders this after the writer before. after: the next fence.
const int d = GLOBAL_X;
const int head = GLOBAL_Y;
const int token = GLOBAL_Z;
if (d >= D || head >= KV || token >= tiles_shape[0] * TILE) {
  return;
}
const size_t tile = size_t(token / TILE) * tiles_shape[1];
const int position = tiles[tile + 1 + token % TILE];
if (position < 0) {
  return;
}
const size_t block = size_t(tiles[tile + 1 + TILE + position / 32]);
const size_t place = (block * KV + head) * 32 * D + size_t(position % 32) * D + d;
const size_t from = (size_t(tiles[tile] + token % TILE) * (G + 2) * KV + KV * G + head) * D;
float x = float(qkv[from + d]);
if (d < 2 * HALF) {
  const float angle = float(position) / numbers[d % HALF];
  const float other = float(qkv[from + (d < HALF ? d + HALF : d - HALF)]);
  x = x * COS(angle) + (d < HALF ? -other : other) * SIN(angle);
}
((DEVICE T*)keys)[place] = T(x);
((DEVICE T*)values)[place] = qkv[from + KV * D + d];
