#pragma once
// Reading a Hugging Face config.json: fields named exactly as there, in the spellings of
// transformers 4 and 5.

#include "core/value.h"
#include "ops/attention.h"

namespace pith {

// The first of several spellings that is present and not null; nullptr if none is.
const Value* config_find(const Value& config, std::initializer_list<const char*> spellings);
// A positive integer; required without a fallback.
int64_t config_size(const Value& config, std::initializer_list<const char*> spellings,
                    int64_t fallback = 0);
double config_real(const Value& config, const char* key, double fallback);
bool config_flag(const Value& config, const char* key, bool fallback);
// InputError "config.json: KEY = VALUE is not supported: use WANTED" unless the key is absent, null
// or `wanted`.
void config_only(const Value& config, const char* key, const Value& wanted);

// Rotary embedding: `rope_theta` + `rope_scaling` (v4) or `rope_parameters` (v5). Types default,
// linear, yarn (Peng et al. 2023, arXiv:2309.00071) and llama3, with the defaults of transformers'
// modeling_rope_utils. Angles are fp32 products of position and inverse frequency, as transformers
// computes them, whatever the dtype.
RopeTable make_rope_table(const Value& config, int64_t rotary_dim, int64_t positions, DType dtype,
                          Device device);

// Writes both spellings of what was renamed between transformers 4 and 5, except for the dtype, which
// is the checkpoint's own. `config` has a number of experts.
Value with_both_spellings(Value config);

}  // namespace pith
