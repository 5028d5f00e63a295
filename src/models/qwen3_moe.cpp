// Qwen3-MoE (Hugging Face `Qwen3MoeForCausalLM`): grouped-query attention with q/k norm, softmax ->
// top-k router. Letters: T tokens, H hidden, D head dim, E experts, K chosen, I expert width, N
// (row, expert) pairs, V vocabulary.

#include "models/balance.h"
#include "models/config.h"
#include "ops/ops.h"

namespace pith {
namespace {

class Qwen3Moe : public Model {
 public:
  Qwen3Moe(const Value& c, const ModelOptions& options) : config_(c), options_(options) {
    config_only(c, "hidden_act", "silu");
    config_only(c, "attention_dropout", 0.0);
    config_only(c, "use_bidirectional_attention", false);
    config_only(c, "quantization_config", Value());

    hidden_ = config_size(c, {"hidden_size"});
    heads_ = config_size(c, {"num_attention_heads"});
    kv_heads_ = config_size(c, {"num_key_value_heads"}, heads_);
    head_dim_ = config_size(c, {"head_dim"}, hidden_ / heads_);
    eps_ = float(config_real(c, "rms_norm_eps", 1e-6));
    if (config_flag(c, "use_sliding_window", false)) window_ = config_size(c, {"sliding_window"});
    if (heads_ % kv_heads_)
      fail_input("{}: num_attention_heads {} is not a multiple of num_key_value_heads {}",
                 c.where(), heads_, kv_heads_);
    if (head_dim_ % 2) fail_input("{}: head_dim {} must be even", c.where(), head_dim_);

    size.layers = config_size(c, {"num_hidden_layers"});
    size.vocabulary = config_size(c, {"vocab_size"});
    size.experts = config_size(c, {"num_local_experts", "num_experts"});
    if (config_size(c, {"num_experts", "num_local_experts"}) != size.experts)
      fail_input("{}: num_experts and num_local_experts differ: they are one size in two spellings",
                 c.where());
    size.top_k = config_size(c, {"num_experts_per_tok"});
    size.kv_width = 2 * kv_heads_ * head_dim_;
    size.init_std = config_real(c, "initializer_range", 0.02);
    if (size.top_k > size.experts)
      fail_input("{}: num_experts_per_tok {} is more than num_experts {}", c.where(), size.top_k,
                 size.experts);
    rule_.top_k = size.top_k;
    rule_.renormalize = config_flag(c, "norm_topk_prob", false);
    rope_ = make_rope_table(c, head_dim_, options.max_positions, master_dtype(options.dtype),
                            options.device);

    // Which layers are dense: those listed, and those a sparse step skips.
    const Value* dense = config_find(c, {"mlp_only_layers"});
    const int64_t sparse_step = config_size(c, {"decoder_sparse_step"}, 1);

    const Shape table{size.vocabulary, hidden_};
    embed_ = matrix("model.embed_tokens.weight", table, Role::embedding);
    for (int64_t l = 0; l < size.layers; ++l) {
      const std::string prefix = fmt::format("model.layers.{}.", l);
      Layer& w = layers_.emplace_back();
      declare_attention(w, prefix);
      const bool listed = dense && std::ranges::count(dense->items(), l, &Value::as_int);
      if (listed || (l + 1) % sparse_step != 0) {
        declare_dense(w, prefix + "mlp.", config_size(c, {"intermediate_size"}));
      } else {
        w.moe_layer = size.moe_layers++;
        moe_layers.push_back(l);
        declare_experts(w, prefix + "mlp.");
      }
    }
    final_norm_ = vector("model.norm.weight", hidden_, Init::ones);
    const bool tied = config_flag(c, "tie_word_embeddings", false);
    if (tied) ignored_when_reading = {"lm_head.weight"};
    lm_head_ = tied ? embed_ : matrix("lm_head.weight", table, Role::head);
    params.allocate(options.dtype, options.device, options.training, options.bf16_grads);
  }

  Carry embed(Tape& t, MicroBatch& mb) override {
    return {embedding(t, mb.tokens, *embed_), {}, {}};
  }

  Stage1 stage1_attention_router(Tape& t, int64_t layer, const Carry& in, MicroBatch& mb) override {
    const Layer& w = layers_[layer];
    auto [x_TH, hidden_TH] = add_rms_norm(t, in.hidden, in.delta, *w.input_norm, eps_);
    Tensor attended_TH = attend(t, layer, x_TH, mb);
    auto [rows_TH, residual_TH] =
        add_rms_norm(t, hidden_TH, attended_TH, *w.post_attention_norm, eps_);
    if (!w.gate) {
      Tensor act_TI = swiglu(t, linear(t, rows_TH, *w.gate_up));
      return {.residual = residual_TH, .delta = linear(t, act_TI, *w.down)};
    }
    Tensor logits_TE = linear(t, rows_TH, *w.gate, {.out = master_dtype(options_.dtype)});
    Routing r =
        route(t, mb, options_.balance, rule_, w.router, w.moe_layer, size.moe_layers, logits_TE);
    return {.residual = residual_TH, .rows = rows_TH, .ids = r.ids, .weights = r.weights};
  }

  Tensor stage3_experts(Tape& t, int64_t layer, const Received& in) override {
    const Layer& w = layers_[layer];
    const ExpertOrder order = order_by_expert(t, in.ids, w.gate_up->value.dim(0));
    Tensor x_NH = gather_rows(t, in.rows, order);  // N pairs, sorted by expert
    Tensor gate_up_N2I = grouped_linear(t, x_NH, *w.gate_up, order.offsets);
    Tensor act_NI = swiglu(t, gate_up_N2I, in.weights, order);  // silu(gate) * up * router weight
    return sum_rows(t, grouped_linear(t, act_NI, *w.down, order.offsets), order);
  }

  Tensor head_loss(Tape& t, const Carry& in, MicroBatch& mb) override {
    Tensor x_TH = add_rms_norm(t, in.hidden, in.delta, *final_norm_, eps_).y;
    return pith::head_loss(t, x_TH, *lm_head_, mb.labels).sum;
  }

  Tensor logits(Tape& t, const Carry& in) override {
    Tensor x_TH = add_rms_norm(t, in.hidden, in.delta, *final_norm_, eps_).y;
    return linear(t, x_TH, *lm_head_, {.out = master_dtype(options_.dtype)});
  }

  void after_step(const Statistics& sums) override {
    const auto counts = sums.find("expert_count");
    if (counts == sums.end()) return;
    for (const Layer& w : layers_)
      if (const int64_t l = w.moe_layer; l >= 0)
        update_router_state(w.router, options_.balance, counts->second.row_range(l, l + 1));
  }

  Value hf_config() const override {
    Value config = with_both_spellings(config_);
    if (!config_find(config, {"architectures"}))
      config["architectures"] = Value::array({"Qwen3MoeForCausalLM"});
    return config;
  }

 private:
  struct Layer {
    Param *input_norm, *post_attention_norm;
    Param *qkv, *qkv_bias = nullptr, *q_norm, *k_norm, *o, *o_bias = nullptr;
    Param* gate = nullptr;  // router; nullptr: dense layer
    Param *gate_up, *down;  // of the experts, or of the dense MLP
    RouterState router;
    int64_t moe_layer = -1;
  };

  Param* matrix(const std::string& name, Shape shape, Role role = Role::matrix,
                std::vector<Piece> pieces = {}) {
    return &params.add({.name = name, .shape = shape, .role = role, .pieces = std::move(pieces)});
  }

  // A norm or a bias: without weight decay.
  Param* vector(const std::string& name, int64_t width, Init init, std::vector<Piece> pieces = {}) {
    return &params.add({name, {width}, Role::vector, false, init, std::move(pieces)});
  }

  void declare_attention(Layer& w, const std::string& prefix) {
    const std::string self = prefix + "self_attn.";
    const int64_t Q = heads_ * head_dim_, KV = kv_heads_ * head_dim_, H = hidden_;
    w.input_norm = vector(prefix + "input_layernorm.weight", H, Init::ones);
    w.qkv = matrix(self + "qkv_proj.weight", {Q + 2 * KV, H}, Role::matrix,
                   {{self + "q_proj.weight", {Q, H}},
                    {self + "k_proj.weight", {KV, H}},
                    {self + "v_proj.weight", {KV, H}}});
    w.q_norm = vector(self + "q_norm.weight", head_dim_, Init::ones);
    w.k_norm = vector(self + "k_norm.weight", head_dim_, Init::ones);
    w.o = matrix(self + "o_proj.weight", {H, Q});
    if (config_flag(config_, "attention_bias", false)) {
      w.qkv_bias = vector(self + "qkv_proj.bias", Q + 2 * KV, Init::zeros,
                          {{self + "q_proj.bias", {Q}},
                           {self + "k_proj.bias", {KV}},
                           {self + "v_proj.bias", {KV}}});
      w.o_bias = vector(self + "o_proj.bias", H, Init::zeros);
    }
    w.post_attention_norm = vector(prefix + "post_attention_layernorm.weight", H, Init::ones);
  }

  void declare_experts(Layer& w, const std::string& mlp) {
    const int64_t E = size.experts, H = hidden_,
                  I = config_size(config_, {"moe_intermediate_size"});
    w.gate = matrix(mlp + "gate.weight", {E, H}, Role::router);
    Param gate_up{.name = mlp + "experts.gate_up_proj", .shape = {E, 2 * I, H}};
    Param down{.name = mlp + "experts.down_proj", .shape = {E, H, I}};
    // One tensor per expert, or all in one.
    for (int64_t e = 0; e < E; ++e) {
      const std::string expert = fmt::format("{}experts.{}.", mlp, e);
      gate_up.pieces.push_back({expert + "gate_proj.weight", {I, H}});
      gate_up.pieces.push_back({expert + "up_proj.weight", {I, H}});
      down.pieces.push_back({expert + "down_proj.weight", {H, I}});
    }
    for (Param* p : {&gate_up, &down}) p->also_read = {{{p->name, p->shape}}};
    w.gate_up = &params.add(std::move(gate_up));
    w.down = &params.add(std::move(down));
    w.router = declare_router_state(params, options_.balance, mlp + "gate", E);
  }

  void declare_dense(Layer& w, const std::string& mlp, int64_t I) {
    w.gate_up =
        matrix(mlp + "gate_up_proj.weight", {2 * I, hidden_}, Role::matrix,
               {{mlp + "gate_proj.weight", {I, hidden_}}, {mlp + "up_proj.weight", {I, hidden_}}});
    w.down = matrix(mlp + "down_proj.weight", {hidden_, I});
  }

  Tensor attend(Tape& t, int64_t layer, const Tensor& x_TH, MicroBatch& mb) {
    const Layer& w = layers_[layer];
    const AttentionShape shape{mb.batch, mb.sequence, heads_, kv_heads_, head_dim_};
    const float scale = 1.0f / std::sqrt(float(head_dim_));
    Tensor qkv = linear(t, x_TH, *w.qkv, {.bias = w.qkv_bias});
    qkv = qk_norm_rope(t, qkv, w.q_norm, w.k_norm, eps_, rope_, mb.positions, shape);
    Tensor heads = mb.caches ? attention_cached(t, qkv, (*mb.caches)[layer], shape, scale, window_)
                             : attention(t, qkv, shape, scale, mb.document_start, window_);
    return linear(t, heads, *w.o, {.bias = w.o_bias});
  }

  Value config_;
  ModelOptions options_;
  int64_t hidden_, heads_, kv_heads_, head_dim_, window_ = 0;
  float eps_;
  RouterRule rule_;
  RopeTable rope_;
  std::vector<Layer> layers_;
  Param *embed_, *final_norm_, *lm_head_;
};

}  // namespace

std::unique_ptr<Model> make_qwen3_moe(const Value& config, const ModelOptions& options) {
  return std::make_unique<Qwen3Moe>(config, options);
}

}  // namespace pith
