// silu(gate) * up of x [rows, 2 * WIDTH] that holds gate and up side by side. out [rows, WIDTH].
const int i = GLOBAL_X;
const int row = GLOBAL_Y;
if (i >= WIDTH || row >= x_shape[0]) {
  return;
}
const float gate = float(x[size_t(row) * 2 * WIDTH + i]);
const float up = float(x[size_t(row) * 2 * WIDTH + WIDTH + i]);
out[size_t(row) * WIDTH + i] = T(gate / (1.0f + EXP(-gate)) * up);
