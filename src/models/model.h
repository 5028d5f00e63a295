#pragma once
// The model protocol: five stages per decoder layer, so that the engine can hide the expert
// communication of one micro-batch behind the compute of another.
//
//   stage1_attention_router  (model)   (add +) norm, attention, residual, norm, router, shared MLP
//   stage2_dispatch          (engine)  one row per (token, destination rank)
//   stage3_experts           (model)   expert FFN on received rows, weighted, summed per row
//   stage4_combine           (engine)  rows back to their tokens
//   stage5_add               (engine)  residual + sums; left to the next stage 1 or the head, which
//                                      open with a fused add + norm
//
// plus embed and head_loss. Letters: T tokens of a micro-batch (B sequences of S), H hidden, E
// experts, K chosen.

#include "core/value.h"
#include "data/loader.h"
#include "ops/attention.h"
#include "ops/router.h"

namespace pith {

// What the run asks of routing, beside the model's own rule: the run file's [balance] and
// train.force_balance.
struct Balance {
  std::string loss = "none";           // none | micro_batch | sequence | global_batch
  double coefficient = 0;              // of the balance loss
  double z_loss = 0;                   // coefficient of the router z-loss
  double bias_update_rate = 0;         // auxiliary-loss-free balancing
  std::string bias_export = "refuse";  // where Hugging Face has no tensor for it: refuse | drop
  bool force = false;                  // benchmarks: ids dealt out evenly, whatever the router says
};

struct ModelOptions {
  DType dtype = DType::f32;
  Device device = Device::cpu;
  bool training = true;       // gradients and masters
  int64_t max_positions = 0;  // rows of the rotary tables
  Balance balance;
  bool bf16_grads = false;  // main gradients of matrices
};

// Sums by name over the micro-batches of a step, wide: "expert_count" [moe layers, E],
// "balance_loss" [1], "z_loss" [1]. With several ranks they are what the mesh reduces.
using Statistics = std::map<std::string, Tensor>;

// What the stages of one micro-batch share: its rows, and sums over the *whole* step, which scale
// the extra losses.
struct MicroBatch : Batch {
  double step_labels = 1;                  // N: labels of the global batch
  double step_tokens = 1;                  // tokens of the global batch
  double step_micro_batches = 1;           // M: micro-batches of the global batch
  Statistics* statistics = nullptr;        // nullptr: not collected
  std::vector<Tensor> replay;              // i32 [T, K] per MoE layer; empty: route freely
  std::vector<Routing>* trace = nullptr;   // receives ids and weights per MoE layer
  std::vector<KvCache>* caches = nullptr;  // generation: one per layer
};

struct Carry {
  Tensor hidden;              // [T, H] residual stream
  Tensor delta;               // [T, H] not yet added to it, or empty
  std::vector<Tensor> extra;  // what else an architecture carries between layers
};

struct Stage1 {
  Tensor residual;  // [T, H]
  Tensor delta;     // [T, H] dense MLP or shared experts, to be added; or empty
  Tensor rows;  // [T, H] what goes to the experts; empty for a dense layer, which skips stages 2-4
  Tensor ids, weights;  // i32 and wide [T, K]
};

struct Received {
  Tensor rows;          // [R, H]
  Tensor ids, weights;  // i32 (local expert or -1) and wide [R, k]
};

class Model {
 public:
  virtual ~Model() = default;

  virtual Carry embed(Tape& t, MicroBatch& mb) = 0;
  virtual Stage1 stage1_attention_router(Tape& t, int64_t layer, const Carry& in,
                                         MicroBatch& mb) = 0;
  virtual Tensor stage3_experts(Tape& t, int64_t layer, const Received& in) = 0;
  // The sum over the labels, wide [1].
  virtual Tensor head_loss(Tape& t, const Carry& in, MicroBatch& mb) = 0;
  virtual Tensor logits(Tape& t, const Carry& in) = 0;  // wide [T, V]

  // Once per applied update: state that is not trained (router bias, expert fractions) from the
  // step's sums.
  virtual void after_step(const Statistics& sums) = 0;

  // The config.json of a checkpoint: the one that was read, with renamed keys in both spellings (v4
  // and v5).
  virtual Value hf_config() const = 0;

  struct Size {
    int64_t layers = 0, moe_layers = 0, vocabulary = 0, experts = 0, top_k = 0;
    int64_t kv_width = 0;  // columns of a KvCache
    double init_std = 0.02;
  };
  Size size;
  std::vector<std::string> ignored_when_reading;  // fnmatch patterns of tensors
  std::vector<int64_t> moe_layers;                // decoder layer of each MoE layer
  ParamSet params;
};

Tensor wide_scalar(const Context& c, double value);  // wide [1]: a loss, or its gradient
double value_of(const Tensor& scalar);               // 0 on meta

// The one switch over architectures (models.cpp). `config` is a parsed config.json; InputError
// names what is unsupported. Parameters are declared and allocated, not initialized.
std::unique_ptr<Model> make_model(const Value& config, const ModelOptions& options);
// Its cases, one per file of an architecture.
std::unique_ptr<Model> make_qwen3_moe(const Value& config, const ModelOptions& options);

}  // namespace pith
