// A score held between -cap and cap: cap * tanh(score / cap).
FUNCTION float capped(float score, float cap) {
  return cap * (1.0f - 2.0f / (EXP(2.0f * score / cap) + 1.0f));
}

// Reductions over a thread group of W warps; every thread gets the result, the same whatever the timing.
template <int W>
FUNCTION float group_sum(float x, SHARED_POINTER float* scratch, int local) {
  const float mine = warp_sum(x);
  if (local % 32 == 0) {
    scratch[local / 32] = mine;
  }
  BARRIER();
  float result = 0.0f;
  for (int w = 0; w < W; w++) {
    result += scratch[w];
  }
  BARRIER();
  return result;
}

template <int W>
FUNCTION float group_max(float x, SHARED_POINTER float* scratch, int local) {
  const float mine = warp_max(x);
  if (local % 32 == 0) {
    scratch[local / 32] = mine;
  }
  BARRIER();
  float result = scratch[0];
  for (int w = 1; w < W; w++) {
    result = scratch[w] > result ? scratch[w] : result;
  }
  BARRIER();
  return result;
}

template <int W>
FUNCTION int group_min(int x, SHARED_POINTER int* scratch, int local) {
  const int mine = warp_min(x);
  if (local % 32 == 0) {
    scratch[local / 32] = mine;
  }
  BARRIER();
  int result = scratch[0];
  for (int w = 1; w < W; w++) {
    result = scratch[w] < result ? scratch[w] : result;
  }
  BARRIER();
  return result;
}
