// pith bench: training steps of fixed workloads, and every operator by itself, against what the
// machine reaches in the same run. Times are wall time with the device synchronized at both ends.

#include <omp.h>

#include "app/commands.h"
#include "core/rng.h"
#include "engine/train.h"
#include "ops/ops.h"

namespace pith {
namespace {

struct Sizes {
  int64_t hidden, heads, kv_heads, head_dim, experts, top_k, width, vocabulary;
};
constexpr Sizes kQwen3_30B{2048, 32, 4, 128, 128, 8, 768, 151936};  // Qwen3-30B-A3B
constexpr Sizes kTiny{64, 4, 2, 16, 8, 2, 32, 512};

struct Workload {
  const char* name;
  int64_t layers, sequence, micro_batch, global_batch, wgrad_micro_batches;
  Sizes sizes = kQwen3_30B;
};
constexpr Workload kWorkloads[] = {{"W1", 8, 2048, 1, 32, 4},      {"W2", 8, 4096, 1, 16, 4},
                                   {"W3", 8, 4096, 2, 32, 3},      {"W4", 6, 4096, 1, 16, 4},
                                   {"W5", 6, 4096, 2, 32, 2},      {"W6", 6, 4096, 4, 64, 2},
                                   {"tiny", 2, 64, 2, 8, 2, kTiny}};

double now(Device device) {
  if (device == Device::cuda) cuda::synchronize();
  return omp_get_wtime();
}

double median(std::vector<double> v) {
  std::ranges::sort(v);
  return (v[v.size() / 2] + v[(v.size() - 1) / 2]) / 2;
}

std::string model_config(const Workload& w) {
  const Sizes& s = w.sizes;
  return fmt::format(
      R"({{"model_type": "qwen3_moe", "num_hidden_layers": {}, "hidden_size": {},
"num_attention_heads": {}, "num_key_value_heads": {}, "head_dim": {}, "num_experts": {},
"num_experts_per_tok": {}, "moe_intermediate_size": {}, "vocab_size": {},
"norm_topk_prob": true, "rms_norm_eps": 1e-6, "rope_theta": 1e6}})",
      w.layers, s.hidden, s.heads, s.kv_heads, s.head_dim, s.experts, s.top_k, s.width,
      s.vocabulary);
}

// One document of ids drawn uniformly, enough for every step.
void write_random_corpus(const std::string& prefix, const RunConfig& run) {
  const int64_t vocabulary = read_model_config(run.model).at("vocab_size").as_int();
  const int64_t tokens =
      run.train.steps * run.train.global_batch_size * run.data.sequence_length + 1;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < tokens; ++i)
    ids.push_back(int32_t(uniform(uint64_t(run.train.seed), uint64_t(i)) * double(vocabulary)));
  CorpusWriter writer(prefix, vocabulary);
  writer.add(ids, std::vector{int32_t(tokens)});
  writer.finish();
}

// The workload as a run in `directory`, with the overrides of the command line.
RunConfig make_run(const BenchOptions& o, const std::string& directory) {
  const auto w = std::ranges::find(kWorkloads, o.workload, &Workload::name);
  if (w == std::end(kWorkloads))
    fail_input("--workload {}: expected W1, W2, W3, W4, W5, W6 or tiny", printable(o.workload));
  RunConfig run;
  run.model = o.model.empty() ? directory + "/config.json" : o.model;
  run.out = directory;
  run.device = o.device;
  run.data.train = {{directory + "/random", 1.0}};
  run.data.sequence_length = w->sequence;
  run.train.steps = o.warmup + o.steps + 1;
  run.train.global_batch_size = w->global_batch;
  run.train.micro_batch_size = w->micro_batch;
  run.train.wgrad_micro_batches = w->wgrad_micro_batches;
  run.balance.force = o.routing == "balanced";
  run.optimizer.schedule = "constant";
  run.balance.loss = "global_batch";
  run.balance.coefficient = 1e-3;
  write_file_atomic(directory + "/config.json", model_config(*w));
  write_file_atomic(directory + "/run.toml", run.to_toml());
  run = load_run_config(directory + "/run.toml", o.overrides);
  write_random_corpus(directory + "/random", run);
  return run;
}

}  // namespace

void bench_train(const BenchOptions& o) {
  const TemporaryDirectory directory;
  const RunConfig run = make_run(o, directory.path);
  const double start = omp_get_wtime();
  const Plan plan = make_plan(run);
  say(stderr, plan.table);
  Trainer trainer{run};
  trainer.start();
  double first_step = 0;
  std::vector<double> seconds;
  StepMetrics m;
  for (int64_t step = 1; step < run.train.steps; ++step) {
    m = trainer.step(step);
    if (step == 1) first_step = omp_get_wtime() - start;
    if (step > o.warmup) seconds.push_back(m.seconds);
  }
  const double peak_gb = m.peak_gb;
  m = trainer.step(run.train.steps, o.trace.empty() ? directory.path + "/timeline" : o.trace);

  const double step_seconds = median(seconds), flops = trainer.context.total.flops,
               tokens = double(run.train.global_batch_size * run.data.sequence_length);
  const Value result = Value::object({{"workload", o.workload},
                                      {"routing", run.balance.force ? "balanced" : "real"},
                                      {"device", name_of(trainer.device)},
                                      {"dtype", run.dtype},
                                      {"steps", o.steps},
                                      {"tokens_per_second", tokens / step_seconds},
                                      {"step_seconds", step_seconds},
                                      {"first_step_seconds", first_step},
                                      {"peak_gb", peak_gb},
                                      {"planned_gb", double(plan.peak_bytes) / 1e9},
                                      {"tflops", flops / step_seconds / 1e12},
                                      {"sol", flops / step_seconds / trainer.peak_flops},
                                      {"host_syncs", trainer.host_syncs},
                                      {"loss", m.loss}});
  fmt::print("{}\n", result.json());
  if (!o.json.empty()) write_file_atomic(o.json, result.json() + "\n");
}

namespace {

// Bytes read and written per second by copies that fit no cache, of all threads on the CPU.
double measure_copy(Device device) {
  const bool gpu = device == Device::cuda;
  const int64_t bytes = gpu ? 1 << 30 : 64 << 20, parts = gpu ? 1 : omp_get_max_threads();
  const Tensor from = Tensor::zeros({bytes}, DType::u8, device, "bench");
  Tensor to = from.clone("bench");
  double fastest = HUGE_VAL;
  for (int i = 0; i < 10; ++i) {
    const double begin = now(device);
#pragma omp parallel for if (!gpu)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * bytes / parts, end = (part + 1) * bytes / parts;
      to.row_range(first, end).copy_from(from.row_range(first, end));
    }
    fastest = std::min(fastest, now(device) - begin);
  }
  return 2 * double(bytes) / fastest;
}

using Tensors = std::vector<Tensor>;

struct OpBench {
  Context context;
  std::string filter;
  const bool gpu = context.device == Device::cuda;
  const Sizes s = gpu ? kQwen3_30B : Sizes{256, 8, 2, 32, 16, 4, 128, 4096};
  const int64_t tokens = gpu ? 16384 : 4096;
  const DType wide = master_dtype(context.dtype);
  double peak_flops = measure_peak_flops(context.dtype, context.device);
  double copy_bytes = measure_copy(context.device);
  Value rows = {};

  Tensor random_wide(const Shape& shape) const {
    Tensor out(shape, wide, context.device, "bench");
    fill_normal(out, 1, 0, 1);
    return out;
  }
  Tensor random(const Shape& shape) const { return random_wide(shape).to(context.dtype, "bench"); }
  Tensor integers(int64_t n, const std::function<int64_t(int64_t)>& value) const {
    std::vector<int32_t> v;
    for (int64_t i = 0; i < n; ++i) v.push_back(int32_t(value(i)));
    return Tensor::of<int32_t>({n}, v).on(context.device);
  }
  // In the middle of a step: gradients are added to what is there.
  Param parameter(const Shape& shape) const {
    Param p{.name = "bench", .shape = shape, .value = random(shape)};
    p.grad = Tensor::zeros(shape, wide, context.device, "bench");
    p.grad_written = true;
    return p;
  }

  // f runs the op on the inputs and gives what is differentiated; nothing: it has no backward.
  // What the filter leaves out runs once, for the ops that take what f keeps.
  void time(const std::string& op, const Tensors& inputs, const std::function<Tensors(Tape&)>& f) {
    if (op.find(filter) == op.npos) {
      Tape tape(context, false);
      f(tape);
      return;
    }
    const size_t repeats = gpu ? 10 : 2, rounds = gpu ? 6 : 4;
    const Tensor one = wide_scalar(context, 1);
    Cost cost[2];
    std::vector<double> seconds[2];
    for (size_t round = 0; round < rounds; ++round) {
      std::vector<WgradQueue> queues(repeats);
      std::vector<Tape> tapes;
      const auto measure = [&](int pass, const auto& run) {
        context.total = {};
        const double begin = now(context.device);
        for (size_t i = 0; i < repeats; ++i) run(i);
        const double each = (now(context.device) - begin) / double(repeats);
        if (round > 0) seconds[pass].push_back(each);  // the first warms up
        cost[pass] = {context.total.flops / double(repeats), context.total.bytes / double(repeats)};
      };
      measure(0, [&](size_t i) {
        Tape& tape = tapes.emplace_back(context, true, &queues[i]);
        for (const Tensor& x : inputs) tape.leaf(x);
        for (const Tensor& y : f(tape)) tape.set_grad(y, y.numel() == 1 ? one : y);
      });
      measure(1, [&](size_t i) { tapes[i].backward(); });
    }
    std::string shapes;
    for (const Tensor& x : inputs) shapes += (shapes.empty() ? "" : " ") + x.shape().str();
    for (const int pass : {0, 1}) {
      if (cost[pass].bytes == 0) continue;
      const char* name = pass == 0 ? "forward" : "backward";
      const double each = median(seconds[pass]), flops = cost[pass].flops / each,
                   bytes = cost[pass].bytes / each,
                   share = std::max(flops / peak_flops, bytes / copy_bytes);
      fmt::print("{:<32} {:<30} {:<8} {:>11.1f} {:>9.2f} {:>7.3f} {:>6.1f}%\n", op, shapes, name,
                 each * 1e6, flops / 1e12, bytes / 1e12, 100 * share);
      rows.push_back(Value::object({{"op", op},
                                    {"shapes", shapes},
                                    {"pass", name},
                                    {"microseconds", each * 1e6},
                                    {"tflops", flops / 1e12},
                                    {"tbps", bytes / 1e12},
                                    {"share", share}}));
    }
  }

  // A linear layer, or with a weight [E, N, K] that of every expert, for several numbers of rows.
  void time_linear(const std::string& op, const Shape& shape) {
    Param w = parameter(shape);
    const bool grouped = shape.rank() == 3;
    const int64_t experts = grouped ? shape[0] : 1, most = grouped ? tokens / 32 : tokens;
    for (int64_t count = most / 4; count <= most; count *= grouped ? 2 : 4) {
      const Tensor x = random({experts * count, shape[shape.rank() - 1]}),
                   dy = random({experts * count, shape[shape.rank() - 2]}),
                   ends = integers(experts + 1, [&](int64_t e) { return e * count; }),
                   offsets = grouped ? ends : Tensor();
      time(op, {x}, [&](Tape& t) {
        return Tensors{grouped ? grouped_linear(t, x, w, offsets) : linear(t, x, w)};
      });
      for (const size_t records : {1, 2, 4, 8})
        time(fmt::format("{} wgrad x{}", op, records), {x, dy}, [&](Tape&) {
          WgradQueue queue(records, {&w, x, dy, offsets, Loc::current()});
          WgradQueue* queues[] = {&queue};
          flush_wgrads(context, queues);
          return Tensors();
        });
    }
  }

  void time_attention(int64_t sequence) {
    const AttentionShape shape{tokens / sequence, sequence, s.heads, s.kv_heads, s.head_dim};
    const Tensor qkv = random({tokens, shape.width()});
    time(fmt::format("attention S {}", sequence), {qkv}, [&](Tape& t) {
      return Tensors{attention(t, qkv, shape, 1 / std::sqrt(float(s.head_dim)))};
    });
    Param q_norm = parameter({s.head_dim}), k_norm = parameter({s.head_dim});
    const Shape table{sequence, s.head_dim / 2};
    const RopeTable rope{random_wide(table), random_wide(table)};
    const Tensor positions = integers(tokens, [&](int64_t i) { return i % sequence; });
    time(fmt::format("qk_norm_rope S {}", sequence), {qkv}, [&](Tape& t) {
      return Tensors{qk_norm_rope(t, qkv, &q_norm, &k_norm, 1e-6f, rope, positions, shape)};
    });
  }

  void time_experts() {
    const Tensor x = random({tokens, s.hidden}), delta = x.clone("bench"),
                 logits = random_wide({tokens, s.experts}),
                 gate_up = random({tokens * s.top_k, 2 * s.width});
    Param norm = parameter({s.hidden});
    Routing r;
    ExpertOrder order;
    Tensor y;
    time("add_rms_norm", {x, delta}, [&](Tape& t) {
      const AddNorm normed = add_rms_norm(t, x, delta, norm, 1e-6f);
      return Tensors{normed.y, normed.sum};
    });
    time("route_top_k", {logits}, [&](Tape& t) {
      r = route_top_k(t, logits, {.top_k = s.top_k, .renormalize = true});
      return Tensors{r.weights, r.scores};
    });
    time("order_by_expert", {r.ids}, [&](Tape& t) {
      order = order_by_expert(t, r.ids, s.experts);
      return Tensors();
    });
    time("gather_rows", {x}, [&](Tape& t) { return Tensors{y = gather_rows(t, x, order)}; });
    time("sum_rows", {y}, [&](Tape& t) { return Tensors{sum_rows(t, y, order)}; });
    time("swiglu", {gate_up, r.weights},
         [&](Tape& t) { return Tensors{swiglu(t, gate_up, r.weights, order)}; });
  }

  void time_rest() {
    Param table = parameter({s.vocabulary, s.hidden});
    const auto id = [&](int64_t i) { return int64_t(uniform(2, uint64_t(i)) * s.vocabulary); };
    const Tensor ids = integers(4 * tokens, id), labels = integers(tokens / 4, id),
                 x = random({tokens / 4, s.hidden});
    time("embedding", {ids}, [&](Tape& t) { return Tensors{embedding(t, ids, table)}; });
    time("head_loss", {x}, [&](Tape& t) { return Tensors{head_loss(t, x, table, labels).sum}; });

    const Shape shape{gpu ? 1 << 26 : 1 << 24};
    const Tensor grad = random_wide(shape), m = grad.clone("bench"), v = grad.clone("bench"),
                 value = grad.to(context.dtype, "bench"),
                 zeros = Tensor::zeros(shape, DType::u16, context.device, "bench"),
                 rest = context.dtype == DType::bf16 ? zeros : Tensor();
    Tensor squares;
    time("sum_of_squares", {grad}, [&](Tape& t) {
      squares = sum_of_squares(t, {&grad, 1});
      return Tensors();
    });
    Tape tape(context, false);
    const Tensor norm = clip_by_norm(tape, squares, 1, 1);
    time("adamw", {grad}, [&](Tape& t) {
      adamw_update(t, {1e-4, 0.9, 0.95, 1e-8, 0.1, 1}, norm, grad, m, v, value, rest);
      return Tensors();
    });
  }
};

}  // namespace

void bench_ops(const BenchOptions& o) {
  OpBench b{.context = {.device = parse_device(o.device), .dtype = parse_dtype(o.dtype)},
            .filter = o.filter};
  fmt::print("{}, {}: matrix product {:.2f} TFLOP/s, copy {:.3f} TB/s\n", name_of(b.context.device),
             o.dtype, b.peak_flops / 1e12, b.copy_bytes / 1e12);
  fmt::print("{:<32} {:<30} {:<8} {:>11} {:>9} {:>7} {:>7}\n", "op", "inputs", "pass", "us",
             "TFLOP/s", "TB/s", "share");
  const Sizes& s = b.s;
  const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  b.time_linear("linear qkv", {q + 2 * kv, s.hidden});
  b.time_linear("linear o", {s.hidden, q});
  b.time_linear("grouped_linear gate_up", {s.experts, 2 * s.width, s.hidden});
  b.time_linear("grouped_linear down", {s.experts, s.hidden, s.width});
  for (const int64_t parts : {8, 4, 2}) b.time_attention(b.tokens / parts);
  b.time_experts();
  b.time_rest();
  if (b.rows.is_null()) fail_input("--filter {}: no operator has this in its name", o.filter);
  const Value result = Value::object({{"device", name_of(b.context.device)},
                                      {"dtype", o.dtype},
                                      {"peak_tflops", b.peak_flops / 1e12},
                                      {"copy_tbps", b.copy_bytes / 1e12},
                                      {"ops", b.rows}});
  if (!o.json.empty()) write_file_atomic(o.json, result.json(1) + "\n");
}

}  // namespace pith
