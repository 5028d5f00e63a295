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
};
// Writes events as a Chrome trace (chrome://tracing, Perfetto): name, source line, FLOPs and bytes
// of every run.
void write_chrome_trace(const std::string& path, const std::vector<OpEvent>& events);
// The same of a GPU, from the runs that events are the tags of; and PATH.csv, the heaviest kernels:
// kernel_name,total_time_ms,instances,mean_time_ms.
void write_kernel_trace(const std::string& path, const std::vector<OpEvent>& events,
                        const cuda::Timeline& timeline);

// Where a computation runs and how it is watched: one per process and device, passed explicitly.
struct Context {
  Device device = Device::cpu;
  Device planned = Device::cpu;  // on meta: the device that it stands for
  DType dtype = DType::f32;      // compute
  bool check_finite = false;     // scan what every op writes and fail at the op's line
  bool deterministic = false;    // the same bits again, also where a library is faster without
  Cost total;                    // since the owner last cleared it
  std::vector<OpEvent>* timeline = nullptr;
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
  void leaf(const Tensor& x);  // x wants a gradient
  // Leaves, and outputs of ops recorded on this tape.
  bool wants(const Tensor& x) const { return grads_.contains(x.id()); }
  void set_grad(const Tensor& y, Tensor grad);  // seeds an output; a second call adds
  Tensor take_grad(const Tensor& x);            // moves it out; zeros if nothing reached x
  void backward();

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
  // Of leaves and outputs, by identity; an empty tensor before the first contribution.
  std::unordered_map<uint64_t, Tensor> grads_;
};

}  // namespace pith
