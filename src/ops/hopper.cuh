#pragma once
// What kernels for Hopper are made of beside cuda::ptx: bulk tensor copies (TMA) between global and shared memory,
// clusters, and warpgroup matrix products (wgmma). PTX ISA 8.x, sections "cp.async.bulk.tensor", "wgmma".
// All tiles in shared memory have rows of 128 bytes in the 128-byte swizzle: 16-byte chunk c of row r lies at c ^ (r % 8).

#include <cuda.h>

#include <cuda/ptx>

namespace pith::cuda {

namespace ptx = ::cuda::ptx;

__device__ inline uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

__device__ inline void cluster_sync() {
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// At the barrier in the same place of another CTA of the cluster. It orders no memory: only reads by
// wgmma precede it.
__device__ inline void barrier_arrive(uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// One box of a three-dimensional map at (x, y, z) to shared memory, with kBoth to the same place in both CTAs of a
// cluster of two; outside the tensor reads as zero.
template <bool kBoth = false>
__device__ void load_box(void* to, const CUtensorMap& map, uint64_t* barrier, int x, int y, int z) {
  const int32_t at[] = {x, y, z};
  if constexpr (kBoth)
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, barrier,
                              uint16_t(3));
  else
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, barrier);
}
// Shared to global memory, adding to what is there with kAdd; outside the tensor nothing is written.
template <bool kAdd>
__device__ void store_box(const CUtensorMap& map, const void* from, int x, int y, int z) {
  const int32_t at[] = {x, y, z};
  if constexpr (kAdd)
    ptx::cp_reduce_async_bulk_tensor(ptx::space_global, ptx::space_shared, ptx::op_add, &map, at,
                                     from);
  else
    ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, at, from);
}

__device__ inline void sync_threads(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// A wgmma operand. K-major: rows of 64 elements of K, `stride` bytes between groups of 8 rows (1024). Otherwise
// rows are K and hold 64 elements of M or N; `leading` bytes separate one 64 of them from the next.
__device__ inline uint64_t operand(const void* p, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | kSwizzle128;
}

// d[64, 256] = (add ? d : 0) + a[64, 16] b[16, 256] over a warpgroup; kTrans: the operand is not K-major. Thread t of
// warp w holds of row 16 w + t / 4 columns 8 j + 2 (t % 4) + {0, 1} in d[4 j + {0, 1}], of row + 8 in d[4 j + {2, 3}].
template <bool kTransA, bool kTransB>
__device__ inline void product(float (&d)[128], uint64_t a, uint64_t b, bool add) {
#define PITH_8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PITH_32(i) PITH_8(i), PITH_8(i + 8), PITH_8(i + 16), PITH_8(i + 24)
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127"
      "}, %128, %129, p, 1, 1, %131, %132;\n}"
      : PITH_32(0), PITH_32(32), PITH_32(64), PITH_32(96)
      : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransA)), "n"(int(kTransB)));
#undef PITH_32
#undef PITH_8
}

}  // namespace pith::cuda
