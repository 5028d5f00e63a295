// pith bench: training steps of fixed workloads, and every operator by itself, against what the
// machine reaches in the same run. Times are wall time with the device synchronized at both ends.

#include <omp.h>

#include "app/commands.h"
#include "core/memory.h"
#include "core/rng.h"
#include "engine/checkpoint.h"
#include "engine/metrics.h"
#include "engine/plan.h"
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
constexpr Workload kWorkloads[] = {{"W1", 8, 2048, 1, 32, 8},      {"W2", 8, 4096, 1, 16, 4},
                                   {"W3", 8, 4096, 2, 32, 2},      {"W4", 6, 4096, 1, 16, 4},
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

Value model_config(const Sizes& s, int64_t layers) {
  return Value::object({{"model_type", "qwen3_moe"},
                        {"num_hidden_layers", layers},
                        {"hidden_size", s.hidden},
                        {"num_attention_heads", s.heads},
                        {"num_key_value_heads", s.kv_heads},
                        {"head_dim", s.head_dim},
                        {"num_experts", s.experts},
                        {"num_experts_per_tok", s.top_k},
                        {"moe_intermediate_size", s.width},
                        {"norm_topk_prob", true},
                        {"vocab_size", s.vocabulary},
                        {"rms_norm_eps", 1e-6},
                        {"rope_theta", 1e6}});
}

// The workload as a run file in `directory`, with the overrides of the command line.
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
  run.train.force_balance = o.routing == "balanced";
  run.optimizer.schedule = "constant";
  run.balance.loss = "global_batch";
  run.balance.coefficient = 1e-3;
  write_file_atomic(directory + "/config.json", model_config(w->sizes, w->layers).json());
  write_file_atomic(directory + "/run.toml", run.to_toml());
  return load_run_config(directory + "/run.toml", o.overrides);
}

// One document of ids drawn uniformly, enough for every step.
void write_random_corpus(const std::string& prefix, const RunConfig& run, int64_t vocabulary) {
  const int64_t tokens =
      run.train.steps * run.train.global_batch_size * run.data.sequence_length + 1;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < tokens; ++i)
    ids.push_back(int32_t(uniform(uint64_t(run.train.seed), uint64_t(i)) * double(vocabulary)));
  CorpusWriter writer(prefix, vocabulary);
  writer.add(ids, std::vector{int32_t(tokens)});
  writer.finish();
}

void write_json(const std::string& path, const Value& value) {
  if (!path.empty()) write_file_atomic(path, value.json(1) + "\n");
}

}  // namespace

void bench_train(const BenchOptions& o) {
  const TemporaryDirectory directory;
  const RunConfig run = make_run(o, directory.path);
  const Value config = read_model_config(run.model);
  write_random_corpus(directory.path + "/random", run, config.at("vocab_size").as_int());
  const double start = omp_get_wtime();
  const Plan plan = make_plan(run);
  say(stderr, plan.table);
  const Device device = parse_device(run.device);
  Context context{.device = device, .dtype = parse_dtype(run.dtype)};
  const auto model = make_model(config, model_options(run, device));
  Optimizer optimizer(model->params, run, context);
  Pipeline pipeline(*model, context, run.train);
  const Loader loader(run.data.train, run.data.sequence_length, model->size.vocabulary,
                      run.data.document_mask, uint64_t(run.train.seed));
  model->params.initialize(uint64_t(run.train.seed), model->size.init_std);
  if (has_weights(run.model)) load_weights(model->params, run.model, model->ignored_when_reading);

  StepSums sums;
  const auto train_step = [&](int64_t step) {
    const double begin = now(device);
    const int64_t rows = run.train.global_batch_size;
    context.total = {};
    sums = pipeline.train_step(loader.batch((step - 1) * rows, rows));
    optimizer.update(learning_rate(run.optimizer, run.train.steps, step), step, sums.labels);
    model->after_step(sums.statistics);
    return now(device) - begin;
  };
  train_step(1);
  const double first_step = now(device) - start;
  for (int64_t step = 2; step <= o.warmup; ++step) train_step(step);
  std::vector<double> seconds;
  for (int64_t step = 1; step <= o.steps; ++step) seconds.push_back(train_step(o.warmup + step));
  const double peak_bytes = double(memory::peak(device));

  std::vector<OpEvent> events;
  cuda::Timeline timeline{.host_syncs = 0};  // of the cpu
  context.timeline = &events;
  if (device == Device::cuda) cuda::start_timeline();
  train_step(run.train.steps);
  if (device == Device::cuda) timeline = cuda::stop_timeline();
  const int64_t host_syncs = timeline.host_syncs;
  if (!o.trace.empty()) say(stderr, write_timeline(o.trace, events, std::move(timeline)));

  const double step_seconds = median(seconds), flops = context.total.flops,
               peak_flops = measure_peak_flops(context.dtype, device),
               tokens = double(run.train.global_batch_size * run.data.sequence_length);
  const Value result = Value::object({{"workload", o.workload},
                                      {"routing", run.train.force_balance ? "balanced" : "real"},
                                      {"device", name_of(device)},
                                      {"dtype", run.dtype},
                                      {"steps", o.steps},
                                      {"tokens_per_second", tokens / step_seconds},
                                      {"step_seconds", step_seconds},
                                      {"first_step_seconds", first_step},
                                      {"peak_gb", peak_bytes / 1e9},
                                      {"planned_gb", double(plan.peak_bytes) / 1e9},
                                      {"tflops", flops / step_seconds / 1e12},
                                      {"peak_tflops", peak_flops / 1e12},
                                      {"sol", flops / peak_flops / step_seconds},
                                      {"host_syncs", host_syncs},
                                      {"loss", sums.loss() / sums.labels}});
  fmt::print("{}\n", result.json());
  write_json(o.json, result);
}

namespace {

// Bytes read and written per second by a copy that fits no cache.
double measure_copy(Device device) {
  const int64_t bytes = device == Device::cuda ? 1 << 30 : 64 << 20, chunk = 1 << 20;
  const Tensor from = Tensor::zeros({bytes}, DType::u8, device, "bench");
  Tensor to = from.clone("bench");
  std::vector<double> seconds;
  for (int i = 0; i < 10; ++i) {
    const double begin = now(device);
    if (device == Device::cuda) {
      to.copy_from(from);
    } else {
#pragma omp parallel for
      for (int64_t at = 0; at < bytes; at += chunk)
        std::memcpy(to.data<uint8_t>() + at, from.data<uint8_t>() + at, size_t(chunk));
    }
    seconds.push_back(now(device) - begin);
  }
  return 2 * double(bytes) / std::ranges::min(seconds);
}

using Tensors = std::vector<Tensor>;

struct OpBench {
  Context context;
  std::string filter;
  const bool gpu = context.device == Device::cuda;
  const DType wide = master_dtype(context.dtype);
  double peak_flops = measure_peak_flops(context.dtype, context.device);
  double copy_bytes = measure_copy(context.device);
  Value rows;

  // Normal numbers, repeated so that large tensors are quick to make.
  Tensor random(const Shape& shape, DType dtype) const {
    Tensor out(shape, dtype, context.device, "bench");
    const int64_t n = out.numel(), block = std::min<int64_t>(n, 1 << 20);
    Tensor values({block}, dtype, Device::cpu, "bench");
    fill_normal(values, 1, 0, 1);
    for (int64_t at = 0; at < n; at += block) {
      const int64_t end = std::min(n, at + block);
      out.reshape({n}).row_range(at, end).copy_from(values.row_range(0, end - at));
    }
    return out;
  }
  Tensor integers(int64_t n, const std::function<int64_t(int64_t)>& value) const {
    std::vector<int32_t> v;
    for (int64_t i = 0; i < n; ++i) v.push_back(int32_t(value(i)));
    return Tensor::of<int32_t>({n}, v).on(context.device);
  }
  // In the middle of a step: gradients are added to what is there.
  Param parameter(const Shape& shape) const {
    Param p{.name = "bench", .shape = shape};
    p.value = random(shape, context.dtype);
    p.grad = Tensor::zeros(shape, wide, context.device, "bench");
    p.grad_written = true;
    return p;
  }

  void add_row(const std::string& op, const std::string& shape, const char* pass, Cost cost,
               double seconds) {
    const double flops = cost.flops / seconds, bytes = cost.bytes / seconds,
                 share = std::max(flops / peak_flops, bytes / copy_bytes);
    fmt::print("{:<20} {:<46} {:<8} {:>11.1f} {:>9.2f} {:>7.3f} {:>6.1f}%\n", op, shape, pass,
               seconds * 1e6, flops / 1e12, bytes / 1e12, 100 * share);
    rows.push_back(Value::object({{"op", op},
                                  {"shape", shape},
                                  {"pass", pass},
                                  {"microseconds", seconds * 1e6},
                                  {"tflops", flops / 1e12},
                                  {"tbps", bytes / 1e12},
                                  {"share", share}}));
  }

  // f runs the op and gives what is differentiated; nothing: it has no backward.
  void time(const std::string& op, const std::string& shape, const Tensors& leaves,
            const std::function<Tensors(Tape&)>& f) {
    if (op.find(filter) == op.npos) return;
    const int repeats = gpu ? 10 : 2, rounds = gpu ? 6 : 4;
    Tensors seeds;
    Cost cost[2];
    std::vector<double> seconds[2];
    for (int round = 0; round < rounds; ++round) {
      std::vector<WgradQueue> queues(static_cast<size_t>(repeats));
      std::vector<Tape> tapes;
      std::vector<Tensors> results;
      const auto measure = [&](int pass, const auto& run) {
        context.total = {};
        const double begin = now(context.device);
        for (int i = 0; i < repeats; ++i) run(size_t(i));
        if (const double end = now(context.device); round > 0)  // the first warms up
          seconds[pass].push_back((end - begin) / repeats);
        cost[pass] = {context.total.flops / repeats, context.total.bytes / repeats};
      };
      measure(0, [&](size_t i) {
        tapes.emplace_back(context, true, &queues[i]);
        for (const Tensor& x : leaves) tapes[i].leaf(x);
        results.push_back(f(tapes[i]));
      });
      for (size_t k = 0; k < results[0].size(); ++k) {
        const Tensor& y = results[0][k];
        if (round == 0)
          seeds.push_back(y.numel() == 1 ? wide_scalar(context, 1) : random(y.shape(), y.dtype()));
        for (size_t i = 0; i < tapes.size(); ++i) tapes[i].set_grad(results[i][k], seeds[k]);
      }
      results.clear();
      measure(1, [&](size_t i) { tapes[i].backward(); });
    }
    add_row(op, shape, "forward", cost[0], median(seconds[0]));
    if (cost[1].bytes > 0) add_row(op, shape, "backward", cost[1], median(seconds[1]));
  }

  void time_linears(const Sizes& s, const std::vector<int64_t>& tokens) {
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    for (const auto& [n, k] : {std::pair(q + 2 * kv, s.hidden), std::pair(s.hidden, q)}) {
      Param w = parameter({n, k});
      for (const int64_t t : tokens) {
        const Tensor x = random({t, k}, context.dtype), dy = random({t, n}, context.dtype);
        const std::string shape = fmt::format("T {} N {} K {}", t, n, k);
        time("linear", shape, {x}, [&](Tape& tape) { return Tensors{linear(tape, x, w)}; });
        time_wgrad("linear_wgrad", shape, {&w, x, dy, {}, Loc::current()});
      }
    }
  }
  void time_wgrad(const char* op, const std::string& shape, const WgradRecord& record,
                  size_t records = 1) {
    time(op, shape, {}, [&](Tape&) {
      WgradQueue queue(records, record);
      WgradQueue* queues[] = {&queue};
      flush_wgrads(context, queues);
      return Tensors();
    });
  }
  void time_grouped(const Sizes& s, const std::vector<int64_t>& rows_per_expert) {
    for (const auto& [n, k] : {std::pair(2 * s.width, s.hidden), std::pair(s.hidden, s.width)}) {
      if (std::string("grouped_linear_wgrad").find(filter) == std::string::npos) return;
      Param w = parameter({s.experts, n, k});
      for (const int64_t r : rows_per_expert) {
        const Tensor x = random({s.experts * r, k}, context.dtype),
                     dy = random({s.experts * r, n}, context.dtype),
                     offsets = integers(s.experts + 1, [&](int64_t e) { return e * r; });
        const std::string shape = fmt::format("{} experts x {} rows N {} K {}", s.experts, r, n, k);
        time("grouped_linear", shape, {x},
             [&](Tape& tape) { return Tensors{grouped_linear(tape, x, w, offsets)}; });
        for (const size_t segments : {1, 2, 4, 8})
          time_wgrad("grouped_linear_wgrad", fmt::format("{} x {}", shape, segments),
                     {&w, x, dy, offsets, Loc::current()}, segments);
      }
    }
  }

  void time_attention(const Sizes& s, int64_t tokens, const std::vector<int64_t>& sequences) {
    for (const int64_t sequence : sequences) {
      const AttentionShape shape{tokens / sequence, sequence, s.heads, s.kv_heads, s.head_dim};
      const Tensor qkv = random({tokens, shape.width()}, context.dtype);
      time("attention", fmt::format("B {} S {}", shape.batch, sequence), {qkv}, [&](Tape& tape) {
        return Tensors{attention(tape, qkv, shape, 1 / std::sqrt(float(s.head_dim)))};
      });
      if (sequence != sequences[0]) continue;
      Param q_norm = parameter({s.head_dim}), k_norm = parameter({s.head_dim});
      const Shape table{sequence, s.head_dim / 2};
      const RopeTable rope{random(table, wide), random(table, wide)};
      const Tensor positions = integers(tokens, [&](int64_t i) { return i % sequence; });
      time("qk_norm_rope", fmt::format("T {}", tokens), {qkv}, [&](Tape& tape) {
        return Tensors{qk_norm_rope(tape, qkv, &q_norm, &k_norm, 1e-6f, rope, positions, shape)};
      });
    }
  }

  // What works row by row, on rows enough to fit no cache.
  void time_rows(const Sizes& s, int64_t tokens) {
    const std::string shape = fmt::format("T {} H {}", tokens, s.hidden),
                      pairs = fmt::format("{} pairs", tokens * s.top_k);
    const Tensor x = random({tokens, s.hidden}, context.dtype), delta = x.clone("bench");
    Param norm = parameter({s.hidden});
    time("add_rms_norm", shape, {x, delta}, [&](Tape& tape) {
      const AddNorm r = add_rms_norm(tape, x, delta, norm, 1e-6f);
      return Tensors{r.y, r.sum};
    });
    Tape tape(context, false);
    const Tensor logits = random({tokens, s.experts}, wide);
    const RouterRule rule{.top_k = s.top_k, .renormalize = true};
    time("route_top_k", fmt::format("T {} E {}", tokens, s.experts), {logits}, [&](Tape& tape) {
      const Routing r = route_top_k(tape, logits, rule);
      return Tensors{r.weights, r.scores};
    });
    const Routing routing = route_top_k(tape, logits, rule);
    const Tensor fractions = expert_fractions(tape, routing.ids, s.experts, 1);
    time("balance_loss", fmt::format("T {} E {}", tokens, s.experts), {routing.scores},
         [&](Tape& tape) { return Tensors{balance_loss(tape, routing.scores, fractions, 1)}; });
    time("order_by_expert", pairs, {}, [&](Tape& tape) {
      order_by_expert(tape, routing.ids, s.experts);
      return Tensors();
    });
    const ExpertOrder order = order_by_expert(tape, routing.ids, s.experts);
    time("gather_rows", pairs, {x},
         [&](Tape& tape) { return Tensors{gather_rows(tape, x, order)}; });
    const Tensor y = gather_rows(tape, x, order);
    time("sum_rows", pairs, {y}, [&](Tape& tape) { return Tensors{sum_rows(tape, y, order)}; });
    const Tensor gate_up = random({tokens * s.top_k, 2 * s.width}, context.dtype);
    time("swiglu", fmt::format("{} I {}", pairs, s.width), {gate_up, routing.weights},
         [&](Tape& tape) { return Tensors{swiglu(tape, gate_up, routing.weights, order)}; });
  }

  void time_ends(const Sizes& s, int64_t embed_tokens, int64_t head_tokens) {
    Param table = parameter({s.vocabulary, s.hidden});
    const auto id = [&](int64_t i) { return int64_t(uniform(2, uint64_t(i)) * s.vocabulary); };
    const Tensor ids = integers(embed_tokens, id), labels = integers(head_tokens, id);
    time("embedding", fmt::format("T {} V {} H {}", embed_tokens, s.vocabulary, s.hidden), {},
         [&](Tape& tape) { return Tensors{embedding(tape, ids, table)}; });
    const Tensor x = random({head_tokens, s.hidden}, context.dtype);
    time("head_loss", fmt::format("T {} V {} H {}", head_tokens, s.vocabulary, s.hidden), {x},
         [&](Tape& tape) { return Tensors{head_loss(tape, x, table, labels).sum}; });
  }

  void time_optimizer(int64_t elements) {
    const Tensor grad = random({elements}, wide), m = grad.clone("bench"), v = grad.clone("bench"),
                 value = grad.to(context.dtype, "bench");
    const Tensor rest = context.dtype == DType::bf16
                            ? Tensor::zeros({elements}, DType::u16, context.device, "bench")
                            : Tensor();
    const std::string shape = fmt::format("{} elements", elements);
    time("sum_of_squares", shape, {}, [&](Tape& tape) {
      sum_of_squares(tape, {&grad, 1});
      return Tensors();
    });
    Tape tape(context, false);
    const Tensor norm = clip_by_norm(tape, sum_of_squares(tape, {&grad, 1}), 1, 1);
    time("adamw", shape, {}, [&](Tape& tape) {
      adamw_update(tape, {1e-4, 0.9, 0.95, 1e-8, 0.1, 1}, norm, grad, m, v, value, rest);
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
  fmt::print("{:<20} {:<46} {:<8} {:>11} {:>9} {:>7} {:>7}\n", "op", "shape", "pass", "us",
             "TFLOP/s", "TB/s", "share");
  const Sizes s = b.gpu ? kQwen3_30B : Sizes{256, 8, 2, 32, 16, 4, 128, 4096};
  const int64_t tokens = b.gpu ? 16384 : 4096;
  b.time_linears(s, {tokens / 4, tokens});
  b.time_grouped(s, {tokens / 128, tokens / 64, tokens / 32});
  b.time_attention(s, tokens, {tokens / 8, tokens / 4, tokens / 2});
  b.time_rows(s, tokens);
  b.time_ends(s, 4 * tokens, tokens / 4);
  b.time_optimizer(b.gpu ? 1 << 26 : 1 << 24);
  if (b.rows.is_null()) fail_input("--filter {}: no operator has this in its name", o.filter);
  write_json(o.json, Value::object({{"device", name_of(b.context.device)},
                                    {"dtype", o.dtype},
                                    {"peak_tflops", b.peak_flops / 1e12},
                                    {"copy_tbps", b.copy_bytes / 1e12},
                                    {"ops", b.rows}}));
}

}  // namespace pith
