// Work spread over the session's own threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <thread>
#include <type_traits>

namespace nmconvert {

// Parts to split work into: two for each core, so that threads that are held up leave little to wait for. What a part costs
// extra (its panel has to come into the cache once more) grows with their number; what is computed does not change with it.
inline int64_t wanted_tasks() {
  static const int64_t wanted = 2 * static_cast<int64_t>(std::thread::hardware_concurrency());
  return wanted > 2 ? wanted : 2;
}

// Calls a function for 0 … count - 1, from any number of threads, and returns when all calls have.
class Parallel {
 public:
  using Body = void (*)(void*, size_t);
  using Loop = void (*)(void* context, Body body, size_t count, void* data);

  Parallel(Loop loop, void* context) : loop_(loop), context_(context) {}

  // Throws std::bad_alloc where a task ran out of memory, the only way in which tasks fail.
  template <typename Task>
  void operator()(int64_t count, Task&& task) const {
    struct Data {
      std::remove_reference_t<Task>* task;
      std::atomic<bool> failed{false};
    } data{&task};
    if (count == 1) return task(0);
    loop_(
        context_,
        [](void* raw, size_t index) {
          Data& shared = *static_cast<Data*>(raw);
          try {
            (*shared.task)(static_cast<int64_t>(index));
          } catch (const std::bad_alloc&) {
            shared.failed = true;
          }
        },
        static_cast<size_t>(count), &data);
    if (data.failed) throw std::bad_alloc();
  }

 private:
  Loop loop_;
  void* context_;
};

}  // namespace nmconvert
