// Runs the texts of attention's GPU kernels on a CPU, a thread for each lane, and compares them with the definition: what
// can be known of them where there is no GPU. `scripts/test-gpu-texts` builds and runs it.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define DEVICE
#define SHARED static
#define SHARED_POINTER
#define FUNCTION inline
#define UNROLL
#define UNROLL_ALL
#define EXP(x) std::exp(x)
#define COS(x) std::cos(x)
#define SIN(x) std::sin(x)
#define MINUS_INFINITY (-INFINITY)
#define GROUP_X at.group_x
#define GROUP_Y at.group_y
#define LOCAL_X at.local
#define LOCAL_SIZE at.threads
#define BARRIER() group_barrier->arrive_and_wait()
#define WARP_BARRIER() warp_barriers[at.local / 32]->arrive_and_wait()

// Where a thread is.
struct Place {
  int group_x, group_y, local, threads;
};
static thread_local Place at;
static std::unique_ptr<std::barrier<>> group_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static float exchanged[32][32];

// What `read` makes of the 32 numbers of a warp.
template <class Read>
float across_lanes(float x, Read read) {
  float* mine = exchanged[at.local / 32];
  mine[at.local % 32] = x;
  WARP_BARRIER();
  const float result = read(mine);
  WARP_BARRIER();
  return result;
}

inline float warp_sum(float x) {
  return across_lanes(x, [](const float* lanes) {
    float sum = 0.0f;
    for (int i = 0; i < 32; i++) {
      sum += lanes[i];
    }
    return sum;
  });
}

inline float warp_max(float x) {
  return across_lanes(x, [](const float* lanes) { return *std::max_element(lanes, lanes + 32); });
}

inline int warp_min(int x) {
  return x; // used by the sampler only
}

inline float from_lane(float x, int lane) {
  return across_lanes(x, [=](const float* lanes) { return lanes[lane]; });
}

template <class T>
struct Four {
  T x, y, z, w;
};

template <class T>
struct Two {
  T x, y;
};

#include "../group.h"

constexpr int D = 32, G = 2, KV = 2, HALF = 16, TILE = 4, HEADS = KV * G, WIDTH = KV * (G + 2) * D;
constexpr int WARPS = 2, WARPS_MAX = WARPS, BLOCKS = 4, POOL_BLOCKS = 8;
using T = float;

template <int WINDOW, int CAPPED, int SINKS, int WRITES>
void attend_rows(
    const T* qkv, const T* keys, const T* values, const int* rows, const int* rows_shape, const float* numbers, T* out) {
#include "../attend_rows.h"
}

template <int WINDOW, int CAPPED, int SINKS>
void attend_tiles(
    const T* qkv, const T* keys, const T* values, const int* tiles, const int* tiles_shape, const float* numbers, T* out) {
#include "../attend_tiles.h"
}

// One thread group after another.
static void launch(int groups_x, int groups_y, int threads, const std::function<void()>& kernel) {
  for (int y = 0; y < groups_y; y++) {
    for (int x = 0; x < groups_x; x++) {
      group_barrier = std::make_unique<std::barrier<>>(threads);
      warp_barriers.clear();
      for (int warp = 0; warp < threads / 32; warp++) {
        warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
      }
      std::vector<std::thread> lanes;
      for (int lane = 0; lane < threads; lane++) {
        lanes.emplace_back([=, &kernel] {
          at = {x, y, lane, threads};
          kernel();
        });
      }
      for (auto& lane : lanes) {
        lane.join();
      }
    }
  }
}

// The same numbers each time, in [-1, 1).
static std::vector<float> numbers_of(size_t count) {
  static unsigned state = 1;
  std::vector<float> numbers(count);
  for (auto& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
  }
  return numbers;
}

struct Text {
  std::vector<float> keys = numbers_of(POOL_BLOCKS * KV * 32 * D), values = numbers_of(POOL_BLOCKS * KV * 32 * D);
  std::vector<float> numbers = numbers_of(HALF + 2 + HEADS);
  std::vector<int> table = {5, 1, 7, 2};

  Text() {
    // So long that nothing turns: rotation is another matter.
    std::fill_n(numbers.begin(), HALF, 1e9f);
    numbers[HALF] = 0.7f;
    numbers[HALF + 1] = 1.5f;
  }

  size_t place(int token, int head) const {
    return ((size_t(table[token / 32]) * KV + head) * 32 + token % 32) * D;
  }
};

// What the query of `head` at `position` should give; the token there has `key` and `value`, if not those of the pools.
static std::vector<double> expected(
    const Text& text, const float* query, int head, int position, const float* key, const float* value, int window,
    bool capped, bool sinks) {
  std::vector<double> result(D), scores;
  double total = 0.0, largest = -1e30;
  const int first = window > 0 ? std::max(0, position + 1 - window) : 0;
  const auto of = [&](const std::vector<float>& pool, const float* own, int token) {
    return token == position && own ? own : pool.data() + text.place(token, head / G);
  };
  for (int token = first; token <= position; token++) {
    double score = 0.0;
    for (int d = 0; d < D; d++) {
      score += double(query[d]) * of(text.keys, key, token)[d];
    }
    score *= text.numbers[HALF];
    const double cap = text.numbers[HALF + 1];
    scores.push_back(capped ? cap * std::tanh(score / cap) : score);
    largest = std::max(largest, scores.back());
  }
  if (sinks) {
    const double sink = text.numbers[HALF + 2 + head];
    largest = std::max(largest, sink);
    total = std::exp(sink - largest);
  }
  for (int token = first; token <= position; token++) {
    const double weight = std::exp(scores[token - first] - largest);
    total += weight;
    for (int d = 0; d < D; d++) {
      result[d] += weight * of(text.values, value, token)[d];
    }
  }
  for (auto& x : result) {
    x /= total;
  }
  return result;
}

static bool same(const char* kernel, int position, int head, const float* got, const std::vector<double>& wanted) {
  for (int d = 0; d < D; d++) {
    if (!(std::fabs(got[d] - wanted[d]) < 1e-4)) {
      std::printf("%s, position %d, head %d: %g for %g\n", kernel, position, head, got[d], wanted[d]);
      return false;
    }
  }
  return true;
}

// Tokens of one text as rows of their own, over the border of a block: all were appended before.
template <int WINDOW, int CAPPED, int SINKS>
bool check_guesses() {
  Text text;
  const int start = 61, count = 5;
  const auto qkv = numbers_of(count * WIDTH);
  std::vector<int> rows;
  for (int i = 0; i < count; i++) {
    rows.push_back(start + i);
    rows.insert(rows.end(), text.table.begin(), text.table.end());
    for (int head = 0; head < KV; head++) {
      const float* key = qkv.data() + i * WIDTH + (HEADS + head) * D;
      std::copy_n(key, D, text.keys.begin() + text.place(start + i, head));
      std::copy_n(key + KV * D, D, text.values.begin() + text.place(start + i, head));
    }
  }
  // Unused rows.
  rows.resize((count + 1) * (1 + BLOCKS), -1);
  const int shape[] = {count + 1, 1 + BLOCKS};
  std::vector<float> out((count + 1) * HEADS * D);
  const Text before = text;
  launch(KV, count + 1, WARPS * 32, [&] {
    attend_rows<WINDOW, CAPPED, SINKS, 0>(
        qkv.data(), text.keys.data(), text.values.data(), rows.data(), shape, text.numbers.data(), out.data());
  });
  bool good = before.keys == text.keys && before.values == text.values;
  for (int i = 0; i < count; i++) {
    for (int head = 0; head < HEADS; head++) {
      const float* query = qkv.data() + i * WIDTH + head * D;
      const auto wanted = expected(text, query, head, start + i, nullptr, nullptr, WINDOW, CAPPED, SINKS);
      good &= same("attend_rows, appended", start + i, head, out.data() + (i * HEADS + head) * D, wanted);
    }
  }
  return good;
}

template <int WINDOW, int CAPPED, int SINKS>
bool check() {
  bool good = true;
  for (const int position : {0, 31, 70}) {
    Text text;
    const auto qkv = numbers_of(WIDTH);
    std::vector<int> row = {position};
    row.insert(row.end(), text.table.begin(), text.table.end());
    const int shape[] = {1, 1 + BLOCKS};
    std::vector<float> out(HEADS * D);
    const Text before = text;
    launch(KV, 1, WARPS * 32, [&] {
      attend_rows<WINDOW, CAPPED, SINKS, 1>(
          qkv.data(), text.keys.data(), text.values.data(), row.data(), shape, text.numbers.data(), out.data());
    });
    for (int head = 0; head < HEADS; head++) {
      const float* key = qkv.data() + (HEADS + head / G) * D;
      const auto wanted =
          expected(before, qkv.data() + head * D, head, position, key, key + KV * D, WINDOW, CAPPED, SINKS);
      good &= same("attend_rows", position, head, out.data() + head * D, wanted);
    }
  }
  good &= check_guesses<WINDOW, CAPPED, SINKS>();
  // Two tiles over the border of a block; the last place only fills up.
  Text text;
  const int start = 60, count = 7, tiles = 2;
  std::vector<int> table;
  for (int tile = 0; tile < tiles; tile++) {
    table.push_back(tile * TILE);
    for (int i = tile * TILE; i < (tile + 1) * TILE; i++) {
      table.push_back(i < count ? start + i : -1);
    }
    table.insert(table.end(), text.table.begin(), text.table.end());
  }
  const auto qkv = numbers_of(tiles * TILE * WIDTH);
  const int shape[] = {tiles, 1 + TILE + BLOCKS};
  std::vector<float> out(tiles * TILE * HEADS * D);
  launch(KV, tiles, WARPS * 32, [&] {
    attend_tiles<WINDOW, CAPPED, SINKS>(
        qkv.data(), text.keys.data(), text.values.data(), table.data(), shape, text.numbers.data(), out.data());
  });
  for (int i = 0; i < count; i++) {
    for (int head = 0; head < HEADS; head++) {
      const float* query = qkv.data() + i * WIDTH + head * D;
      const auto wanted =
          expected(text, query, head, start + i, nullptr, nullptr, WINDOW, CAPPED, SINKS);
      good &= same("attend_tiles", start + i, head, out.data() + (i * HEADS + head) * D, wanted);
    }
  }
  std::printf("window %d, capped %d, sinks %d: %s\n", WINDOW, CAPPED, SINKS, good ? "same" : "WRONG");
  return good;
}

int main() {
  bool good = check<0, 0, 0>();
  good &= check<37, 0, 0>();
  good &= check<1, 0, 0>();
  good &= check<0, 1, 0>();
  good &= check<0, 0, 1>();
  good &= check<37, 1, 0>();
  good &= check<5, 0, 1>();
  return good ? 0 : 1;
}
