// Working memory that a thread keeps between calls, so that no call pays for fresh pages.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace rlnas {

// At least `count` floats on a 64-byte border, never initialised; each slot is one buffer a thread.
template <int slot>
float* scratch(size_t count) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local size_t size = 0;
  if (size < count) {
    size = 0;
    size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!buffer) throw std::bad_alloc();
    size = bytes / sizeof(float);
  }
  return buffer.get();
}

}  // namespace rlnas
