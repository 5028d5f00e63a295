#include "engine/checkpoint.h"

#include <fcntl.h>
#include <fnmatch.h>
#include <omp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <future>
#include <map>
#include <set>

#include "core/safetensors.h"
#include "data/tokenizer.h"

namespace pith {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kFormat = 1;  // of trainer/: counted up when an older program could not read it
constexpr const char* kVersion = "0.1.0";
constexpr int64_t kChunk = 1 << 22;  // elements converted at a time, so that it needs little memory

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

void require_ok(int result, const std::string& path) {
  if (result != 0) fail_input("{}: {}", path, std::strerror(errno));
}

void remove_tree(const std::string& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error))
    names.push_back(entry.path().filename());
  return names;
}

// A tensor of a checkpoint: a range of a parameter, master or moment.
struct Part {
  std::string name;
  Shape shape;
  Tensor data;  // flat
};
struct Parts {
  std::vector<Part> model, trainer;
};

void add_pieces(std::vector<Part>& parts, const std::string& prefix,
                const std::vector<Piece>& pieces, const Tensor& whole) {
  const Tensor flat = whole.reshape({whole.numel()});
  for (const Piece& p : pieces)
    parts.push_back({prefix + p.name, p.shape, flat.row_range(p.begin, p.begin + p.shape.numel())});
}

// All that a checkpoint holds: the tensors themselves, or copies.
Parts collect(const ParamSet& params, const Optimizer& optimizer, bool copy) {
  const auto keep = [&](const Tensor& t) { return copy ? t.clone("checkpoint_copy") : t; };
  Parts parts;
  for (const auto& p : params) {
    const Tensor master = keep(p->master);
    if (p->exported) add_pieces(parts.model, "", p->pieces, master);
    add_pieces(parts.trainer, p->trained() ? "master." : "state.", p->pieces, master);
  }
  for (const auto& s : optimizer.states())
    add_pieces(parts.trainer, s.kind + ".", s.param->pieces, keep(s.tensor));
  return parts;
}

// Fills the parts from a file that must hold them in their shapes, and nothing
// else that no pattern of `ignored` matches. Everything is checked before
// anything is read.
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
    if (!wanted.count(name) && std::ranges::none_of(ignored, matches))
      fail_input("{}: tensor {} does not belong to this model with these settings", file.path(),
                 printable(name));
  }
  for (Part& part : parts)
    if (part.data.device() != Device::meta) file.read(part.name, 0, part.data);
}

// The first of the forms a parameter can be read from whose tensors are all
// there.
const std::vector<Piece>& source_form(const Param& p, const Safetensors& file) {
  std::string missing;
  const auto is_there = [&](const std::vector<Piece>& form) {
    for (const Piece& piece : form) {
      if (file.has(piece.name)) continue;
      missing += missing.empty() ? piece.name : " (or, in another form, " + piece.name + ")";
      return false;
    }
    return true;
  };
  if (is_there(p.pieces)) return p.pieces;
  for (const auto& form : p.also_read)
    if (is_there(form)) return form;
  fail_input("{}: no tensor {}", file.path(), missing);
}

using TextFile = std::pair<std::string, std::string>;  // name in the checkpoint, contents

void add_tokenizer(const RunConfig& run, std::vector<TextFile>& files) {
  if (run.tokenizer.empty()) return;
  const bool is_directory = exists(run.tokenizer + "/.");
  const fs::path file = is_directory ? run.tokenizer + "/tokenizer.json" : run.tokenizer;
  files.emplace_back("tokenizer.json", read_file(file));
  for (const char* name : {"special_tokens_map.json", "vocab.json", "merges.txt",
                           "chat_template.jinja", "tokenizer_config.json"})
    if (const fs::path beside = file.parent_path() / name; exists(beside))
      files.emplace_back(name, read_file(beside));
  if (files.back().first == "tokenizer_config.json") return;
  // The least that lets AutoTokenizer open the directory.
  const Tokenizer tokenizer(run.tokenizer);
  Value config = Value::object({{"tokenizer_class", "PreTrainedTokenizerFast"},
                                {"model_max_length", run.data.sequence_length}});
  if (const auto eos = tokenizer.eos_id()) config["eos_token"] = tokenizer.decode({&*eos, 1});
  files.emplace_back("tokenizer_config.json", config.json(2) + "\n");
}

Value exported_config(const Model& model) {
  Value config = model.hf_config();
  config["dtype"] = "bfloat16";
  config["torch_dtype"] = "bfloat16";
  return config;
}

// The files that are the same in every checkpoint of a run.
std::vector<TextFile> fixed_files(const RunConfig& run, const Model& model) {
  const Value config = exported_config(model);
  Value generation = Value::object({{"_from_model_config", true}});
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (const Value* id = config.find(key); id && !id->is_null()) generation[key] = *id;
  std::vector<TextFile> files = {{"config.json", config.json(2) + "\n"},
                                 {"generation_config.json", generation.json(2) + "\n"},
                                 {"trainer/run.toml", run.to_toml()}};
  add_tokenizer(run, files);
  return files;
}

// What decides how sums are ordered: the instructions this program is built
// for, and those that libraries choose from at run time.
std::string instruction_set() {
#ifdef __AVX512F__
  const char* built = "avx512f";
#else
  const char* built = "avx2";
#endif
  const bool wide = __builtin_cpu_supports("avx512f"), brain = __builtin_cpu_supports("avx512bf16");
  return fmt::format("{} on {}", built, brain ? "avx512bf16" : wide ? "avx512f" : "avx2");
}

// trainer/state.json. The order of the data follows from seed and position (in
// sequences) alone.
Value state_of(const RunConfig& run, int64_t step) {
  return Value::object({{"format", kFormat},
                        {"version", kVersion},
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
    file.add(part.name, as_bf16 ? DType::bf16 : part.data.dtype(),
             {part.shape.dims().begin(), part.shape.dims().end()});
  file.set_metadata("format", "pt");  // transformers insists on it
  file.create();
  for (const Part& part : parts)
    for (int64_t begin = 0, n = part.data.numel(); begin < n; begin += kChunk)
      file.write(part.name, begin, part.data.row_range(begin, std::min(n, begin + kChunk)));
  file.close();
}

// A directory is only called step-N when it is complete; this tells it from
// what others put there.
bool is_complete(const std::string& directory) { return exists(directory + "/trainer/state.json"); }

// The names of complete checkpoints by step.
std::map<int64_t, std::string> complete_steps(const std::string& out) {
  std::map<int64_t, std::string> steps;
  for (const std::string& name : names_in(out)) {
    const bool numbered = name.size() >= 13 && name.size() < 24 && name.starts_with("step-") &&
                          name.find_first_not_of("0123456789", 5) == name.npos;
    if (numbered && is_complete(out + "/" + name)) steps[std::stoll(name.substr(5))] = name;
  }
  return steps;
}

}  // namespace

struct Checkpoints::Writer {
  std::string out;
  int64_t keep_last;
  std::vector<TextFile> files;
  std::future<void> pending = {};

  std::string path(const std::string& name) const { return out + "/" + name; }
  std::string temporary(const std::string& name) const {
    return path(fmt::format(".{}.tmp-{}", name, ::getpid()));
  }

  void write(int64_t step, const Parts& parts, const std::string& state) const {
    const std::string name = fmt::format("step-{:08}", step), directory = temporary(name);
    try {
      require_ok(::mkdir(directory.c_str(), 0777), directory);
      require_ok(::mkdir((directory + "/trainer").c_str(), 0777), directory);
      for (const auto& [file, text] : files) write_file_atomic(directory + "/" + file, text);
      write_file_atomic(directory + "/trainer/state.json", state);
      write_parts(directory + "/trainer", "trainer", parts.trainer, false);
      write_parts(directory, "model", parts.model, true);
      install(directory, name);
    } catch (const InputError& e) {
      remove_tree(directory);
      fail_input("the checkpoint of step {} was not written: {}", step, e.what());
    }
    remove_tree(directory);
    prune(step);
  }

  // A checkpoint of the same number, which a crash or an earlier run left,
  // changes places with the new one, so that there is one of that name at any
  // moment; where the file system cannot do that it is removed first.
  void install(const std::string& directory, const std::string& name) const {
    const std::string place = path(name), link = path("latest"), fresh = link + ".tmp";
    const char *from = directory.c_str(), *to = place.c_str();
    if (::rename(from, to) != 0 &&
        ::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) != 0) {
      remove_tree(place);
      require_ok(::rename(from, to), place);
    }
    fsync_directory(out);
    ::unlink(fresh.c_str());
    require_ok(::symlink(name.c_str(), fresh.c_str()), link);
    require_ok(::rename(fresh.c_str(), link.c_str()), link);
    fsync_directory(out);
  }

  // Only what is older than `newest`, which `latest` points to.
  void prune(int64_t newest) const {
    auto steps = complete_steps(out);
    steps.erase(steps.upper_bound(newest), steps.end());
    for (; int64_t(steps.size()) > keep_last; steps.erase(steps.begin())) {
      const std::string& name = steps.begin()->second;
      // What is half removed must not look complete, so it loses its name
      // first.
      if (::rename(path(name).c_str(), temporary(name).c_str()) != 0)
        warn_once(fmt::format("{} cannot be removed: {}", path(name), std::strerror(errno)));
      remove_tree(temporary(name));
    }
  }
};

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
    if (p->trained() || p->exported) add_pieces(parts, "", source_form(*p, file), p->master);
  read_parts(file, parts, ignored);
  params.sync_values();
}

Checkpoints::Checkpoints(const RunConfig& run, Model& model, Optimizer& optimizer)
    : writer_(new Writer{run.out, run.checkpoint.keep_last, fixed_files(run, model)}),
      run_(run),
      model_(model),
      optimizer_(optimizer) {
  for (const auto& p : model.params) {
    if (p->trained() || p->exported || !p->name.ends_with("e_score_correction_bias")) continue;
    if (run.balance.bias_export == "refuse")
      fail_input(
          "balance.bias_update_rate = {}: Hugging Face has no tensor for the "
          "router bias in this "
          "architecture ({}), exported models would route without it; set "
          "balance.bias_export=\"drop\" to accept that",
          run.balance.bias_update_rate, p->name);
    warn_once(
        "the router bias is kept in trainer/ only: exported models route "
        "without it");
  }
  for (const std::string& name : names_in(run.out))
    if (fnmatch(".step-*.tmp-*", name.c_str(), 0) == 0 || name == "latest.tmp")
      remove_tree(run.out + "/" + name);
}

Checkpoints::~Checkpoints() = default;  // the future waits

void Checkpoints::finish() {
  if (writer_->pending.valid()) writer_->pending.get();
}

void Checkpoints::save(int64_t step) {
  finish();
  const bool background = run_.checkpoint.background;
  // The parts are freed when they are written, not when somebody asks for the
  // result.
  auto write = [w = writer_.get(), step, state = state_of(run_, step).json(2) + "\n",
                parts = collect(model_.params, optimizer_, background)]() mutable {
    w->write(step, std::exchange(parts, {}), state);
  };
  if (!background) return write();
  writer_->pending = std::async(std::launch::async, std::move(write));
}

std::string Checkpoints::latest(const std::string& out) {
  std::error_code error;
  const fs::path target = fs::path(out) / fs::read_symlink(out + "/latest", error);
  if (!error && is_complete(target)) return target;
  const auto steps = complete_steps(out);
  return steps.empty() ? "" : out + "/" + steps.rbegin()->second;
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
  const Value config = read_model_config(directory), own = exported_config(model_);
  for (const auto& [key, value] : own.members()) {
    const Value* there = config.find(key);
    if (there && there->json() != value.json() && key != "transformers_version")
      fail_input("{}: another model: {} was {}, now it is {}", config.where(), key, there->json(),
                 value.json());
  }
  Parts parts = collect(model_.params, optimizer_, false);
  read_parts(Safetensors(directory + "/trainer", "trainer"), parts.trainer, {});
  model_.params.sync_values();
  return step;
}

namespace {

// |a - b| / |a| (|a - b| if a is zero); 0 only if bit-equal, infinity if they
// cannot be compared.
double relative_l2(const Safetensors& a, const Safetensors& b, const std::string& name) {
  if (!a.has(name) || !b.has(name) || a.entry(name).shape != b.entry(name).shape) return HUGE_VAL;
  if (std::ranges::equal(a.bytes(name), b.bytes(name))) return 0;
  const auto x = a.load(name).to_vector<double>(), y = b.load(name).to_vector<double>();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    norm += x[i] * x[i];
  }
  const double relative = std::sqrt(difference / (norm > 0 ? norm : 1));
  return std::isnan(relative) ? HUGE_VAL : std::max(relative, std::numeric_limits<double>::min());
}

// Whether `name` is a bf16 weight and the rounding of its master.
bool is_rounding(const Safetensors& model, const std::string& name, const Safetensors& trainer) {
  const std::string master = (trainer.has("master." + name) ? "master." : "state.") + name;
  if (!trainer.has(master)) return false;
  const Tensor x = model.load(name), y = trainer.load(master).to(DType::bf16, "compare");
  return x.dtype() == DType::bf16 && x.shape() == y.shape() &&
         std::memcmp(x.raw(), y.raw(), x.nbytes()) == 0;
}

}  // namespace

bool compare_checkpoints(const std::string& a, const std::string& b, double tolerance) {
  const Safetensors left(a + "/trainer", "trainer"), right(b + "/trainer", "trainer");
  std::set<std::string> names;
  std::vector<std::pair<double, std::string>> worst;
  for (const auto& [directory, trainer] : {std::pair(a, &left), std::pair(b, &right)}) {
    for (const auto& [name, entry] : trainer->entries()) names.insert(name);
    const Safetensors model(directory);
    for (const auto& [name, entry] : model.entries())
      if (!is_rounding(model, name, *trainer))
        worst.emplace_back(HUGE_VAL, directory + ": not the rounding of its master: " + name);
  }
  for (const std::string& name : names) worst.emplace_back(relative_l2(left, right, name), name);
  std::sort(worst.rbegin(), worst.rend());
  const double largest = worst.empty() ? 0 : worst.front().first;
  fmt::print("{} tensors, largest relative L2 {:.3e}\n", names.size(), largest);
  for (size_t i = 0; i < std::min<size_t>(worst.size(), 10) && worst[i].first > 0; ++i)
    fmt::print("  {:.3e}  {}\n", worst[i].first, printable(worst[i].second, 200));
  return largest <= tolerance;
}

}  // namespace pith
