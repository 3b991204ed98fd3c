// Draws one token for each row of logits, all parameters by row; what it computes is said in sampler.rs.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

// How one row draws. The layout is that of sampler.rs.
struct Draw {
  int32_t late; // a token drawn after the penalties were counted, or -1
  float temperature; // 0: the most probable token
  float top_p, min_p;
  int32_t top_k; // 0: all
  float uniform;
  float repetition, presence, frequency;
};
static_assert(sizeof(Draw) == 9 * 4);

// A token's logit is divided by `factor` if positive, else multiplied, then `offset` is added.
struct Change {
  int32_t token; // -1: none
  float factor, offset;
  int32_t seen; // 1: the repetition penalty is in `factor`; 2: the presence penalty is in `offset`
};
static_assert(sizeof(Change) == 4 * 4);

float penalized(float logit, float factor, float offset) {
  return (logit > 0 ? logit / factor : logit * factor) + offset;
}

void apply_changes(float* logits, int64_t vocabulary, const Draw& draw, const Change* changes, int64_t count) {
  int32_t seen = 0;
  for (int64_t i = 0; i < count; i++) {
    const Change& change = changes[i];
    if (change.token >= 0 && change.token < vocabulary) {
      logits[change.token] = penalized(logits[change.token], change.factor, change.offset);
      seen = change.token == draw.late ? change.seen : seen;
    }
  }
  if (draw.late >= 0 && draw.late < vocabulary) {
    const float factor = (seen & 1) ? 1.0f : draw.repetition;
    const float offset = -draw.frequency - ((seen & 2) ? 0.0f : draw.presence);
    logits[draw.late] = penalized(logits[draw.late], factor, offset);
  }
}

WIDE float largest_of(const float* x, int64_t count) {
  float lanes[LANES];
  std::fill(lanes, lanes + LANES, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int lane = 0; lane < LANES; lane++) {
      lanes[lane] = lanes[lane] > x[i + lane] ? lanes[lane] : x[i + lane];
    }
  }
  for (; i < count; i++) {
    lanes[0] = std::max(lanes[0], x[i]);
  }
  return *std::max_element(lanes, lanes + LANES);
}

// Weights relative to the most probable token, in place; returns their sum.
WIDE float weigh(float* x, int64_t count, float largest, float inverse_temperature) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int lane = 0; lane < LANES; lane++) {
      const float scaled = (x[i + lane] - largest) * inverse_temperature;
      const float weight = scaled < -87.0f ? 0.0f : exponential(scaled);
      x[i + lane] = weight;
      lanes[lane] += weight;
    }
  }
  float sum = 0.0f;
  for (; i < count; i++) {
    const float scaled = (x[i] - largest) * inverse_temperature;
    x[i] = scaled < -87.0f ? 0.0f : exponential(scaled);
    sum += x[i];
  }
  for (int lane = 0; lane < LANES; lane++) {
    sum += lanes[lane];
  }
  return sum;
}

// How many weights are above `bound`, and their sum.
WIDE void above(const float* x, int64_t count, float bound, int64_t& number, float& mass) {
  int32_t numbers[LANES] = {};
  float masses[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int lane = 0; lane < LANES; lane++) {
      const bool in = x[i + lane] > bound;
      numbers[lane] += in;
      masses[lane] += in ? x[i + lane] : 0.0f;
    }
  }
  number = 0;
  mass = 0.0f;
  for (; i < count; i++) {
    number += x[i] > bound;
    mass += x[i] > bound ? x[i] : 0.0f;
  }
  for (int lane = 0; lane < LANES; lane++) {
    number += numbers[lane];
    mass += masses[lane];
  }
}

int32_t draw_token(const float* logits, int64_t vocabulary, const Draw& draw, const Change* changes, int64_t count) {
  static thread_local std::vector<float> row;
  row.assign(logits, logits + vocabulary);
  float* x = row.data();
  apply_changes(x, vocabulary, draw, changes, count);
  const float largest = largest_of(x, vocabulary);
  if (draw.temperature <= 0.0f) {
    return static_cast<int32_t>(std::find(x, x + vocabulary, largest) - x);
  }
  const float total = weigh(x, vocabulary, largest, 1.0f / draw.temperature);
  // The least weight kept. A bound is raised by one float at a time in the search, so the cut is exact.
  float least = std::numeric_limits<float>::min();
  if (draw.min_p > 0.0f) {
    least = std::max(least, draw.min_p);
  }
  const bool truncates = draw.top_k > 0 || draw.top_p < 1.0f;
  if (truncates) {
    // The smallest weight w with fewer than top_k weights above it and less than top_p of the mass above it.
    uint32_t low = 0, high = std::bit_cast<uint32_t>(1.0f);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      int64_t number;
      float mass;
      above(x, vocabulary, std::bit_cast<float>(middle), number, mass);
      const bool keeps = (draw.top_k == 0 || number < draw.top_k) && (draw.top_p >= 1.0f || mass < draw.top_p * total);
      if (keeps) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    least = std::max(least, std::bit_cast<float>(low));
  }
  int64_t number;
  float kept;
  above(x, vocabulary, std::nextafter(least, 0.0f), number, kept);
  const float target = draw.uniform * kept;
  float sum = 0.0f;
  int32_t last = 0;
  for (int64_t i = 0; i < vocabulary; i++) {
    if (x[i] >= least) {
      sum += x[i];
      last = static_cast<int32_t>(i);
      if (sum > target) {
        break;
      }
    }
  }
  return last;
}

} // namespace
