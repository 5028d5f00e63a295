#pragma once
// Autograd, explicit and linear. Every op appends one closure next to its forward code; backward()
// runs them last to first and drops each as it goes, so that saved tensors are freed at the
// earliest moment. A stage of a layer is one tape; its inputs are leaves: gradients go in at
// outputs and come out at leaves.

#include <unordered_map>

#include "core/cuda.h"
#include "core/param.h"

namespace pith {

class Op;

// Counted by every op. flops: of matrix multiplications and attention; bytes: of tensors read and
// written.
struct Cost {
  double flops = 0;
  double bytes = 0;
};

struct OpEvent {  // one run of one op, for the timeline
  const char* name;
  Loc at;
  bool backward;
  double begin, end;  // seconds, of one clock
  Cost cost;
  const char* stage;  // see Context::enter
  int64_t layer;
};
// Writes a step as a Chrome trace (chrome://tracing, Perfetto): every run on the GPU, whose tags
// are indices of `events`, or without one every op, with its op, source line, stage, layer, FLOPs
// and bytes. Beside it PATH.csv, the heaviest kernels (or ops):
// kernel_name,total_time_ms,instances,mean_time_ms; and PATH.stages.csv, the time of each stage:
// stage,total_time_ms,instances,share. Returns the latter as a table.
std::string write_timeline(const std::string& path, const std::vector<OpEvent>& events,
                           cuda::Timeline timeline = {});

// What is computed again in the backward instead of being kept: outputs of norms, SwiGLU and the
// gather into expert order as far as only weight gradients read them, or all of stage 1.
struct Recompute {
  bool norm = false, swiglu = false, gather = false, stage1 = false;
};

// Where a computation runs and how it is watched: one per process and device, passed explicitly.
struct Context {
  Device device = Device::cpu;
  Device planned = Device::cpu;  // on meta: the device that it stands for
  DType dtype = DType::f32;      // compute
  bool check_finite = false;     // scan what every op writes and fail at the op's line
  bool sync = false;             // wait for the GPU after every op: its errors name the op's line
  bool deterministic = false;    // the same bits again, also where a library is faster without
  Recompute recompute = {};
  Cost total;  // since the owner last cleared it
  std::vector<OpEvent>* timeline = nullptr;

  // Where the step is now, for the timeline and Nsight: "stage3_experts" (a literal) and its decoder
  // layer, -1 for none.
  void enter(const char* new_stage, int64_t new_layer = -1);
  const char* stage = "";
  int64_t layer = -1;
};

// A deferred weight gradient: grad(param) += dy^T x, for grouped linears expert by expert. It is
// data, not code, so that the records of several micro-batches can go into one GEMM with a longer
// K.
struct WgradRecord {
  Param* param;
  Tensor x;        // [N, in]
  Tensor dy;       // [N, out]
  Tensor offsets;  // i32 [E + 1] rows of each expert, or empty for a dense linear
  Loc at;
};
using WgradQueue = std::vector<WgradRecord>;

class Tape {
 public:
  // record = false keeps nothing (evaluation, generation). Weight gradients of linears go to
  // `queue`.
  explicit Tape(Context& context, bool record = true, WgradQueue* queue = nullptr)
      : context(context), queue(queue), record_(record) {}
  Tape(Tape&&) = default;

  Context& context;
  WgradQueue* queue;

  bool recording() const { return record_; }
  void leaf(const Tensor& x);  // x wants a gradient; an empty one does not
  // Leaves, and outputs of ops recorded on this tape.
  bool wants(const Tensor& x) const { return grads_.contains(x.id()); }
  void set_grad(const Tensor& y, Tensor grad);  // seeds an output; a second call adds
  Tensor take_grad(const Tensor& x);            // moves it out; zeros if nothing reached x
  void backward();
  void evict() const;  // what Op::recompute allows, after its last use in the forward

  struct Arg {  // of an op
    const char* name;
    Tensor tensor;
  };

 private:
  friend class Op;
  struct Entry {
    const char* name;
    Loc at;
    std::vector<Arg> args;  // without their memory
    std::vector<uint64_t> outputs;
    std::function<void(Op&)> run;
  };
  Tensor& slot(const Tensor& x);
  bool record_;
  std::vector<Entry> entries_;
  // What Op::recompute allows to give back, and whether until weight gradients are flushed.
  std::vector<std::pair<Tensor, bool>> evictable_;
  // Of leaves and outputs, by identity; an empty tensor before the first contribution.
  std::unordered_map<uint64_t, Tensor> grads_;
};

}  // namespace pith
