#include "engine/pipeline.h"

#include <deque>

#include "ops/ops.h"

namespace pith {

// The batch with every tensor of it changed by f.
template <class F> static Batch with_tensors(Batch b, F f) {
  for (Tensor* t : {&b.tokens, &b.labels, &b.positions, &b.document_start}) *t = f(*t);
  return b;
}

static Batch on_device(const Batch& b, Device device) {
  return with_tensors(b, [=](const Tensor& t) { return t.on(device); });
}

// With one expert rank every row is already where its experts are.
static Received stage2_dispatch(const Stage1& s) { return {s.rows, s.ids, s.weights}; }
static Tensor stage4_combine(const Tensor& sums) { return sums; }

// The addition itself is left to the norm that opens the next stage.
static Carry stage5_add(const Stage1& s, const Tensor& combined, const Carry& in) {
  return {s.residual, combined ? combined : s.delta, in.extra};
}

static void leaf(Tape& t, const Carry& c) {
  t.leaf(c.hidden);
  t.leaf(c.delta);
  for (const Tensor& e : c.extra) t.leaf(e);
}

static Carry take_grad(Tape& t, const Carry& c) {
  Carry g{t.take_grad(c.hidden), t.take_grad(c.delta), {}};
  for (const Tensor& e : c.extra) g.extra.push_back(t.take_grad(e));
  return g;
}

struct Pipeline::LayerRecord {
  Tape stage1, stage3;
  Carry in;
  Stage1 s1 = {};
  Received received = {};
  Tensor sums = {};  // stage 3's result
};

struct Pipeline::Record {
  Tape embed, head;
  MicroBatch mb;
  Carry embedded = {}, last = {};
  std::deque<LayerRecord> layers = {};
  Tensor loss = {};
};

Pipeline::Pipeline(Model& model, Context& context, const TrainConfig& train)
    : model_(model), context_(context), train_(train), one_(wide_scalar(context, 1)) {}

double StepSums::loss() const {
  if (losses.device() == Device::meta) return 0;
  const auto each = losses.to_vector<double>();
  return std::accumulate(each.begin(), each.end(), 0.0);
}

void Pipeline::forward_layer(Record& r, int64_t layer) {
  LayerRecord& l = r.layers.back();
  const bool again = context_.recompute.stage1 && l.stage1.recording();
  Tape once(context_, false);
  leaf(l.stage1, l.in);
  context_.enter("stage1_attention_router", layer);
  l.s1 = model_.stage1_attention_router(again ? once : l.stage1, layer, l.in, r.mb);
  Tensor combined;
  if (l.s1.rows) {
    l.received = stage2_dispatch(l.s1);
    l.stage3.leaf(l.received.rows);
    l.stage3.leaf(l.received.weights);
    context_.enter("stage3_experts", layer);
    l.sums = model_.stage3_experts(l.stage3, layer, l.received);
    combined = stage4_combine(l.sums);
  }
  r.last = stage5_add(l.s1, combined, l.in);
  l.stage1.evict();
  l.stage3.evict();
}

// Stage 1 once more, this time recorded, with the experts that were chosen; what was counted is not
// counted again.
void Pipeline::repeat_stage1(Record& r, int64_t layer) {
  LayerRecord& l = r.layers[layer];
  MicroBatch mb = r.mb;
  mb.statistics = nullptr;
  mb.trace = nullptr;
  mb.replay.assign(size_t(model_.size.moe_layers), l.s1.ids);
  l.s1 = {};
  l.s1 = model_.stage1_attention_router(l.stage1, layer, l.in, mb);
}

Pipeline::Record Pipeline::forward(const MicroBatch& mb, WgradQueue* queue) {
  const auto tape = [&] { return Tape(context_, queue != nullptr, queue); };
  Record r{tape(), tape(), mb};
  static_cast<Batch&>(r.mb) = on_device(mb, context_.device);
  for (Tensor& ids : r.mb.replay) ids = ids.on(context_.device);
  context_.enter("embed");
  r.embedded = r.last = model_.embed(r.embed, r.mb);
  for (int64_t layer = 0; layer < model_.size.layers; ++layer) {
    if (!queue) r.layers.clear();
    r.layers.push_back({tape(), tape(), r.last});
    forward_layer(r, layer);
  }
  leaf(r.head, r.last);
  context_.enter("head");
  return r;
}

Tensor Pipeline::logits(const MicroBatch& mb) {
  Record r = forward(mb, nullptr);
  return model_.logits(r.head, r.last);
}

Carry Pipeline::backward_layer(Record& r, int64_t layer, Carry d_out) {
  LayerRecord& l = r.layers[layer];
  const bool moe = bool(l.s1.rows);
  if (moe) {
    context_.enter("stage3_experts", layer);
    l.stage3.set_grad(std::exchange(l.sums, {}), std::exchange(d_out.delta, {}));
    l.stage3.backward();
  }
  context_.enter("stage1_attention_router", layer);
  if (context_.recompute.stage1) repeat_stage1(r, layer);
  l.stage1.set_grad(l.s1.residual, d_out.hidden);
  for (size_t i = 0; i < l.in.extra.size(); ++i) l.stage1.set_grad(l.in.extra[i], d_out.extra[i]);
  if (!moe) l.stage1.set_grad(l.s1.delta, d_out.delta);
  d_out = {};
  if (moe) {
    l.stage1.set_grad(l.s1.rows, l.stage3.take_grad(l.received.rows));
    l.stage1.set_grad(l.s1.weights, l.stage3.take_grad(l.received.weights));
  }
  l.s1 = {};
  l.received = {};
  l.stage1.backward();
  return take_grad(l.stage1, l.in);
}

void Pipeline::backward(Record& r) {
  r.head.set_grad(r.loss, one_);
  r.head.backward();
  Carry d = take_grad(r.head, r.last);
  r.last = {};
  for (int64_t layer = model_.size.layers - 1; layer >= 0; --layer) {
    d = backward_layer(r, layer, std::move(d));
    r.layers.pop_back();
    if (train_.wgrad_micro_batches == 1) flush();
  }
  context_.enter("embed");
  r.embed.set_grad(r.embedded.hidden, d.hidden);
  r.embed.backward();
}

void Pipeline::flush() {
  std::vector<WgradQueue*> queues;
  for (WgradQueue& q : queues_) queues.push_back(&q);
  context_.enter("wgrad", context_.layer);
  flush_wgrads(context_, queues);
}

StepSums Pipeline::run_batch(const Batch& batch, bool train, bool trace,
                             const std::vector<Tensor>& replay) {
  const int64_t size = train_.micro_batch_size, micro_batches = (batch.batch + size - 1) / size,
                tokens = size * batch.sequence;
  StepSums sums{Tensor({micro_batches}, one_.dtype(), context_.device, "losses"),
                double(batch.label_count)};
  const Batch there = on_device(batch, context_.device);  // at once: each upload waits for the GPU
  if (train) model_.params.begin_step();
  queues_.assign(size_t(std::min(train_.wgrad_micro_batches, batch.batch)), {});
  if (trace) sums.trace.resize(size_t(micro_batches));
  for (int64_t m = 0; m < micro_batches; ++m) {
    const int64_t slot = m % train_.wgrad_micro_batches,
                  end = std::min(batch.batch, (m + 1) * size);
    const auto rows = [&](const Tensor& t) {
      return t.row_range(m * tokens, end * batch.sequence);
    };
    MicroBatch mb{with_tensors(there, rows), sums.labels, double(batch.batch * batch.sequence),
                  double(micro_batches), train ? &sums.statistics : nullptr};
    mb.batch = end - m * size;
    if (trace) mb.trace = &sums.trace[size_t(m)];
    for (const Tensor& ids : replay) mb.replay.push_back(rows(ids));
    Record r = forward(mb, train ? &queues_[size_t(slot)] : nullptr);
    r.loss = model_.head_loss(r.head, r.last, r.mb);
    sums.losses.row_range(m, m + 1).copy_from(r.loss);
    if (!train) continue;
    backward(r);
    if (slot == train_.wgrad_micro_batches - 1 || m == micro_batches - 1) flush();
  }
  return sums;
}

}  // namespace pith
