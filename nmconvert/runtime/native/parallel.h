// Work spread over the session's own threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>
#include <type_traits>

namespace nmconvert {

// Calls a function for 0 … count - 1, from any number of threads, and returns when all calls have. What is computed does not
// change with the number of parts that work is split into.
class Parallel {
 public:
  using Body = void (*)(void*, size_t);
  using Loop = void (*)(void* context, Body body, size_t count, void* data);

  Parallel(Loop loop, void* context, int64_t threads) : loop_(loop), context_(context), threads_(threads) {}

  // The same on this thread alone.
  Parallel alone() const { return Parallel(nullptr, nullptr, 1); }

  // How many threads take part, as far as is known.
  int64_t threads() const { return threads_; }
  // Parts to split work into that costs little to split: some more than threads, because cores are not equally fast where
  // others use their other halves.
  int64_t parts() const { return threads_ > 1 ? 4 * threads_ : 4; }

  // Throws what the first task that failed threw, once all have ended: onnxruntime's threads catch nothing.
  template <typename Task>
  void operator()(int64_t count, Task&& task) const {
    struct Data {
      std::remove_reference_t<Task>* task;
      std::atomic<bool> failed{false};
      std::exception_ptr error{};
    } data{&task};
    if (count == 1 || !loop_) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    loop_(
        context_,
        [](void* raw, size_t index) {
          Data& shared = *static_cast<Data*>(raw);
          try {
            (*shared.task)(static_cast<int64_t>(index));
          } catch (...) {
            if (!shared.failed.exchange(true)) shared.error = std::current_exception();
          }
        },
        static_cast<size_t>(count), &data);
    if (data.error) std::rethrow_exception(data.error);
  }

 private:
  Loop loop_;
  void* context_;
  int64_t threads_;
};

// Whether jobs of one size are done sooner by all threads or by one alone. It is tried, in turns, and again after 64, 256 and then
// every 1,024 runs: how long other cores take to come, and to read what this one wrote, differs by machine and hour more than can be
// estimated, and a session is often made while others run.
class Pace {
 public:
  template <typename Job>
  void run(const Parallel& all, Job&& job) {
    const uint32_t turn = since_tries(turns_.fetch_add(1, std::memory_order_relaxed));
    const bool tries_alone = turn % 2 == 1 && turn < 2 * kTries && taken_[turn - 1] < kLong;
    const Parallel parallel = (turn < 2 * kTries ? tries_alone : alone_.load()) ? all.alone() : all;
    if (turn >= 2 * kTries) return job(parallel);
    const auto begin = std::chrono::steady_clock::now();
    job(parallel);
    taken_[turn] = (std::chrono::steady_clock::now() - begin) / std::chrono::nanoseconds(1);
    if (turn == 2 * kTries - 1) alone_ = tries_alone && median(1) < median(0);
  }

 private:
  static constexpr uint32_t kTries = 5, kFirst = 1 << 6, kLast = 1 << 10;
  static constexpr int64_t kLong = 200000;  // nanoseconds, that others always help with

  // Runs since tries began last.
  static uint32_t since_tries(uint32_t run) {
    if (run >= kLast) return run % kLast;
    uint32_t begin = 0;
    for (uint32_t next = kFirst; next <= run; next *= 4) begin = next;
    return run - begin;
  }

  // Of every second try from `first` on: others may take a core away for a while, and the least of few is luck.
  int64_t median(uint32_t first) const {
    std::array<int64_t, kTries> of;
    for (uint32_t i = 0; i < kTries; ++i) of[i] = taken_[first + 2 * i];
    std::nth_element(of.begin(), of.begin() + kTries / 2, of.end());
    return of[kTries / 2];
  }

  std::atomic<uint32_t> turns_{0};
  std::array<std::atomic<int64_t>, 2 * kTries> taken_{};
  std::atomic<bool> alone_{false};
};

// The threads that a session runs its nodes on, which onnxruntime does not tell: met in the first two runs of a node.
class Team {
 public:
  int64_t size() const { return size_; }

  void meet(const Parallel& all) {
    if (meetings_ >= 2) return;
    ++meetings_;
    const int64_t cores = std::thread::hardware_concurrency();  // 0 where it is not known
    if (cores < 2) return;
    std::atomic<int64_t> present{0};
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    all(cores, [&](int64_t) {
      if (std::chrono::steady_clock::now() >= end) return;
      ++present;
      while (present < cores && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    });
    if (present > size_) size_ = present.load();
  }

  // Calls job(parallel), whose inputs have `size` values. Where no other thread was met, one may still come.
  template <typename Job>
  void run(const Parallel& all, int64_t size, Job&& job) {
    if (all.threads() < 2) return job(all);
    paces_[size % kSizes].run(all, job);
  }

 private:
  static constexpr int64_t kSizes = 7;  // that are told apart

  std::atomic<int64_t> size_{1};
  std::atomic<int> meetings_{0};
  std::array<Pace, kSizes> paces_;
};

// Parts that the rows of every one of `panels` are split into, each of which fills its panel anew: those for which `threads` are
// soonest done, a twentieth of a part counted as what the last one has to be waited for.
inline int64_t row_splits(int64_t panels, int64_t threads, double fill, double rows, int64_t most) {
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; threads > 1 && splits <= most && splits <= 4 * threads; ++splits) {
    const double turns = static_cast<double>((panels * splits + threads - 1) / threads) + 0.05;
    const double cost = turns * (3 * fill + rows / static_cast<double>(splits));  // much of what fills it is the other core's
    if (least == 0 || cost < least) least = cost, best = splits;
  }
  return best;
}

}  // namespace nmconvert
