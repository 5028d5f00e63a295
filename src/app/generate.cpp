// pith generate: text from a model, with a KV cache.

#include "app/commands.h"
#include "core/rng.h"

namespace pith {

static int32_t sample(const std::vector<float>& logits, const GenerateOptions& o, int64_t step) {
  const auto best = std::ranges::max_element(logits);
  if (!std::isfinite(*best)) fail("the logits of token {} are not finite", step);
  if (o.temperature <= 0) return int32_t(best - logits.begin());
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::greater(), [&](int32_t id) { return logits[id]; });
  std::vector<double> p(order.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i)
    total += p[i] = std::exp((logits[order[i]] - *best) / o.temperature);
  // Nucleus (Holtzman et al. 2020): the smallest head whose probability reaches top_p.
  double kept = 0;
  size_t n = 0;
  while (n < p.size() && (n == 0 || kept < o.top_p * total)) kept += p[n++];
  double left = uniform(stream_key(uint64_t(o.seed), "generate"), uint64_t(step)) * kept;
  for (size_t i = 0; i < n; ++i)
    if ((left -= p[i]) < 0) return order[i];
  return order[n - 1];
}

void run_generate(const GenerateOptions& o) {
  if (o.tokens < 0 || o.temperature < 0 || !(o.top_p > 0 && o.top_p <= 1))
    fail_input("--tokens and --temperature must not be negative and --top-p must lie in (0, 1]");
  const Tokenizer tokenizer(o.model);
  std::vector<int32_t> ids = tokenizer.encode(o.prompt);
  if (ids.empty()) fail_input("--prompt is empty");
  const int64_t capacity = int64_t(ids.size()) + o.tokens;
  Session session(o, capacity, 1, false);
  const Model::Size& size = session.model->size;
  std::vector<KvCache> caches(static_cast<size_t>(size.layers));
  for (KvCache& c : caches)
    c.kv = Tensor({capacity, size.kv_width}, session.context.dtype, session.context.device,
                  "kv_cache");

  for (int64_t seen = 0; int64_t(ids.size()) < capacity;) {
    const std::vector<int32_t> unseen(ids.begin() + seen, ids.end());
    MicroBatch mb{batch_of(unseen, unseen, 1, seen)};  // nobody reads the labels
    mb.caches = &caches;
    const Tensor logits = session.pipeline.logits(mb);
    seen = int64_t(ids.size());
    const Tensor last = logits.row_range(logits.rows() - 1, logits.rows());
    const int32_t next = sample(last.to_vector<float>(), o, seen);
    if (next == tokenizer.eos_id()) break;
    ids.push_back(next);
  }
  fmt::print("{}\n", tokenizer.decode(ids));
}

}  // namespace pith
