#include "engine/checkpoint.h"

#include <fcntl.h>
#include <fnmatch.h>
#include <omp.h>

#include "core/safetensors.h"
#include "data/tokenizer.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kChunk = 1 << 22;  // elements converted at a time, so that it needs little memory

void remove_tree(const std::string& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

// A tensor of a checkpoint: a range of a parameter, master or moment.
struct Part {
  std::string name;
  Shape shape;
  Tensor data, rest;  // flat; with a rest the two are a master (core/param.h)

  DType dtype() const { return rest ? DType::f32 : data.dtype(); }
  // f(first element, Part of at most kChunk)
  template <class F> void by_chunk(F f) const {
    for (int64_t begin = 0, n = data.numel(); begin < n; begin += kChunk) {
      const int64_t end = std::min(n, begin + kChunk);
      f(begin, Part{name, shape, data.row_range(begin, end), rest.row_range(begin, end)});
    }
  }
};
struct Parts {
  std::vector<Part> model, trainer;
};

void add_pieces(std::vector<Part>& parts, const std::string& prefix,
                const std::vector<Piece>& pieces, const Tensor& whole, const Tensor& rest = {}) {
  for (const Piece& p : pieces) {
    const int64_t end = p.begin + p.shape.numel();
    parts.push_back(
        {prefix + p.name, p.shape, whole.elements(p.begin, end), rest.elements(p.begin, end)});
  }
}

// All that a checkpoint holds: the tensors themselves, or copies.
Parts collect(const ParamSet& params, const Optimizer& optimizer, bool copy) {
  const auto keep = [&](const Tensor& t) { return copy && t ? t.clone("checkpoint_copy") : t; };
  Parts parts;
  for (const auto& p : params) {
    const Tensor value = keep(p->value), rest = keep(p->rest);
    if (p->exported) add_pieces(parts.model, "", p->pieces, value);
    add_pieces(parts.trainer, p->trained() ? "master." : "state.", p->pieces, value, rest);
  }
  for (const auto& s : optimizer.states())
    add_pieces(parts.trainer, s.kind + ".", s.param->pieces, keep(s.tensor));
  return parts;
}

// Fills the parts from a file that must hold them in their shapes, and nothing else that no pattern
// of `ignored` matches. Everything is checked before anything is read.
void read_parts(const Safetensors& file, std::vector<Part>& parts,
                const std::vector<std::string>& ignored) {
  const auto text_of = [](auto dims) { return Value::array({dims.begin(), dims.end()}).json(); };
  std::set<std::string> wanted;
  for (const Part& part : parts) {
    const std::vector<int64_t>& shape = file.entry(part.name).shape;
    if (!std::ranges::equal(shape, part.shape.dims()))
      fail_input("{}: {} has shape {}, this model needs {}", file.path(), part.name, text_of(shape),
                 text_of(part.shape.dims()));
    wanted.insert(part.name);
  }
  for (const auto& [name, entry] : file.entries()) {
    const auto matches = [&name = name](auto& pattern) {
      return fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
    };
    if (!wanted.contains(name) && std::ranges::none_of(ignored, matches))
      fail_input("{}: tensor {} does not belong to this model with these settings", file.path(),
                 printable(name));
  }
  for (const Part& part : parts)
    part.by_chunk([&](int64_t begin, const Part& chunk) {
      Tensor wide = chunk.rest ? Tensor(chunk.data.shape(), DType::f32, chunk.data.device(), "read")
                               : chunk.data;
      file.read(part.name, begin, wide);
      if (chunk.rest) split_master(wide, chunk.data, chunk.rest);
    });
}

// The first of the forms a parameter can be read from whose tensors are all there.
const std::vector<Piece>& source_form(const Param& p, const Safetensors& file) {
  std::string missing;
  for (size_t i = 0; i <= p.also_read.size(); ++i) {
    const std::vector<Piece>& form = i == 0 ? p.pieces : p.also_read[i - 1];
    const auto absent = [&](const Piece& piece) { return !file.has(piece.name); };
    const auto gap = std::ranges::find_if(form, absent);
    if (gap == form.end()) return form;
    missing += i == 0 ? gap->name : " (or, in another form, " + gap->name + ")";
  }
  fail_input("{}: no tensor {}", file.path(), missing);
}

using Files = std::map<std::string, std::string>;  // contents by name in the checkpoint

// The files that are the same in every checkpoint of a run.
Files fixed_files(const RunConfig& run, const Model& model) {
  Value config = model.hf_config(), generation = Value::object({{"_from_model_config", true}});
  for (const char* key : {"dtype", "torch_dtype"}) config[key] = "bfloat16";
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (const Value* id = config.find(key); id && !id->is_null()) generation[key] = *id;
  Files files = {{"config.json", config.json(2) + "\n"},
                 {"generation_config.json", generation.json(2) + "\n"},
                 {"trainer/run.toml", run.to_toml()}};
  if (run.tokenizer.empty()) return files;
  const Tokenizer tokenizer(run.tokenizer);
  if (tokenizer.vocab_size() > model.size.vocabulary)
    fail_input("{} has {} tokens, the model's vocab_size is {}", run.tokenizer,
               tokenizer.vocab_size(), model.size.vocabulary);
  // The least that lets AutoTokenizer open the directory.
  Value minimal = Value::object({{"tokenizer_class", "PreTrainedTokenizerFast"},
                                 {"model_max_length", run.data.sequence_length}});
  if (const auto eos = tokenizer.eos_id()) minimal["eos_token"] = tokenizer.decode({&*eos, 1});
  files["tokenizer_config.json"] = minimal.json(2) + "\n";
  files["tokenizer.json"] = read_file(tokenizer.file());
  for (const char* name : {"special_tokens_map.json", "vocab.json", "merges.txt",
                           "chat_template.jinja", "tokenizer_config.json"})
    if (const fs::path beside = fs::path(tokenizer.file()).parent_path() / name; exists(beside))
      files[name] = read_file(beside);
  return files;
}

// What decides how sums are ordered: the instructions this program is built for, and those that
// libraries choose from at run time.
std::string instruction_set() {
#ifdef __AVX512F__
  const char* built = "avx512f";
#else
  const char* built = "avx2";
#endif
  const bool wide = __builtin_cpu_supports("avx512f"), brain = __builtin_cpu_supports("avx512bf16");
  return fmt::format("{} on {}", built, brain ? "avx512bf16" : wide ? "avx512f" : "avx2");
}

// trainer/state.json. The order of the data follows from seed and position (in sequences) alone;
// the format of trainer/ is counted up when an older program could not read it.
Value state_of(const RunConfig& run, int64_t step) {
  return Value::object({{"format", 1},
                        {"version", "0.1.0"},
                        {"step", step},
                        {"data_position", step * run.train.global_batch_size},
                        {"seed", run.train.seed},
                        {"optimizer", run.optimizer.name},
                        {"dtype", run.dtype},
                        {"threads", omp_get_max_threads()},
                        {"isa", instruction_set()}});
}

void write_parts(const std::string& directory, const char* stem, const std::vector<Part>& parts,
                 bool as_bf16) {
  SafetensorsWriter file(directory, stem);
  for (const Part& part : parts)
    file.add(part.name, as_bf16 ? DType::bf16 : part.dtype(),
             {part.shape.dims().begin(), part.shape.dims().end()});
  file.create();
  for (const Part& part : parts)
    part.by_chunk([&](int64_t begin, const Part& chunk) {
      file.write(part.name, begin, join_master(chunk.data, chunk.rest));
    });
  file.close();
}

std::string step_name(int64_t step) { return fmt::format("step-{:08}", step); }

// A directory is only called step-N when it is complete; this tells it from what others put there.
bool is_complete(const std::string& directory) { return exists(directory + "/trainer/state.json"); }

std::set<int64_t> complete_steps(const std::string& out) {
  std::set<int64_t> steps;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(out, none)) {
    const std::string name = entry.path().filename();
    const int64_t step = name.starts_with("step-") ? std::atoll(name.c_str() + 5) : -1;
    if (step >= 0 && name == step_name(step) && is_complete(entry.path())) steps.insert(step);
  }
  return steps;
}

std::string temporary(const std::string& out, int64_t step) {
  return fmt::format("{}/.{}.tmp-{}", out, step_name(step), ::getpid());
}

// A checkpoint of the same number, which a crash or an earlier run left, changes places with the
// new one, so that there is one of that name at any moment; where the file system cannot do that it
// is removed first.
void install(const std::string& directory, const std::string& out, int64_t step) {
  const std::string place = out + "/" + step_name(step), link = out + "/latest";
  const char *from = directory.c_str(), *to = place.c_str();
  if (::rename(from, to) != 0 && ::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) != 0) {
    remove_tree(place);
    fs::rename(directory, place);
  }
  fsync_directory(out);
  fs::remove(link + ".tmp");
  fs::create_symlink(step_name(step), link + ".tmp");
  fs::rename(link + ".tmp", link);
  fsync_directory(out);
}

// Only what is older than `newest`, which `latest` points to.
void prune(const std::string& out, int64_t newest, int64_t keep) {
  auto steps = complete_steps(out);
  steps.erase(steps.upper_bound(newest), steps.end());
  for (; int64_t(steps.size()) > keep; steps.erase(steps.begin())) {
    const std::string place = out + "/" + step_name(*steps.begin()),
                      hidden = temporary(out, *steps.begin());
    // What is half removed must not look complete, so it loses its name first.
    if (::rename(place.c_str(), hidden.c_str()) != 0)
      warn_once(fmt::format("{} cannot be removed: {}", place, std::strerror(errno)));
    remove_tree(hidden);
  }
}

void write_checkpoint(const RunConfig& run, int64_t step, const Files& files, const Parts& parts) {
  const std::string directory = temporary(run.out, step);
  try {
    fs::create_directory(directory);
    fs::create_directory(directory + "/trainer");
    for (const auto& [name, text] : files) write_file_atomic(directory + "/" + name, text);
    write_parts(directory + "/trainer", "trainer", parts.trainer, false);
    write_parts(directory, "model", parts.model, true);
    install(directory, run.out, step);
  } catch (const std::exception& e) {
    remove_tree(directory);
    fail_input("the checkpoint of step {} was not written: {}", step, e.what());
  }
  remove_tree(directory);  // the one that changed places
  prune(run.out, step, run.checkpoint.keep_last);
}

}  // namespace

bool has_weights(const std::string& path) {
  return exists(path + "/model.safetensors") || exists(path + "/model.safetensors.index.json");
}

Value read_model_config(const std::string& path) {
  const std::string file = exists(path + "/.") ? path + "/config.json" : path;
  return parse_json(read_file(file), file);
}

void load_weights(ParamSet& params, const std::string& directory,
                  const std::vector<std::string>& ignored) {
  const Safetensors file(directory);
  std::vector<Part> parts;
  for (const auto& p : params)
    if (p->trained() || p->exported)
      add_pieces(parts, "", source_form(*p, file), p->value, p->rest);
  read_parts(file, parts, ignored);
}

Checkpoints::Checkpoints(const RunConfig& run, Model& model, Optimizer& optimizer)
    : run_(run), model_(model), optimizer_(optimizer), files_(fixed_files(run, model)) {
  for (const auto& p : model.params) {
    if (p->trained() || p->exported || !p->name.ends_with("e_score_correction_bias")) continue;
    if (run.balance.bias_export == "refuse")
      fail_input(
          "balance.bias_update_rate = {}: Hugging Face has no tensor for the router bias in this "
          "architecture ({}), exported models would route without it; set "
          "balance.bias_export=\"drop\" to accept that",
          run.balance.bias_update_rate, p->name);
    warn_once("the router bias is kept in trainer/ only: exported models route without it");
  }
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(run.out, none)) {
    const std::string name = entry.path().filename();
    if (fnmatch(".step-*.tmp-*", name.c_str(), 0) == 0 || name == "latest.tmp")
      remove_tree(entry.path());
  }
}

void Checkpoints::finish() {
  if (pending_.valid()) pending_.get();
}

void Checkpoints::save(int64_t step) {
  finish();
  const bool background = run_.checkpoint.background;
  Files files = files_;
  files["trainer/state.json"] = state_of(run_, step).json(2) + "\n";
  // The parts are freed when they are written, not when somebody asks for the result.
  auto write = [this, step, files = std::move(files),
                parts = collect(model_.params, optimizer_, background)]() mutable {
    write_checkpoint(run_, step, files, std::exchange(parts, {}));
  };
  if (!background) return write();
  pending_ = std::async(std::launch::async, std::move(write));
}

std::string Checkpoints::latest(const std::string& out) {
  std::error_code error;
  const fs::path target = fs::path(out) / fs::read_symlink(out + "/latest", error);
  if (!error && is_complete(target)) return target;
  const auto steps = complete_steps(out);
  return steps.empty() ? "" : out + "/" + step_name(*steps.rbegin());
}

int64_t Checkpoints::load(const std::string& directory) {
  const std::string state_file = directory + "/trainer/state.json";
  const Value state = parse_json(read_file(state_file), state_file), now = state_of(run_, 0);
  for (const std::string key : {"format", "optimizer", "seed", "dtype", "threads", "isa"}) {
    const std::string was = state.at(key).json(), is = now.at(key).json();
    if (was == is) continue;
    const std::string text = fmt::format("{}: {} was {}, now it is {}", directory, key, was, is);
    if (key == "format" || key == "optimizer") fail_input("{}", text);
    warn_once(text + ": the continuation will not be bit-identical");
  }
  const int64_t step = state.at("step").as_int(), position = state.at("data_position").as_int();
  if (position != step * run_.train.global_batch_size)
    warn_once(fmt::format(
        "{}: train.global_batch_size has changed: the data continues at sequence {}, not at {}",
        directory, step * run_.train.global_batch_size, position));
  const Value config = read_model_config(directory), own = parse_json(files_.at("config.json"), "");
  for (const auto& [key, value] : own.members()) {
    const Value* there = config.find(key);
    if (there && there->json() != value.json() && key != "transformers_version")
      fail_input("{}: another model: {} was {}, now it is {}", config.where(), key, there->json(),
                 value.json());
  }
  Parts parts = collect(model_.params, optimizer_, false);
  read_parts(Safetensors(directory + "/trainer", "trainer"), parts.trainer, {});
  return step;
}

}  // namespace pith
