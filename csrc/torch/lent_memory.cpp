// Memory that a forward keeps for its backward, lent again and again.  It is megabytes a call, which the C
// library would hand back to the system and take again, cleared page by page.
#include "torch/lent_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace rlnas {
namespace {

constexpr size_t kMostIdle = size_t{64} << 20;  // bytes that wait to be lent; what is over goes back at once

struct Block {
  void* data;
  size_t bytes;
};

class Lender {
 public:
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = idle_.size(); i-- > 0;)  // the last one that came back is nearest
        if (idle_[i].bytes == bytes) {
          const Block block = idle_[i];
          idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
          idle_bytes_ -= bytes;
          return block;
        }
    }
    void* const data = std::aligned_alloc(64, bytes);
    if (!data) throw std::bad_alloc();
    return {data, bytes};
  }

  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(block);
    idle_bytes_ += block.bytes;
    size_t gone = 0;
    for (; idle_bytes_ > kMostIdle; gone++) {
      idle_bytes_ -= idle_[gone].bytes;
      std::free(idle_[gone].data);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(gone));
  }

 private:
  std::mutex mutex_;
  std::vector<Block> idle_;  // oldest first
  size_t idle_bytes_ = 0;
};

Lender& lender() {
  static Lender* const one = new Lender;  // outlives tensors that Python drops while it ends
  return *one;
}

}  // namespace

at::Tensor lent(int64_t count) {
  if (count < kLentFrom) return at::detail::empty_cpu({count}, at::kFloat);
  const Block block = lender().take((static_cast<size_t>(count) * sizeof(float) + 4095) / 4096 * 4096);
  return at::from_blob(
      block.data, {count}, [block](void*) { lender().give_back(block); },
      at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
}

}  // namespace rlnas
