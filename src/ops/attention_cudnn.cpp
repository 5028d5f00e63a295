#ifdef PITH_CUDA
// Attention through cuDNN. The one file that includes its front end, which takes half a minute to compile; the library
// is loaded at run time.

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

#include <map>
#include <tuple>

#include "core/cuda.h"
#include "ops/cuda.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}

namespace pith::cuda {
namespace {

namespace fe = cudnn_frontend;
using Node = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Id : int64_t { kQ = 1, kK, kV, kO, kStats, kDo, kDq, kDk, kDv };

void check(fe::error_t e) {
  if (e.is_bad()) fail("cuDNN: {}", e.get_message());
}

cudnnHandle_t handle() {
  static const cudnnHandle_t the = [] {
    fe::cudnn_dlhandle = load_library("libcudnn.so.9");
    cudnnHandle_t h = nullptr;
    if (const cudnnStatus_t s = fe::detail::create_handle(&h); s != CUDNN_STATUS_SUCCESS)
      fail("cuDNN: status {}", int(s));
    return h;
  }();
  return the;
}

using Plan = std::shared_ptr<fe::graph::Graph>;

// Everything a plan depends on.
enum class Pass { forward, backward, deterministic_backward };
using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, Pass>;

// Statistics are log-sum-exp, fp32 [B, Hq, S, 1]; all else is [B, heads, S, D]: in a packed tensor, or o and its
// gradient.
fe::graph::Tensor_attributes& describe(fe::graph::Tensor_attributes& t, const AttentionShape& s,
                                       Id id) {
  t.set_uid(id);
  if (id == kStats)
    return t.set_dim({s.batch, s.heads, s.sequence, 1})
        .set_stride({s.heads * s.sequence, s.sequence, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
  const bool is_query = id == kQ || id == kDq, is_out = id == kO || id == kDo;
  const int64_t width = is_out ? s.heads * s.head_dim : s.width();
  return t.set_dim({s.batch, is_query || is_out ? s.heads : s.kv_heads, s.sequence, s.head_dim})
      .set_stride({s.sequence * width, s.head_dim, width, 1});
}

template <class Attributes> Attributes attributes(float scale, int64_t window) {
  Attributes a;
  a.set_attn_scale(scale)
      .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
      .set_diagonal_band_right_bound(0);
  if (window > 0) a.set_diagonal_band_left_bound(window);
  return a;
}

Plan make_plan(const AttentionShape& s, float scale, int64_t window, Pass pass) {
  const Plan plan = std::make_shared<fe::graph::Graph>();
  fe::graph::Graph& g = *plan;
  g.set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const auto input = [&](Id id) {
    fe::graph::Tensor_attributes t;
    return g.tensor(describe(t, s, id));
  };
  const auto output = [&](const Node& t, Id id) { describe(*t, s, id).set_output(true); };
  const Node q = input(kQ), k = input(kK), v = input(kV);
  if (pass == Pass::forward) {
    const auto [o, stats] = g.sdpa(
        q, k, v, attributes<fe::graph::SDPA_attributes>(scale, window).set_generate_stats(true));
    output(o, kO);
    output(stats, kStats);
  } else {
    const auto [dq, dk, dv] =
        g.sdpa_backward(q, k, v, input(kO), input(kDo), input(kStats),
                        attributes<fe::graph::SDPA_backward_attributes>(scale, window)
                            .set_deterministic_algorithm(pass == Pass::deterministic_backward));
    output(dq, kDq);
    output(dk, kDk);
    output(dv, kDv);
  }
  check(g.build(handle(), {fe::HeurMode_t::A}));
  return plan;
}

const Plan& plan_for(const AttentionShape& s, float scale, int64_t window, Pass pass) {
  static std::map<Key, Plan> plans;
  handle();  // before anything else of the library
  const Key key{s.batch, s.sequence, s.heads, s.kv_heads, s.head_dim, window, scale, pass};
  auto it = plans.find(key);
  if (it == plans.end()) it = plans.emplace(key, make_plan(s, scale, window, pass)).first;
  return it->second;
}

void run(const Plan& p, std::unordered_map<int64_t, void*> tensors, Stream stream) {
  int64_t bytes = 0;
  check(p->get_workspace_size(bytes));
  Tensor workspace({std::max<int64_t>(bytes, 1)}, DType::u8, Device::cuda, "attention_workspace");
  if (fe::detail::set_stream(handle(), stream) != CUDNN_STATUS_SUCCESS)
    fail("cuDNN: the stream was refused");
  check(p->execute(handle(), tensors, workspace.raw()));
}

// q, k and v of a packed tensor.
std::unordered_map<int64_t, void*> three(Tensor t, const AttentionShape& s, Id q) {
  const auto head = [&](int64_t h) { return t.data<bf16>() + h * s.head_dim; };
  return {{q, head(0)}, {q + 1, head(s.heads)}, {q + 2, head(s.heads + s.kv_heads)}};
}

}  // namespace

void attention(const Tensor& qkv, const AttentionShape& s, float scale, int64_t window, Tensor y,
               Tensor stats, Stream stream) {
  auto tensors = three(qkv, s, kQ);
  tensors[kO] = y.raw();
  tensors[kStats] = stats.raw();
  run(plan_for(s, scale, window, Pass::forward), tensors, stream);
}

void attention_backward(const Tensor& qkv, const AttentionShape& s, float scale, int64_t window,
                        const Tensor& y, const Tensor& stats, const Tensor& dy, Tensor d_qkv,
                        bool deterministic, Stream stream) {
  auto tensors = three(qkv, s, kQ);
  tensors.merge(three(d_qkv, s, kDq));
  tensors[kO] = Tensor(y).raw();
  tensors[kStats] = Tensor(stats).raw();
  tensors[kDo] = Tensor(dy).raw();
  const Pass pass = deterministic ? Pass::deterministic_backward : Pass::backward;
  run(plan_for(s, scale, window, pass), tensors, stream);
}

}  // namespace pith::cuda
#endif
