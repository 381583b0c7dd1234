// Non-local attention, compiled once an instruction set.
namespace rlnas::RLNAS_ISA {}
