// y = x (W o M)^T on sm_90a: live tiles arrive by bulk copies, bits are applied on the way to the tensor
// cores.
//
// A block makes y^T for kRows features by kBatch samples.  Warp 8 copies 64 in-features at a time of W and x
// into a ring; two warpgroups multiply.  W is the left operand and passes through registers, where one prmt
// an operand register turns two mask bits into an AND mask: the mask costs no tensor-core time and 1/16 of
// the weight's bytes.
//
// L2 feeds about 40 bytes a cycle and multiprocessor, less than such blocks read, so blocks form clusters of
// `along_batch` x `along_rows`: those with the same rows each copy a part of W to all of them, and where
// every tile of their rows lives, so that all step alike, those with the same samples each copy a part of x
// to all of them.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/masked_matmul.h"

namespace rlnas {
namespace {

constexpr int kStep = 64;  // in-features of a copy: 128 bytes, the swizzle's row
constexpr int kConsumers = 256, kThreads = kConsumers + 32;
constexpr int kRing = 200 * 1024;  // bytes of shared memory at most
constexpr int kRowBytes = kStep * 2;

template <int kRows>
struct Shape {
  static constexpr int kBatch = kRows == 128 ? 128 : 256;
  static constexpr int kWeightBytes = kRows * kRowBytes, kInputBytes = kBatch * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kInputBytes;
  static constexpr int kStages = kRing / kStageBytes;
  static constexpr int kPitch = kRows + 8;  // of the result's tile; the padding avoids bank conflicts
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;
};

// How a block learns what to read.  kTiles: from the lists, tiles being whole.  kBits: from the lists, and
// the bits say what is kept inside.  kScan, for tiles of any size: it looks through the states of its rows
// for columns with a live tile, and masks by state as well as by bits.
enum class Mode { kTiles, kBits, kScan };
constexpr int kMaxSteps = 1024;  // of a scan

struct Bits {
  const uint32_t* words;  // or null: all
  const uint8_t* state;
  int row_words;
};

// The product's two feature axes, in the words of a reader of the weight by rows; the gradient to x reads by
// columns.
struct Axes {
  int outs, ins, tile_outs, tile_ins, in_tiles;
  const int32_t *count, *list, *scatter;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

// At the same barrier of another block of the cluster.
__device__ void barrier_arrive(uint32_t barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra "
      "again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ void copy_box(uint32_t target, const CUtensorMap* map, int column, int row, uint32_t barrier,
                         uint32_t blocks) {
  if (blocks != 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Keeps an operand of wgmma where it is until here: the tensor cores read and write registers behind the
// compiler's back.
template <int kCount>
__device__ void hold(uint32_t (&values)[kCount]) {
#pragma unroll
  for (uint32_t& value : values) asm volatile("" : "+r"(value)::"memory");
}
template <int kCount>
__device__ void hold(float (&values)[kCount]) {
#pragma unroll
  for (float& value : values) asm volatile("" : "+f"(value)::"memory");
}

// The in-features of a row's live tiles, 64 at a time.
struct Walk {
  const int32_t* tile;
  int tile_ins, within = 0;

  __device__ int column() const { return *tile * tile_ins + within; }
  __device__ void advance() {
    within += kStep;
    if (within == tile_ins) {
      within = 0;
      ++tile;
    }
  }
};

// The columns, in units of 64, in which some tile of kRows rows lives; one warp.  Returns how many.
__device__ int scan(int32_t* found, const uint8_t* state, const Axes& axes, int first_row, int rows) {
  const int lane = threadIdx.x % 32;
  const int first_tile = first_row / axes.tile_outs;
  const int last_tile = (min(first_row + rows, axes.outs) - 1) / axes.tile_outs;
  int count = 0;
  for (int base = 0; base * kStep < axes.ins; base += 32) {
    const int column = (base + lane) * kStep;
    int any = 0;
    for (int row = first_tile; row <= last_tile && column < axes.ins; ++row) {
      const uint8_t* line = state + row * static_cast<int64_t>(axes.in_tiles);
      const int last = (min(column + kStep, axes.ins) - 1) / axes.tile_ins;
      for (int tile = column / axes.tile_ins; tile <= last; ++tile) any |= line[tile];
    }
    const uint32_t live = __ballot_sync(~0u, any != 0);
    if (any && found) found[count + __popc(live & ((1u << lane) - 1))] = base + lane;
    count += __popc(live);
  }
  return count;
}

// The bits of a word whose tile lives.
__device__ uint32_t live_bits(const uint8_t* line, int column, int tile_ins) {
  const int tile = column / tile_ins;
  if (tile_ins >= 32) return line[tile] ? ~0u : 0u;
  uint32_t live = 0;
  for (int other = 0; other * tile_ins < 32; ++other) {
    if (line[tile + other]) live |= ((1u << tile_ins) - 1) << (other * tile_ins);
  }
  return live;
}

// A place in the ring, and the parity of its round.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// 64 rows of 16 in-features times 16 in-features of 128 samples.
template <typename T>
__device__ void multiply(float (&d)[64], const uint32_t* a, uint64_t b) {
#define RLNAS_WGMMA(TYPE)                                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                 \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"  \
               "24,%25,%26,%27,%28,"                                                                        \
               "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%"  \
               "51,%52,%53,%54,%55,"                                                                        \
               "%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
                 "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
                 "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
                 "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
                 "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
                 "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
                 "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
                 "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                 "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
                 "+f"(d[63])                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (__is_same(T, __half)) {
    RLNAS_WGMMA("f16");
  } else {
    RLNAS_WGMMA("bf16");
  }
#undef RLNAS_WGMMA
}

// 128-byte swizzle, 1024 bytes from one group of eight samples to the next.
__device__ uint64_t descriptor(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The left operand's registers for one step: 16 out-features a warp, 64 in-features.  Read by columns, the
// tile is 64 in-features by 64 out-features, once or twice, and ldmatrix transposes.
template <bool kTransposed, bool kBits>
__device__ void load_weights(uint32_t (&a)[16], uint32_t tile, int first_out, uint2 bits, uint2 bits_below) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t* const d = a + 4 * k;
    if constexpr (kTransposed) {
      const int row = 16 * k + lane / 16 * 8 + lane % 8, piece = first_out % 64 / 8 + lane / 8 % 2;
      const uint32_t address = tile + (first_out / 64 * kStep + row) * kRowBytes + (piece ^ (row % 8)) * 16;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                   : "r"(address)
                   : "memory");
    } else {
      const int row = first_out + lane % 16;
      const uint32_t address = tile + row * kRowBytes + ((2 * k + lane / 16) ^ (row % 8)) * 16;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                   : "r"(address)
                   : "memory");
    }
  }
  if constexpr (kBits) {
    // Shifted so that this thread's columns 8 m + 2 t and 8 m + 2 t + 1 are the signs of byte m; prmt spreads
    // signs.
    const int t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t upper = half ? bits.y : bits.x, lower = half ? bits_below.y : bits_below.x;
      const uint32_t even = upper << (7 - 2 * t), odd = upper << (6 - 2 * t);
      const uint32_t even_below = lower << (7 - 2 * t), odd_below = lower << (6 - 2 * t);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t selector = (8 + m) * 0x11 + (12 + m) * 0x1100;
        const int at = 4 * (2 * half + m / 2) + 2 * (m % 2);
        a[at] &= permute(even, odd, selector);
        a[at + 1] &= permute(even_below, odd_below, selector);
      }
    }
  }
}

template <typename T>
__device__ uint32_t pack(float low, float high) {
  if constexpr (__is_same(T, __half)) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

#endif

template <typename T, int kRows, bool kTransposed, Mode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    tile_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap input_map,
                ProductPointers p, Bits bits, Axes axes, int batch, int along_batch, int along_rows) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<kRows>;
  constexpr bool kBits = kMode != Mode::kTiles;
  extern __shared__ uint8_t unaligned[];
  uint8_t* const shared =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) & ~uintptr_t{1023});
  __shared__ uint64_t barriers[2 * S::kStages];
  const uint32_t ring = shared_address(shared);
  const uint32_t full = shared_address(barriers), empty = full + 8 * S::kStages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.y * kRows, first_sample = blockIdx.x * S::kBatch;
  const int block_batch = blockIdx.x % along_batch, block_row = blockIdx.y % along_rows;
  const int32_t* tiles;
  int steps = 0, tile_ins = axes.tile_ins;
  bool share_x = along_rows > 1;
  if constexpr (kMode == Mode::kScan) {
    __shared__ int32_t columns[kMaxSteps];
    __shared__ int counts[8];
    if (warp < along_rows) {
      const int row = (blockIdx.y - block_row + warp) * kRows;
      const int count =
          row < axes.outs ? scan(warp == block_row ? columns : nullptr, bits.state, axes, row, kRows) : 0;
      if (lane == 0) counts[warp] = count;
    }
    __syncthreads();
    tiles = columns;
    tile_ins = kStep;
    steps = counts[block_row];
    for (int other = 0; other < along_rows; ++other) share_x = share_x && counts[other] * kStep >= axes.ins;
  } else {
    const int row_tile = first_row / axes.tile_outs;
    tiles = axes.list + static_cast<int64_t>(row_tile) * axes.in_tiles;
    if (first_row < axes.outs) steps = axes.count[2 * row_tile] * (axes.tile_ins / kStep);
    for (int other = 0; other < along_rows && share_x; ++other) {
      const int row = (blockIdx.y - block_row + other) * kRows;
      share_x = row < axes.outs && axes.count[2 * (row / axes.tile_outs)] == axes.in_tiles;
    }
  }
  const int blocks = along_batch * along_rows;
  // Those that share a stage with this block: a barrier counts their warps before the stage is written again.
  const uint32_t same_rows = ((1u << along_batch) - 1) << (block_row * along_batch);
  const uint32_t partners = share_x ? (1u << blocks) - 1 : same_rows;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, __popc(partners) * kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  if (warp == kConsumers / 32) {
    if (lane == 0) {
      uint32_t same_samples = 0;
      for (int other = 0; other < along_rows; ++other)
        same_samples |= 1u << (other * along_batch + block_batch);
      const int part_rows = (kTransposed ? kStep : kRows) / along_batch,
                part_samples = S::kBatch / along_rows;
      Walk walk{tiles, tile_ins};
      Turn<S::kStages> turn;
      for (int step = 0; step < steps; ++step, walk.advance(), turn.advance()) {
        if (step >= S::kStages) barrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
        const int column = walk.column();
        const uint32_t target = ring + turn.stage * S::kStageBytes, inputs = target + S::kWeightBytes;
        const uint32_t barrier = full + 8 * turn.stage;
        barrier_expect(barrier, S::kStageBytes);
        const int first_part = block_batch * part_rows;
        const uint32_t readers = along_batch > 1 ? same_rows : 0;
        if constexpr (kTransposed) {
          for (int half = 0; half < kRows / 64; ++half) {
            copy_box(target + (half * kStep + first_part) * kRowBytes, &weight_map, first_row + half * 64,
                     column + first_part, barrier, readers);
          }
        } else {
          copy_box(target + first_part * kRowBytes, &weight_map, column, first_row + first_part, barrier,
                   readers);
        }
        for (int part = share_x ? block_row : 0; part < (share_x ? block_row + 1 : along_rows); ++part) {
          copy_box(inputs + part * part_samples * kRowBytes, &input_map, column,
                   first_sample + part * part_samples, barrier, share_x ? same_samples : 0);
        }
      }
    }
    __syncwarp();
    cluster_sync();  // no block ends while another may still write to it
    return;
  }

  const int group = warp / 4;
  // With 128 rows the warpgroups share the samples, with 64 they share the rows.
  const int group_row = kRows == 128 ? group * 64 : 0, group_sample = kRows == 128 ? 0 : group * 128;
  const int warp_row = group_row + warp % 4 * 16;
  const int upper_row = min(first_row + warp_row + lane / 4, axes.outs - 1);
  const int lower_row = min(upper_row + 8, axes.outs - 1);
  Walk walk{tiles, tile_ins};
  const uint32_t* const upper_words = bits.words + upper_row * static_cast<int64_t>(bits.row_words);
  const uint32_t* const lower_words = bits.words + lower_row * static_cast<int64_t>(bits.row_words);
  const uint8_t* const upper_state =
      bits.state + upper_row / axes.tile_outs * static_cast<int64_t>(axes.in_tiles);
  const uint8_t* const lower_state =
      bits.state + lower_row / axes.tile_outs * static_cast<int64_t>(axes.in_tiles);
  auto read_bits = [&](int step, uint2& upper, uint2& lower) {
    upper = lower = make_uint2(0, 0);
    if (step >= steps) return;
    const int column = walk.column();
    walk.advance();
    if (column >= axes.ins) return;
    if (kMode == Mode::kBits || bits.words) {
      upper = *reinterpret_cast<const uint2*>(upper_words + column / 32);
      lower = *reinterpret_cast<const uint2*>(lower_words + column / 32);
    } else {
      upper = lower = make_uint2(~0u, ~0u);
    }
    if constexpr (kMode == Mode::kScan) {
      upper.x &= live_bits(upper_state, column, axes.tile_ins);
      upper.y &= live_bits(upper_state, column + 32, axes.tile_ins);
      lower.x &= live_bits(lower_state, column, axes.tile_ins);
      lower.y &= live_bits(lower_state, column + 32, axes.tile_ins);
    }
  };

  float d[64];
#pragma unroll
  for (float& value : d) value = 0.0f;
  uint32_t a[16] = {}, next[16] = {};
  uint2 upper{}, lower{}, next_upper{}, next_lower{};
  if constexpr (kBits) {
    read_bits(0, upper, lower);
    read_bits(1, next_upper, next_lower);
  }
  if (steps > 0) {
    barrier_wait(full, 0);
    load_weights<kTransposed, kBits>(a, ring, warp_row, upper, lower);
  }
  Turn<S::kStages> turn;
  for (int step = 0; step < steps; ++step) {
    const int stage = turn.stage;
    const uint64_t right =
        descriptor(ring + stage * S::kStageBytes + S::kWeightBytes + group_sample * kRowBytes);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply<T>(d, a + 4 * k, right + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    turn.advance();
    if (step + 1 < steps) {
      upper = next_upper;
      lower = next_lower;
      if constexpr (kBits) read_bits(step + 2, next_upper, next_lower);
      barrier_wait(full + 8 * turn.stage, turn.parity);
      load_weights<kTransposed, kBits>(next, ring + turn.stage * S::kStageBytes, warp_row, upper, lower);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(a);
    hold(d);
    if (partners >> lane & 1) barrier_arrive(empty + 8 * stage, lane);
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i] = next[i];
  }

  // The ring is free once both warpgroups are here: it takes the result, [sample][feature].
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
  T* const result = reinterpret_cast<T*>(shared);
  if (p.bias) {
    const int up = axes.scatter ? axes.scatter[upper_row] : upper_row;
    const int low = axes.scatter ? axes.scatter[lower_row] : lower_row;
    const float add_up = static_cast<float>(static_cast<const T*>(p.bias)[up]);
    const float add_low = static_cast<float>(static_cast<const T*>(p.bias)[low]);
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      d[i] += add_up;
      d[i + 1] += add_up;
      d[i + 2] += add_low;
      d[i + 3] += add_low;
    }
  }
#pragma unroll
  for (int block = 0; block < 16; block += 2) {
    const int sample = group_sample + 8 * (block + lane / 16) + lane % 8;
    const uint32_t target = shared_address(result + sample * S::kPitch + warp_row + lane / 8 % 2 * 8);
    const float* v = d + 4 * block;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target),
                 "r"(pack<T>(v[0], v[1])), "r"(pack<T>(v[2], v[3])), "r"(pack<T>(v[4], v[5])),
                 "r"(pack<T>(v[6], v[7]))
                 : "memory");
  }
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
  T* const y = static_cast<T*>(p.y);
  if (axes.outs % 8 == 0 && axes.scatter == nullptr) {
    constexpr int kPieces = kRows / 8;
    for (int item = threadIdx.x; item < S::kBatch * kPieces; item += kConsumers) {
      const int sample = item / kPieces, feature = item % kPieces * 8;
      if (first_sample + sample >= batch || first_row + feature >= axes.outs) continue;
      *reinterpret_cast<uint4*>(y + (first_sample + sample) * static_cast<int64_t>(axes.outs) + first_row +
                                feature) =
          *reinterpret_cast<const uint4*>(result + sample * S::kPitch + feature);
    }
  } else {
    for (int item = threadIdx.x; item < S::kBatch * kRows; item += kConsumers) {
      const int sample = item / kRows, row = first_row + item % kRows;
      if (first_sample + sample >= batch || row >= axes.outs) continue;
      const int feature = axes.scatter ? axes.scatter[row] : row;
      y[(first_sample + sample) * static_cast<int64_t>(axes.outs) + feature] =
          result[sample * S::kPitch + item % kRows];
    }
  }
  cluster_sync();
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// Found at run time, so that the module needs no driver to be imported.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                              cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("masked_matmul: the driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<Encode>(function);
}

CUtensorMap matrix_map(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                       Element element) {
  static const Encode encode = find_encode();
  CUtensorMap map;
  const cuuint64_t extent[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kStep, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
  const auto type =
      element == Element::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status = encode(&map, type, 2, const_cast<void*>(data), extent, pitch, box, every,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("masked_matmul: tensor map refused, code " + std::to_string(status));
  return map;
}

template <typename T, int kRows, bool kTransposed, Mode kMode>
void launch(const ProductPointers& p, const MaskPointers& mask, const MaskSizes& sizes, int batch,
            int64_t x_stride, Element element, Cluster cluster, cudaStream_t stream) {
  using S = Shape<kRows>;
  const Axes axes = kTransposed
                        ? Axes{sizes.columns,   sizes.rows,        sizes.tile_columns, sizes.tile_rows,
                               sizes.row_tiles, mask.column_count, mask.column_list,   mask.input_permutation}
                        : Axes{sizes.rows,         sizes.columns,  sizes.tile_rows, sizes.tile_columns,
                               sizes.column_tiles, mask.row_count, mask.row_list,   mask.output_permutation};
  const int blocks_x = (batch + S::kBatch - 1) / S::kBatch, blocks_y = (axes.outs + kRows - 1) / kRows;
  if (cluster.along_batch == 0)
    cluster = {blocks_x >= 4 ? 4 : blocks_x >= 2 ? 2 : 1, kMode == Mode::kTiles ? 1 : 2};
  const int width = cluster.along_batch, height = cluster.along_rows;
  const CUtensorMap weight = matrix_map(p.weight, sizes.rows, sizes.columns, sizes.columns,
                                        (kTransposed ? kStep : kRows) / width, element);
  const CUtensorMap input = matrix_map(p.x, batch, axes.ins, x_stride, S::kBatch / height, element);
  const auto kernel = tile_kernel<T, kRows, kTransposed, kMode>;
  static const cudaError_t room =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  cudaError_t status = room;
  if (status == cudaSuccess) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(width), static_cast<unsigned>(height), 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((blocks_x + width - 1) / width * width, (blocks_y + height - 1) / height * height);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = S::kSharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const Bits bits{mask.bits, mask.state, sizes.words};
    status = cudaLaunchKernelEx(&config, kernel, weight, input, p, bits, axes, batch, width, height);
  }
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("masked_matmul: ") + cudaGetErrorString(status));
}

template <typename T>
void choose(const ProductPointers& p, const MaskPointers& mask, const MaskSizes& sizes, int batch,
            int64_t x_stride, Element element, bool transposed, Cluster cluster, cudaStream_t stream) {
  const bool wide = (transposed ? sizes.tile_columns : sizes.tile_rows) % 128 == 0;
  auto chosen = launch<T, 128, false, Mode::kScan>;
  if (sizes.tile_rows % 64 == 0 && sizes.tile_columns % 64 == 0) {
    const auto by_rows =
        wide ? (mask.bits ? launch<T, 128, false, Mode::kBits> : launch<T, 128, false, Mode::kTiles>)
             : (mask.bits ? launch<T, 64, false, Mode::kBits> : launch<T, 64, false, Mode::kTiles>);
    const auto by_columns = wide ? launch<T, 128, true, Mode::kTiles> : launch<T, 64, true, Mode::kTiles>;
    chosen = transposed ? by_columns : by_rows;
  }
  chosen(p, mask, sizes, batch, x_stride, element, cluster, stream);
}

}  // namespace

void hopper_tiles(const ProductPointers& pointers, const MaskPointers& mask, const MaskSizes& sizes,
                  int batch, int64_t x_stride, Element element, bool transposed, Cluster cluster,
                  cudaStream_t stream) {
  const auto chosen = element == Element::kFloat16 ? choose<__half> : choose<__nv_bfloat16>;
  chosen(pointers, mask, sizes, batch, x_stride, element, transposed, cluster, stream);
}

}  // namespace rlnas
