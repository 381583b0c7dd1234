// Which instruction set the kernels run with: chosen once from what the CPU has, and forceable.
#pragma once

#include <string>
#include <vector>

namespace rlnas {

// Ordered: each level includes the ones before it.  avx512_bf16 also has VNNI (every CPU with the former has
// both).
enum class Isa { plain, avx2, avx512, avx512_bf16 };

Isa active_isa();
std::string isa_name(Isa isa);
std::vector<std::string> usable_isas();
void set_isa(const std::string& name);  // "auto" or a usable one; throws std::invalid_argument

}  // namespace rlnas

// Declares a kernel for every instruction set: RLNAS_DECLARE(void f(const float* x));
// Calls the active one: RLNAS_DISPATCH(f, x).
#ifdef RLNAS_X86
#define RLNAS_DECLARE(...) \
  namespace plain {        \
  __VA_ARGS__;             \
  }                        \
  namespace avx2 {         \
  __VA_ARGS__;             \
  }                        \
  namespace avx512 {       \
  __VA_ARGS__;             \
  }                        \
  namespace avx512_bf16 {  \
  __VA_ARGS__;             \
  }
#define RLNAS_DISPATCH(function, ...)                                                     \
  [&] {                                                                                   \
    switch (::rlnas::active_isa()) {                                                      \
      case ::rlnas::Isa::avx512_bf16: return ::rlnas::avx512_bf16::function(__VA_ARGS__); \
      case ::rlnas::Isa::avx512: return ::rlnas::avx512::function(__VA_ARGS__);           \
      case ::rlnas::Isa::avx2: return ::rlnas::avx2::function(__VA_ARGS__);               \
      default: return ::rlnas::plain::function(__VA_ARGS__);                              \
    }                                                                                     \
  }()
#else
#define RLNAS_DECLARE(...) \
  namespace plain {        \
  __VA_ARGS__;             \
  }
#define RLNAS_DISPATCH(function, ...) ::rlnas::plain::function(__VA_ARGS__)
#endif
