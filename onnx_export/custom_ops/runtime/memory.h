// Memory for the time of a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "runtime/status.h"

namespace nsq {

// An array, not initialised, aligned for vectors.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Memory of the product of these counts; what was there before is given back.
  Status allocate(int64_t count, int64_t times = 1) {
    constexpr size_t alignment = 64;  // a cache line, and the widest vector
    std::free(memory_);
    memory_ = nullptr;
    size_t size = 0;
    if (count >= 0 && times >= 0 && !__builtin_mul_overflow(count, times, &size) &&
        !__builtin_mul_overflow(size, sizeof(T), &size) &&
        !__builtin_add_overflow(size, alignment, &size)) {
      memory_ = std::malloc(size);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    data_ = reinterpret_cast<T*>((address + alignment - 1) / alignment * alignment);
    if (memory_ != nullptr) return Status();
    return Status::error("no memory for %lld x %lld elements of %zu bytes", shown(count),
                         shown(times), sizeof(T));
  }
  T* data() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }

 private:
  void* memory_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace nsq
