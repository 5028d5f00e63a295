#pragma once
// Qwen3-MoE (Hugging Face `Qwen3MoeForCausalLM`): grouped-query attention with q/k norm, softmax ->
// top-k router.

#include "models/balance.h"
#include "models/config.h"

namespace pith {

class Qwen3Moe : public Model {
 public:
  Qwen3Moe(const Value& config, const ModelOptions& options);

  Carry embed(Tape& t, MicroBatch& mb) override;
  Stage1 stage1_attention_router(Tape& t, int64_t layer, const Carry& in, MicroBatch& mb) override;
  Tensor stage3_experts(Tape& t, int64_t layer, const Received& in) override;
  Tensor head_loss(Tape& t, const Carry& in, MicroBatch& mb) override;
  Tensor logits(Tape& t, const Carry& in) override;
  void after_step(const Statistics& sums) override;
  std::vector<std::string> ignored_when_reading() const override {
    return lm_head_ == embed_ ? std::vector<std::string>{"lm_head.weight"}
                              : std::vector<std::string>();
  }
  Value hf_config() const override;

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
                std::vector<Piece> pieces = {});
  Param* vector(const std::string& name, int64_t width, Init init, std::vector<Piece> pieces = {});
  void declare_attention(Layer& w, const std::string& prefix);
  void declare_experts(Layer& w, const std::string& prefix);
  void declare_dense(Layer& w, const std::string& prefix, int64_t width);
  Tensor attend(Tape& t, int64_t layer, const Tensor& x_TH, MicroBatch& mb);

  Value config_;
  ModelOptions options_;
  int64_t hidden_, heads_, kv_heads_, head_dim_, window_ = 0;
  float eps_;
  RouterRule rule_;
  RopeTable rope_;
  std::vector<Layer> layers_;
  Param *embed_, *final_norm_, *lm_head_;
};

}  // namespace pith
