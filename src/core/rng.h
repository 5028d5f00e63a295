#pragma once
// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). A value depends on (key, index) alone, never on order, layout or thread.

#include "core/tensor.h"

namespace pith {

std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_lo, uint64_t counter_hi = 0);

// Key of a stream, the same for (seed, name) everywhere: FNV-1a of the name, mixed with the seed.
uint64_t stream_key(uint64_t seed, std::string_view name);

double uniform(uint64_t key, uint64_t index);  // [0, 1), 53 bits
float normal(uint64_t key, uint64_t index);    // N(0, 1), Box-Muller on fixed polynomials

// dst[i] = std * normal(key, first_index + i), rounded to the dtype of the cpu tensor.
void fill_normal(Tensor dst, uint64_t key, uint64_t first_index, double std);

// A keyed permutation of [0, n): a six-round Feistel network with cycle walking. Bijective for
// every n >= 1.
uint64_t permute(uint64_t index, uint64_t n, uint64_t key);

}  // namespace pith
