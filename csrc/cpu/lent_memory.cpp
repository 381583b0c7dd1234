// Memory that a forward keeps for its backward, lent again and again.  It is megabytes a call, which the C
// library would hand back to the system and take again, cleared page by page.
#include "cpu/lent_memory.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/tensors.h"

namespace py = pybind11;

namespace rlnas {
namespace {

constexpr int64_t kLentFrom = 1 << 20;  // floats; less is found where the call before left it in the caches
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

class Loan {
 public:
  explicit Loan(size_t floats)
      : floats_(floats), block_(lender().take((floats * sizeof(float) + 4095) / 4096 * 4096)) {}
  ~Loan() { lender().give_back(block_); }
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;

  py::buffer_info buffer() { return {block_.data, sizeof(float), "f", 1, {floats_}, {sizeof(float)}}; }

 private:
  size_t floats_;
  Block block_;
};

}  // namespace

py::object lent(int64_t count) {
  if (count < kLentFrom) return empty_floats(count);
  return floats_in(py::cast(std::make_unique<Loan>(static_cast<size_t>(count))));
}

}  // namespace rlnas

void register_lent_memory(py::module_& module) {
  using rlnas::Loan;
  py::class_<Loan>(module, "Loan", py::buffer_protocol(),
                   "float32 in memory that is lent again once nobody holds this; never cleared.")
      .def_buffer(&Loan::buffer);
  module.def("lent", &rlnas::lent, py::arg("count"), "float32 [count], not cleared, much of it lent again.");
  module.attr("LENT_FROM") = rlnas::kLentFrom;
}
