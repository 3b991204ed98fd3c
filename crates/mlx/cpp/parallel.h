// Runs a loop's iterations on a few threads of this process, kept between loops.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// Loops with fewer multiplications than this are not worth waking anybody for: about 20 microseconds.
constexpr int64_t PARALLEL_WORK_MIN = 400'000;
// More threads do not help: a loop's memory is read faster by none.
constexpr unsigned PARALLEL_THREADS_MAX = 8;

// Looks at a condition before a thread sleeps: about 20 microseconds.
constexpr int SPINS = 1000;

class Team {
 public:
  // Never ended: its threads wait, holding nothing, until the process ends.
  static Team& get() {
    static Team* team = new Team();
    return *team;
  }

  // One loop at a time; the calling thread works too.
  void run(int64_t count, const std::function<void(int64_t)>& body) {
    std::lock_guard<std::mutex> turn(turn_);
    body_ = &body;
    count_ = count;
    next_ = 0;
    busy_ = threads_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_++;
    }
    wake_.notify_all();
    work();
    const auto done = [this] { return busy_ == 0; };
    if (!soon(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, done);
    }
  }

  unsigned threads() const {
    return threads_;
  }

 private:
  Team() : threads_(std::min(std::max(std::thread::hardware_concurrency(), 1u), PARALLEL_THREADS_MAX) - 1) {
    for (unsigned i = 0; i < threads_; i++) {
      std::thread([this] { follow(); }).detach();
    }
  }

  void follow() {
    uint64_t seen = 0;
    const auto called = [&] { return round_ != seen; };
    while (true) {
      if (!soon(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
      }
      // The next round begins when all have left this one.
      seen = round_;
      work();
      if (--busy_ == 0) {
        // Who waits has either not looked yet or is asleep.
        { std::lock_guard<std::mutex> lock(mutex_); }
        done_.notify_one();
      }
    }
  }

  // Whether something comes true within the time that putting a thread to sleep and waking it takes.
  template <class Condition>
  static bool soon(const Condition& condition) {
    for (int i = 0; i < SPINS; i++) {
      if (condition()) {
        return true;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    return condition();
  }

  void work() {
    for (int64_t i = next_++; i < count_; i = next_++) {
      (*body_)(i);
    }
  }

  const unsigned threads_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<unsigned> busy_{0};
  std::atomic<uint64_t> round_{0};
};

// `body(0)` to `body(count - 1)`, which must not depend on each other; `work` is what all of them multiply.
template <class Body>
void parallel(int64_t count, int64_t work, const Body& body) {
  if (count < 2 || work < PARALLEL_WORK_MIN || Team::get().threads() == 0) {
    for (int64_t i = 0; i < count; i++) {
      body(i);
    }
  } else {
    Team::get().run(count, body);
  }
}

} // namespace
