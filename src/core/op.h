#pragma once
// Op: the one helper through which every operator checks, allocates, runs on its device and records
// its backward.
//
//   Tensor scale(Tape& tape, const Tensor& x, float a, Loc at) {
//     Op op(tape, "scale", at, {{"x", x}});
//     op.require(x.rank() == 2, "x must be a matrix");
//     Tensor y = op.output("y", x.shape(), x.dtype());
//     op.run({.bytes = 2.0 * x.nbytes()}, [&] { ... });
//     op.backward([=](Op& op) {
//       Tensor dy = op.grad(y);
//       if (auto dx = op.accumulate(x)) op.run({.bytes = ...}, [&] { ... dx.add ? += : = ... });
//     });
//     return y;
//   }

#include "core/cuda.h"
#include "core/tape.h"

namespace pith {

struct OpError : Error {  // already carries its op and line
  using Error::Error;
};

class Op {
 public:
  Op(Tape& tape, const char* name, Loc at, std::vector<Tape::Arg> args, bool backward = false);
  Op(const Op&) = delete;
  ~Op();

  // Throws "<file>:<line>: <op>: <message>; x bf16[4, 8] cpu, w bf16[8] cpu" when not ok.
  template <class... A> void require(bool ok, fmt::format_string<A...> f, A&&... a) const {
    if (!ok) reject(fmt::format(f, std::forward<A>(a)...));
  }
  [[noreturn]] void reject(const std::string& message) const;

  // A result. If the tape records, it gets a gradient slot. `name` must be a literal (memory
  // accounting keeps it).
  Tensor output(const char* name, Shape shape, DType dtype);
  // Scratch memory, freed with the last copy of the tensor; counted like every buffer.
  Tensor workspace(const char* name, Shape shape, DType dtype) {
    return Tensor(shape, dtype, tape_.context.device, name);
  }

  // Runs `cpu` on cpu tensors, `gpu` on cuda tensors; on meta only the cost is counted. Without a
  // `gpu`, or where that returns false, an op runs on the host there, with copies and a warning.
  // `gpu` takes the stream as `auto`, so that nothing of it is compiled without CUDA. Anything they
  // throw is reported at this op's line.
  using OnGpu = std::function<bool(cuda::Stream)>;
  void run(Cost cost, const std::function<void()>& cpu, const OnGpu& gpu = nullptr);
  template <class F> void run(Cost cost, const std::function<void()>& cpu, F gpu) {
    if constexpr (cuda::kBuilt)
      run(cost, cpu, OnGpu([&](cuda::Stream s) {
            if constexpr (std::is_void_v<decltype(gpu(s))>)
              return gpu(s), true;
            else
              return gpu(s);
          }));
    else
      run(cost, cpu, OnGpu());
  }

  // Appends the closure that computes input gradients; dropped unless the tape records. It is
  // skipped when none of the outputs has a gradient. Capture tensors by value and Params by
  // reference.
  void backward(std::function<void(Op&)> f);

  // Inside a backward closure:
  // The gradient of an output, once; zeros if this one got none.
  Tensor grad(const Tensor& y) { return tape_.take_grad(y).reshape(y.shape()); }
  struct Into {
    Tensor tensor;     // where to write; empty if nobody wants this gradient
    bool add = false;  // add to what is there, else overwrite
    explicit operator bool() const { return bool(tensor); }
  };
  Into accumulate(const Tensor& x);  // same shape and dtype as x
  Into accumulate(Param& p);         // the main gradient
  // A gradient that exists already: kept without a copy if it is the first.
  void give(const Tensor& x, Tensor grad);
  void defer(Param& p, const Tensor& x, const Tensor& dy, const Tensor& offsets = {});

  Context& context() const { return tape_.context; }
  // Whether the CUDA kernels run, or are planned for: fp64 stays on the host.
  bool on_gpu() const {
    const Context& c = tape_.context;
    return (c.device == Device::meta ? c.planned : c.device) == Device::cuda &&
           c.dtype != DType::f64;
  }
  bool recording() const { return tape_.record_; }
  bool wants(const Tensor& x) const { return tape_.wants(x); }
  // "qwen3_moe.cpp:142: rms_norm backward: MESSAGE; x bf16[4, 8] cpu"
  std::string text(const std::string& message) const;

 private:
  friend class Tape;
  void check_written() const;

  Tape& tape_;
  const char* name_;
  Loc at_;
  bool backward_;
  std::vector<Tape::Arg> args_;  // without their memory
  std::vector<Tensor> written_;  // outputs, and gradients in backward: for check_finite
  std::vector<uint64_t> outputs_;
  const Op* previous_;
};

// What was running, for the crash handler; "" if nothing was.
const char* current_op_text() noexcept;

}  // namespace pith
