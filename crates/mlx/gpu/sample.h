// Draws one token for each row: penalties, then the most probable token or the one at which the row's uniform number
// falls in its cumulative distribution, cut by top_k, top_p and min_p. One thread group for each row.
//
// logits [rows, V], changed in place; draws [rows, 9], changes [rows, 4 n], late [m]: as sampler.rs lays them out.
// tokens [rows].
constexpr int THREADS = WARPS * 32;
SHARED float scratch[WARPS];
SHARED int scratch_int[WARPS];
SHARED float sums[THREADS];
SHARED int late_seen;

const int row = GROUP_X;
const int local = LOCAL_X;
const int V = logits_shape[1];
DEVICE T* x = (DEVICE T*)logits + size_t(row) * V;
const size_t draw = size_t(row) * 9;
const int late_at = draws[draw];
const float temperature = AS_FLOAT(draws[draw + 1]);
const float top_p = AS_FLOAT(draws[draw + 2]);
const float min_p = AS_FLOAT(draws[draw + 3]);
const int top_k = draws[draw + 4];
const float uniform_number = AS_FLOAT(draws[draw + 5]);
const int count = changes_shape[1] / 4;

if (local == 0) {
  late_seen = 0;
}
BARRIER();
const int late_token = late_at >= 0 ? int(late[late_at]) : -1;
for (int i = local; i < count; i += THREADS) {
  const size_t change = (size_t(row) * count + i) * 4;
  const int token = changes[change];
  if (token >= 0 && token < V) {
    const float logit = float(x[token]);
    const float factor = AS_FLOAT(changes[change + 1]);
    x[token] = T((logit > 0.0f ? logit / factor : logit * factor) + AS_FLOAT(changes[change + 2]));
    if (token == late_token) {
      late_seen = changes[change + 3];
    }
  }
}
BARRIER();
if (local == 0 && late_token >= 0 && late_token < V) {
  const float logit = float(x[late_token]);
  const float factor = (late_seen & 1) ? 1.0f : AS_FLOAT(draws[draw + 6]);
  const float offset = -AS_FLOAT(draws[draw + 8]) - ((late_seen & 2) ? 0.0f : AS_FLOAT(draws[draw + 7]));
  x[late_token] = T((logit > 0.0f ? logit / factor : logit * factor) + offset);
}
BARRIER();

float best = MINUS_INFINITY;
int best_at = 0x7fffffff;
for (int i = local; i < V; i += THREADS) {
  const float value = float(x[i]);
  if (value > best) {
    best = value;
    best_at = i;
  }
}
const float largest = group_max<WARPS>(best, scratch, local);
const int largest_at = group_min<WARPS>(best == largest ? best_at : 0x7fffffff, scratch_int, local);
if (temperature <= 0.0f || largest == MINUS_INFINITY) {
  if (local == 0) {
    tokens[row] = largest_at < V ? largest_at : 0;
  }
  return;
}

const float inverse = 1.0f / temperature;
float mass = 0.0f;
for (int i = local; i < V; i += THREADS) {
  mass += EXP((float(x[i]) - largest) * inverse);
}
const float total_mass = group_sum<WARPS>(mass, scratch, local);
float least = 1.17549435e-38f;
least = min_p > least ? min_p : least;
if (top_k > 0 || top_p < 1.0f) {
  // The smallest weight with fewer than top_k weights above it and less than top_p of the mass above it; weights are
  // relative to the largest, and the bits of positive floats are in their order.
  int low = 0;
  int high = 0x3f800000;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const float bound = AS_FLOAT(middle);
    float number = 0.0f;
    mass = 0.0f;
    for (int i = local; i < V; i += THREADS) {
      const float weight = EXP((float(x[i]) - largest) * inverse);
      number += weight > bound ? 1.0f : 0.0f;
      mass += weight > bound ? weight : 0.0f;
    }
    const float all_number = group_sum<WARPS>(number, scratch, local);
    const float all_mass = group_sum<WARPS>(mass, scratch, local);
    const bool keeps = (top_k <= 0 || all_number < float(top_k)) && (top_p >= 1.0f || all_mass < top_p * total_mass);
    if (keeps) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const float cut = AS_FLOAT(low);
  least = cut > least ? cut : least;
}

// Each thread sums a stretch of the vocabulary; the stretch in which the number falls is then walked.
const int stretch = (V + THREADS - 1) / THREADS;
const int first = local * stretch;
const int past = first + stretch < V ? first + stretch : V;
mass = 0.0f;
for (int i = first; i < past; i++) {
  const float weight = EXP((float(x[i]) - largest) * inverse);
  mass += weight >= least ? weight : 0.0f;
}
sums[local] = mass;
BARRIER();
if (local == 0) {
  float kept = 0.0f;
  for (int i = 0; i < THREADS; i++) {
    kept += sums[i];
  }
  const float target = uniform_number * kept;
  float sum = 0.0f;
  int at = 0;
  int token = largest_at;
  while (at < THREADS && sum + sums[at] <= target) {
    sum += sums[at];
    at++;
  }
  // Rounding may carry the target past the end: the last kept token then.
  bool found = false;
  for (int i = at * stretch; i < V && !found; i++) {
    const float weight = EXP((float(x[i]) - largest) * inverse);
    if (weight >= least) {
      sum += weight;
      token = i;
      found = sum > target;
    }
  }
  tokens[row] = token;
}
