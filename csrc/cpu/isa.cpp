#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace rlnas {
namespace {

constexpr Isa kAll[] = {Isa::plain, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

Isa best_isa() {
#ifdef RLNAS_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::plain;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))) return Isa::avx512;
  return Isa::avx512_bf16;
#else
  return Isa::plain;
#endif
}

std::atomic<Isa> active{best_isa()};

}  // namespace

Isa active_isa() { return active.load(std::memory_order_relaxed); }

std::string isa_name(Isa isa) {
  constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (isa <= best_isa()) names.push_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") {
    active = best_isa();
    return;
  }
  std::string usable;
  for (Isa isa : kAll) {
    if (isa > best_isa()) break;
    if (name == isa_name(isa)) {
      active = isa;
      return;
    }
    usable += ", " + isa_name(isa);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not usable here; choose one of: auto" +
                              usable);
}

}  // namespace rlnas
