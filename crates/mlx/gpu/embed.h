// Rows of a table: out [tokens, W] of table [vocabulary, W]. One thread for each number.
const int i = GLOBAL_X;
const int row = GLOBAL_Y;
const int width = table_shape[1];
if (i >= width || row >= tokens_shape[0]) {
  return;
}
out[size_t(row) * width + i] = table[size_t(tokens[row]) * width + i];
