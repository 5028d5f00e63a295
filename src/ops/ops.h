#pragma once
// Table of contents of the operators. Each is a trio: name.h (contract), name.cpp (CPU and
// backward), name.cu (kernels).

#include "ops/attention.h"  // qk_norm_rope, attention, attention_cached
#include "ops/basic.h"      // add, mul, softmax, matmul, slices, ...: for new ideas
#include "ops/embedding.h"  // embedding, head_loss
#include "ops/experts.h"    // order_by_expert, gather_rows, swiglu, sum_rows
#include "ops/linear.h"     // linear, grouped_linear, flush_wgrads
#include "ops/norm.h"       // add_rms_norm
#include "ops/optimizer.h"  // sum_of_squares, adamw_update, muon_update
#include "ops/router.h"     // route_top_k, balance losses
