#include <cudaTypedefs.h>

#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"
#include "ops/hopper.cuh"

// Products of consecutive rows with the matrix of their expert, bf16 with fp32 accumulation. Persistent clusters of
// two CTAs; in each a producer thread that loads by TMA, two warpgroups that multiply, a ring of stages between them.
// The CTAs of a cluster compute neighbouring tiles in M and load one half of B each for both. Tiles are 128 x 256.

namespace pith::cuda {
namespace {

constexpr int kM = 128, kN = 256, kK = 64;  // of a tile, and of a stage
constexpr int kBoxBytes = 8192;             // 64 rows of 128 bytes
constexpr int kMaxSegments = 8, kMaxExperts = 512;
constexpr int kConsumerWarps = 8;

// With rows as M: one segment; a is x, b is w. With rows as K (the weight gradient): a is dy, b is x, and the sum
// runs over all segments.
struct Segment {
  CUtensorMap a, b;
  const int* offsets;
};
struct Problem {
  Segment segment[kMaxSegments];
  CUtensorMap out;
  Bf16* out_rows;                  // rows as M: the result
  int segments, experts, m, n, k;  // m is not used with rows as M, k not with rows as K
};

enum class Kind { forward, input_gradient, weight_gradient };

template <Kind kKind, class Out, bool kAdd> struct Gemm {
  static constexpr bool kRowsAreK = kKind == Kind::weight_gradient;
  static constexpr bool kTransA = kRowsAreK, kTransB = kKind != Kind::forward;
  static constexpr int kStages = 4, kBoxes = 2;  // 227 KB of shared memory
  static constexpr int kStageBytes = (kM + kN) * kK * 2;

  struct Shared {
    Bf16 a[kStages][kM * kK], b[kStages][kN * kK];
    uint8_t out[2][kBoxes][kBoxBytes];
    uint64_t full[kStages], empty[kStages];
    int tile_begin[kRowsAreK ? 1 : kMaxExperts + 1];  // rows as M: first tile of each expert
  };

  // What this CTA computes: rows [row, row_end) at most kM of them, columns from n. Without an expert: nothing, but
  // the cluster's barriers count on it.
  struct Tile {
    int expert, row, row_end, n;
    bool shares_b;
  };

  const Problem& p;
  Shared& s;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32,
            rank = int(ptx::get_sreg_cluster_ctarank());
  int n_blocks = 0, m_pairs = 0, units = 0;
  int stage = 0, expert = 0;
  uint32_t parity = 0;

  __device__ void begin() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_init(&s.full[i], 1);
        // Every one, so that none falls a phase behind.
        ptx::mbarrier_init(&s.empty[i], 2 * kConsumerWarps);
      }
      ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    if (!kRowsAreK && warp == 1) count_tiles();
    cluster_sync();
    n_blocks = (p.n + kN - 1) / kN;
    m_pairs = kRowsAreK ? (p.m + 2 * kM - 1) / (2 * kM) : (s.tile_begin[p.experts] + 1) / 2;
    units = (kRowsAreK ? p.experts : 1) * m_pairs * n_blocks;
  }

  // tile_begin, by one warp.
  __device__ void count_tiles() {
    const int* offsets = p.segment[0].offsets;
    int before = 0;
    for (int base = 0; base < p.experts; base += 32) {
      const int e = base + lane;
      const int tiles = e < p.experts ? (offsets[e + 1] - offsets[e] + kM - 1) / kM : 0;
      int sum = tiles;
      for (int d = 1; d < 32; d *= 2) {
        const int left = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += left;
      }
      if (e < p.experts) s.tile_begin[e] = before + sum - tiles;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) s.tile_begin[p.experts] = before;
  }

  // -1 behind the last; `from` is not behind it.
  __device__ int expert_of(int tile, int from) const {
    if (tile >= s.tile_begin[p.experts]) return -1;
    while (s.tile_begin[from + 1] <= tile) ++from;
    return from;
  }

  // Columns fastest: clusters that run at the same time share rows and weights in L2.
  __device__ Tile tile_of(int unit) {
    const int n = unit % n_blocks * kN, pair = unit / n_blocks;
    if constexpr (kRowsAreK)
      return {pair / m_pairs, (pair % m_pairs * 2 + rank) * kM, p.m, n, true};
    const int first = expert_of(2 * pair, expert);  // pairs never fall
    if (first >= 0) expert = first;
    const int second = expert_of(2 * pair + 1, expert), tile = 2 * pair + rank,
              e = rank ? second : first;
    if (e < 0) return {-1, 0, 0, n, false};
    const int* offsets = p.segment[0].offsets;
    return {e, offsets[e] + (tile - s.tile_begin[e]) * kM, offsets[e + 1], n, first == second};
  }

  __device__ void next_stage() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }

  __device__ void load(const Tile& t, const Segment& g, int k) {
    uint64_t* full = &s.full[stage];
    barrier_wait(&s.empty[stage], parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full,
                                   t.expert < 0 ? 0 : kStageBytes);
    if (t.expert >= 0) {
      if constexpr (kTransA)
        for (int i = 0; i < kM / 64; ++i)
          load_box(s.a[stage] + i * 64 * kK, g.a, full, t.row + i * 64, k, 0);
      else
        load_box(s.a[stage], g.a, full, k, t.row, 0);
      // B in boxes of 64 columns or of 128 rows; a CTA that shares loads half of them, for both.
      constexpr int kWidth = kTransB ? 64 : 128, kCount = kN / kWidth;
      const int z = kRowsAreK ? 0 : t.expert;
      for (int i = t.shares_b ? rank * kCount / 2 : 0; i < kCount; ++i) {
        Bf16* to = s.b[stage] + i * kWidth * kK;
        const int x = kTransB ? t.n + i * kWidth : k, y = kTransB ? k : t.n + i * kWidth;
        if (!t.shares_b)
          load_box(to, g.b, full, x, y, z);
        else if (i < (rank + 1) * kCount / 2)
          load_box<true>(to, g.b, full, x, y, z);
      }
    }
    next_stage();
  }

  __device__ void produce() {
    for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
      const Tile t = tile_of(unit);
      for (int i = 0; i < p.segments; ++i) {
        const Segment& g = p.segment[i];
        const int begin = kRowsAreK ? g.offsets[t.expert] : 0;
        const int end = kRowsAreK ? g.offsets[t.expert + 1] : p.k;
        for (int k = begin; k < end; k += kK) load(t, g, k);
      }
    }
  }

  __device__ int rows_in(int segment, int expert) const {
    const int* offsets = p.segment[segment].offsets;
    return __shfl_sync(~0u, offsets[expert + 1] - offsets[expert], 0);
  }

  __device__ int stages_of(const Tile& t) const {
    if constexpr (!kRowsAreK) return (p.k + kK - 1) / kK;
    int count = 0;
    for (int i = 0; i < p.segments; ++i) count += (rows_in(i, t.expert) + kK - 1) / kK;
    return count;
  }

  __device__ void release() {
    if (lane < 2) barrier_arrive(&s.empty[stage], lane);
    next_stage();
  }

  // Rows as K: what follows the first `valid` rows of this stage belongs to another expert.
  __device__ void clear_tail(int valid) {
    constexpr int kBoxCount = (kM + kN) / 64;  // a and b are apart
    const int chunks = (kK - valid) * 8;
    for (int i = threadIdx.x; i < chunks * kBoxCount; i += 256) {
      const int box = i / chunks, at = i % chunks;
      Bf16* base =
          box < kM / 64 ? s.a[stage] + box * 64 * kK : s.b[stage] + (box - kM / 64) * 64 * kK;
      reinterpret_cast<uint4*>(base + valid * 64)[at] = uint4{0, 0, 0, 0};
    }
    ptx::fence_proxy_async(ptx::space_shared);
    sync_threads(3, 256);
  }

  __device__ void multiply(float (&acc)[128], int group, bool add) {
    products_begin();
#pragma unroll
    for (int i = 0; i < kK / 16; ++i) {
      const Bf16* a = s.a[stage] + group * 64 * kK + i * 16 * (kTransA ? 64 : 1);
      const Bf16* b = s.b[stage] + i * 16 * (kTransB ? 64 : 1);
      product<kTransA, kTransB>(acc, operand(a, kBoxBytes, 1024), operand(b, kBoxBytes, 1024),
                                add || i > 0);
    }
    products_end();  // the other warpgroup keeps the tensor cores busy
  }

  __device__ void consume() {
    const int group = warp / 4;
    float acc[128];
    for (int unit = blockIdx.x / 2; unit < units; unit += gridDim.x / 2) {
      const Tile t = tile_of(unit);
      const int count = __shfl_sync(~0u, stages_of(t), 0);
      // A warpgroup without rows only lets the stages pass.
      if (t.expert < 0 || (!kRowsAreK && t.row + group * 64 >= t.row_end)) {
        for (int i = 0; i < count; ++i) {
          barrier_wait(&s.full[stage], parity);
          release();
        }
        continue;
      }
      if (count == 0) {
        if constexpr (kAdd) continue;
        std::fill_n(acc, 128, 0.0f);
      }
      int segment = -1, left = 0;
      for (int i = 0; i < count; ++i) {
        barrier_wait(&s.full[stage], parity);
        if constexpr (kRowsAreK) {
          while (left <= 0) left = rows_in(++segment, t.expert);
          if (left < kK) clear_tail(left);
          left -= kK;
        }
        multiply(acc, group, i > 0);
        release();
      }
      store(acc, t, group);
    }
    if (threadIdx.x % 128 == 0) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
  }

  // Rows of a warpgroup in boxes of 128 bytes, each through shared memory.
  __device__ void store(const float (&acc)[128], const Tile& t, int group) {
    constexpr int kColumns = 128 / sizeof(Out);
    const int row0 = t.row + group * 64, valid = t.row_end - row0;
    const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
    for (int b = 0; b < kN / kColumns; ++b) {
      if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<kBoxes - 1>());
      sync_threads(1 + group, 128);
      uint8_t* box = s.out[group][b % kBoxes];
      fill_box(box, acc + b * kColumns / 2);
      ptx::fence_proxy_async(ptx::space_shared);
      sync_threads(1 + group, 128);
      const int column = t.n + b * kColumns;
      if (kRowsAreK || valid >= 64) {
        if (leader) store_box<kAdd>(p.out, box, column, row0, kRowsAreK ? t.expert : 0);
      } else if constexpr (!kRowsAreK) {
        store_rows(box, row0, valid, column);
      }
      if (leader) ptx::cp_async_bulk_commit_group();
    }
  }

  __device__ void fill_box(uint8_t* box, const float* acc) {
    const int row = warp % 4 * 16;
    if constexpr (sizeof(Out) == 2) {
      const int matrix = lane / 8, r = row + (matrix & 1) * 8 + lane % 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 columns
        uint32_t pair[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) pair[q] = pack_bf16(acc[j * 8 + q * 2], acc[j * 8 + q * 2 + 1]);
        const uint8_t* at = box + r * 128 + (((j * 2 + (matrix >> 1)) ^ (r & 7)) * 16);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         shared_address(at)),
                     "r"(pair[0]), "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
                     : "memory");
      }
    } else {
      const int r = row + lane / 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 8 columns
        const int chunk = j * 2 + lane % 4 / 2;
        uint8_t* at = box + r * 128 + ((chunk ^ (r & 7)) * 16) + lane % 2 * 8;
        *reinterpret_cast<float2*>(at) = {acc[j * 4], acc[j * 4 + 1]};
        *reinterpret_cast<float2*>(at + 8 * 128) = {acc[j * 4 + 2], acc[j * 4 + 3]};
      }
    }
  }

  // The part of a box before another expert's rows.
  __device__ void store_rows(const uint8_t* box, int row0, int valid, int column) {
    for (int i = threadIdx.x % 128; i < valid * 8; i += 128) {
      const int r = i / 8, chunk = i % 8, c = column + chunk * 8;
      if (c < p.n)
        *reinterpret_cast<uint4*>(p.out_rows + int64_t(row0 + r) * p.n + c) =
            *reinterpret_cast<const uint4*>(box + r * 128 + ((chunk ^ (r & 7)) * 16));
    }
  }
};

template <Kind kKind, class Out, bool kAdd>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    grouped_gemm(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using G = Gemm<kKind, Out, kAdd>;
  G gemm{p, *reinterpret_cast<typename G::Shared*>(memory)};
  gemm.begin();
  if (gemm.warp >= kConsumerWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (gemm.warp == kConsumerWarps && gemm.lane == 0) gemm.produce();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    gemm.consume();
  }
  __syncwarp();
  cluster_sync();  // what a CTA still sends to the other needs it to be there
}

// Any size and dtype, slowly: out[e][i, j] (+)= sum over k of a(i, k) b(k, j), a thread each.
struct Strides {
  int64_t row, col, expert;
};
template <class T, class Out>
__global__ void simple_gemm(const T* a, Strides sa, const T* b, Strides sb, Out* out, Strides so,
                            const int* offsets, bool rows_are_k, int m, int n, int k, bool add) {
  const int e = blockIdx.z, begin = offsets[e], rows = offsets[e + 1] - begin;
  const int m_end = rows_are_k ? m : rows, k_end = rows_are_k ? rows : k;
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= n) return;
  a += rows_are_k ? begin * sa.col : begin * sa.row;
  b += rows_are_k ? begin * sb.row : e * sb.expert;
  out += rows_are_k ? e * so.expert : begin * so.row;
  for (int i = blockIdx.y; i < m_end; i += gridDim.y) {
    float sum = 0;
    for (int x = 0; x < k_end; ++x)
      sum += float(a[i * sa.row + x * sa.col]) * float(b[x * sb.row + j * sb.col]);
    Out& to = out[i * so.row + j * so.col];
    to = Out(add ? float(to) + sum : sum);
  }
}

// Rows behind the last expert's.
__global__ void zero_tail(uint8_t* y, int64_t rows, int64_t row_bytes, const int* used) {
  const int64_t end = rows * row_bytes, step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = *used * row_bytes + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < end; i += step) y[i] = 0;
}

template <Kind kKind, class Out, bool kAdd> void run(const Problem& p, Stream stream) {
  constexpr int bytes = sizeof(typename Gemm<kKind, Out, kAdd>::Shared);
  const auto kernel = grouped_gemm<kKind, Out, kAdd>;
  static const int blocks = [&] {  // once: it costs as much as a launch
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return multiprocessors() / 2 * 2;
  }();
  launch(kernel, {blocks, 384, bytes}, stream, p);
}

// The driver's function, found at run time: the program links nothing of it.
PFN_cuTensorMapEncodeTiled_v12000 encode_map() {
  void* f = nullptr;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault));
  if (!f) fail("CUDA: the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
}

// A map of [depth, rows, cols] in boxes of 128 bytes by `box_rows`.
CUtensorMap map_of(const Tensor& t, int64_t depth, int64_t rows, int64_t cols, int box_rows) {
  const uint64_t size = size_of(t.dtype()),
                 dims[] = {uint64_t(cols), uint64_t(rows), uint64_t(depth)},
                 strides[] = {cols * size, cols * rows * size};
  const uint32_t box[] = {uint32_t(128 / size), uint32_t(box_rows), 1}, steps[] = {1, 1, 1};
  CUtensorMap map;
  static const auto encode = encode_map();
  const CUresult e = encode(
      &map, size == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(t.raw()), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e != CUDA_SUCCESS) fail("CUDA driver: error {}", int(e));
  return map;
}

// What TMA asks for: rows of a multiple of 16 bytes, aligned to as much.
bool fits_tma(const Tensor& t) {
  return t.dtype() == DType::bf16 && t.dim(t.rank() - 1) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0;
}

}  // namespace

void grouped_multiply(const Tensor& x, const Tensor& w, bool trans_w, const Tensor& offsets,
                      Tensor y, Stream stream) {
  const int experts = int(w.dim(0)), k = int(x.dim(1)), n = int(y.dim(1));
  const int* at = offsets.data<int32_t>();
  if (x.dim(0) == 0 || n == 0) return;
  launch(zero_tail, {32, 256}, stream, y, y.dim(0), n * size_of(y.dtype()), at + experts);
  if (experts <= kMaxExperts && fits_tma(x) && fits_tma(w) && fits_tma(y)) {
    Problem p{.out_rows = data<Bf16>(y), .segments = 1, .experts = experts, .n = n, .k = k};
    p.segment[0] = {map_of(x, 1, x.dim(0), k, kM),
                    map_of(w, experts, w.dim(1), w.dim(2), trans_w ? 128 : 64), at};
    p.out = map_of(y, 1, y.dim(0), n, 64);
    return (trans_w ? run<Kind::forward, Bf16, false>
                    : run<Kind::input_gradient, Bf16, false>)(p, stream);
  }
  const int64_t size = w.dim(1) * w.dim(2), row = w.dim(2);
  const Strides sb = trans_w ? Strides{1, row, size} : Strides{row, 1, size};
  by_float_on_device(x.dtype(), [&](auto z) {
    using T = decltype(z);
    const dim3 blocks(blocks_for(n, 128), 64, experts);
    launch(simple_gemm<T, T>, {blocks, 128}, stream, x, Strides{k, 1, 0}, w, sb, y,
           Strides{n, 1, 0}, at, false, 0, n, k, false);
  });
}

void grouped_weight_gradient(std::span<WgradRecord* const> records, Op::Into dw, Stream stream) {
  const Tensor& out = dw.tensor;
  const int experts = int(out.dim(0)), n = int(out.dim(1)), k = int(out.dim(2));
  const bool fast = experts <= kMaxExperts && std::ranges::all_of(records, [](const auto* r) {
                      return r->x.dim(0) > 0 && fits_tma(r->x) && fits_tma(r->dy);
                    });
  const size_t step = fast ? kMaxSegments : 1;
  for (size_t first = 0; first < records.size(); first += step) {
    const auto part = records.subspan(first, std::min(step, records.size() - first));
    const bool add = dw.add || first > 0;
    by_float_on_device(out.dtype(), [&](auto o) {
      using Out = decltype(o);
      if (fast) {
        Problem p{.segments = int(part.size()), .experts = experts, .m = n, .n = k};
        for (size_t i = 0; i < part.size(); ++i)
          p.segment[i] = {map_of(part[i]->dy, 1, part[i]->dy.dim(0), n, 64),
                          map_of(part[i]->x, 1, part[i]->x.dim(0), k, 64),
                          part[i]->offsets.data<int32_t>()};
        p.out = map_of(out, experts, n, k, 64);
        constexpr Kind kind = Kind::weight_gradient;
        return (add ? run<kind, Out, true> : run<kind, Out, false>)(p, stream);
      }
      const WgradRecord& r = *part[0];
      by_float_on_device(r.x.dtype(), [&](auto z) {
        const dim3 blocks(blocks_for(k, 128), std::min(n, 1024), experts);
        launch(simple_gemm<decltype(z), Out>, {blocks, 128}, stream, r.dy, Strides{1, n, 0}, r.x,
               Strides{k, 1, 0}, out, Strides{k, 1, int64_t(n) * k}, r.offsets, true, n, k, 0, add);
      });
    });
  }
}

}  // namespace pith::cuda
