#include "core/safetensors.h"

#include <unistd.h>

#include <algorithm>

#include "core/value.h"

namespace pith {
namespace {

using Entries = std::map<std::string, SafetensorsEntry>;
using Metadata = std::map<std::string, std::string>;

// Some 250,000 tensors in one file; it bounds the memory that a hostile header can make the parser
// take.
constexpr uint64_t kMaxHeader = uint64_t(32) << 20;

constexpr std::pair<const char*, DType> kDTypes[] = {
    {"F64", DType::f64}, {"F32", DType::f32}, {"BF16", DType::bf16}, {"F8_E4M3", DType::e4m3},
    {"I64", DType::i64}, {"I32", DType::i32}, {"U16", DType::u16},   {"U8", DType::u8}};

const char* file_dtype(DType t) {
  for (const auto& [name, dtype] : kDTypes) {
    if (dtype == t) return name;
  }
  fail("safetensors has no dtype {}", name_of(t));
}

DType dtype_of_entry(const Value& v) {
  for (const auto& [name, dtype] : kDTypes) {
    if (v.as_string() == name) return dtype;
  }
  v.reject("one of F64 F32 BF16 F8_E4M3 I64 I32 U16 U8");
}

int64_t non_negative(const Value& v) {
  if (!v.is(Value::Kind::integer) || v.as_int() < 0) v.reject("a non-negative integer");
  return v.as_int();
}

// Bytes of a tensor; -1 when a dimension is negative or the bytes, zeros left out of the product,
// exceed int64.
int64_t checked_bytes(const std::vector<int64_t>& shape, DType dtype) {
  int64_t bytes = 1, dims = int64_t(size_of(dtype));
  for (const int64_t d : shape) {
    if (d < 0 || __builtin_mul_overflow(dims, std::max<int64_t>(d, 1), &dims)) return -1;
    if (d == 0) bytes = 0;
  }
  return bytes == 0 ? 0 : dims;
}

SafetensorsEntry parse_entry(const Value& v, int file) {
  SafetensorsEntry e;
  e.dtype = dtype_of_entry(v.at("dtype"));
  const Value &shape = v.at("shape"), &offsets = v.at("data_offsets");
  for (const Value& d : shape.items()) e.shape.push_back(non_negative(d));
  const int64_t bytes = checked_bytes(e.shape, e.dtype);
  if (bytes < 0) shape.reject("a shape whose bytes fit 63 bits");
  if (offsets.items().size() != 2) offsets.reject("two offsets");
  e.begin = uint64_t(non_negative(offsets.items()[0]));
  e.end = uint64_t(non_negative(offsets.items()[1]));
  if (e.end < e.begin || e.end - e.begin != uint64_t(bytes)) {
    fail_input("{}: bytes {} to {}, but shape and dtype need {} bytes", offsets.where(), e.begin,
               e.end, bytes);
  }
  e.file = file;
  return e;
}

// The tensors must cover the data exactly, without holes or overlaps (README of the format).
void check_coverage(const Entries& entries, uint64_t data_bytes, const std::string& path) {
  std::vector<const Entries::value_type*> order;
  for (const auto& item : entries) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t covered = 0;
  for (const auto* item : order) {
    const auto& [name, e] = *item;
    if (e.begin != covered || e.end > data_bytes) {
      fail_input("{}: {} lies at bytes {} to {} of the data; expected it at {}, within {}", path,
                 printable(name), e.begin, e.end, covered, data_bytes);
    }
    covered = e.end;
  }
  if (covered != data_bytes) {
    fail_input("{}: {} bytes of data, but its tensors end at {}", path, data_bytes, covered);
  }
}

// Appends to `metadata` and sets where the data begins.
Entries parse_header(const MappedFile& file, int index, uint64_t& data_begin, Metadata& metadata) {
  const std::span<const std::byte> bytes = file.bytes();
  uint64_t length = 0;
  if (bytes.size() >= sizeof length) std::memcpy(&length, bytes.data(), sizeof length);
  if (length == 0 || length > kMaxHeader || length > bytes.size() - sizeof length) {
    fail_input("{}: header of {} bytes in a file of {}: truncated, or not safetensors", file.path(),
               length, bytes.size());
  }
  data_begin = sizeof length + length;
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof length;
  const Value root = parse_json({text, size_t(length)}, file.path());
  Entries entries;
  for (const auto& [name, v] : root.members()) {
    if (name == "__metadata__") {
      for (const auto& [key, item] : v.members()) metadata[key] = item.as_string();
    } else {
      entries.emplace(name, parse_entry(v, index));
    }
  }
  check_coverage(entries, bytes.size() - data_begin, file.path());
  return entries;
}

// Elements [begin, begin + count) must be among those of the tensor.
void check_range(const SafetensorsEntry& e, int64_t begin, int64_t count, const std::string& what) {
  if (begin < 0 || count > e.numel() || begin > e.numel() - count) {
    fail_input("{}: {} elements from {} on, but it has {}", what, count, begin, e.numel());
  }
}

// Shard name -> the tensors the index wants from it.
std::map<std::string, std::vector<std::string>> parse_index(const std::string& path) {
  const Value index = parse_json(read_file(path), path);
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& [name, v] : index.at("weight_map").members()) {
    const std::string& file = v.as_string();
    const bool plain = !file.empty() && file != "." && file != ".." &&
                       file.find_first_of(std::string_view("/\0", 2)) == file.npos;
    if (!plain) v.reject("the name of a file in the same directory");
    shards[file].push_back(name);
  }
  return shards;
}

bool is_float(DType t) { return t == DType::f64 || t == DType::f32 || t == DType::bf16; }

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

}  // namespace

int64_t SafetensorsEntry::numel() const {
  int64_t n = 1;
  for (const int64_t d : shape) n *= d;
  return n;
}

Safetensors::Safetensors(const std::string& path, const std::string& stem) : path_(path) {
  const std::string single = path + "/" + stem + ".safetensors", index = single + ".index.json";
  const auto open = [&](const std::string& file) {
    files_.emplace_back(file);
    const int i = int(files_.size()) - 1;
    return parse_header(files_.back(), i, data_begin_.emplace_back(), metadata_);
  };
  if (!exists(path + "/.")) {
    entries_ = open(path);
  } else if (exists(single)) {
    entries_ = open(single);
  } else if (!exists(index)) {
    fail_input("{}: neither {}.safetensors nor {}.safetensors.index.json", path, stem, stem);
  } else {
    for (const auto& [file, names] : parse_index(index)) {
      Entries found = open(path + "/" + file);
      for (const std::string& name : names) {
        if (entries_.insert(found.extract(name)).inserted) continue;
        fail_input("{}/{}: no tensor {}, which the index names", path, file, printable(name));
      }
    }
  }
}

const SafetensorsEntry& Safetensors::entry(const std::string& name) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) fail_input("{}: no tensor {}", path_, printable(name));
  return it->second;
}

std::span<const std::byte> Safetensors::bytes(const std::string& name) const {
  const SafetensorsEntry& e = entry(name);
  return files_[size_t(e.file)].bytes().subspan(data_begin_[size_t(e.file)] + e.begin,
                                                e.end - e.begin);
}

void Safetensors::read(const std::string& name, int64_t begin, Tensor& dst) const {
  const SafetensorsEntry& e = entry(name);
  const std::string what = path_ + ": " + printable(name);
  const bool same = e.dtype == dst.dtype();
  check_range(e, begin, dst.numel(), what);
  if (!same && !(is_float(e.dtype) && is_float(dst.dtype()))) {
    fail_input("{}: {} cannot be read as {}", what, file_dtype(e.dtype), name_of(dst.dtype()));
  }
  if (dst.numel() == 0) return;
  const std::byte* src = bytes(name).data() + size_t(begin) * size_of(e.dtype);
  Tensor stored = same ? dst : Tensor(dst.shape(), e.dtype, Device::cpu, "safetensors.read");
  std::memcpy(stored.raw(), src, stored.nbytes());
  if (!same) dst.copy_from(stored);
}

Tensor Safetensors::load(const std::string& name) const {
  const SafetensorsEntry& e = entry(name);
  if (e.shape.size() > 4) {
    fail_input("{}: {} has more than 4 dimensions", path_, printable(name));
  }
  Tensor t(Shape(std::span<const int64_t>(e.shape)), e.dtype, Device::cpu, "safetensors");
  read(name, 0, t);
  return t;
}

struct SafetensorsWriter::Shard {
  OutputFile file;
  uint64_t data_begin = 0;

  // Writes the header and gives the file its final size; unwritten data reads as zeros.
  Shard(const std::string& path, const Metadata& metadata, std::vector<Value::Member> tensors,
        uint64_t data_bytes)
      : file(path) {
    if (!metadata.empty()) {
      tensors.emplace(tensors.begin(), "__metadata__",
                      Value::object({metadata.begin(), metadata.end()}));
    }
    std::string header = Value::object(std::move(tensors)).json();
    header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data starts aligned
    const uint64_t length = header.size();
    data_begin = sizeof length + length;
    file.write(&length, sizeof length);
    file.write(header.data(), header.size());
    file.resize(data_begin + data_bytes);
  }
};

SafetensorsWriter::SafetensorsWriter(std::string directory, std::string stem, uint64_t shard_bytes)
    : directory_(std::move(directory)), stem_(std::move(stem)), shard_bytes_(shard_bytes) {}

void SafetensorsWriter::add(const std::string& name, DType dtype, std::vector<int64_t> shape) {
  const int64_t bytes = checked_bytes(shape, dtype);
  if (bytes < 0) fail("{}: a shape is negative or overflows", name);
  if (!shards_.empty()) fail("{}: add() after create()", name);
  SafetensorsEntry e{dtype, std::move(shape), 0, uint64_t(bytes), 0};
  if (name == "__metadata__" || !entries_.emplace(name, std::move(e)).second) {
    fail("{}: added twice, or a reserved name", name);
  }
  order_.push_back(name);
}

void SafetensorsWriter::set_metadata(const std::string& key, const std::string& value) {
  metadata_[key] = value;
}

void SafetensorsWriter::create() {
  if (!shards_.empty()) fail("{}: create() twice", directory_);
  struct Plan {
    std::vector<Value::Member> header;
    uint64_t bytes = 0;
  };
  std::vector<Plan> plans(1);
  for (const std::string& name : order_) {
    SafetensorsEntry& e = entries_.at(name);
    const uint64_t bytes = e.end - e.begin;
    if (plans.back().bytes > 0 && plans.back().bytes + bytes > shard_bytes_) plans.emplace_back();
    e.file = int(plans.size()) - 1;
    e.begin = plans.back().bytes;
    e.end = plans.back().bytes += bytes;
    Value shape = Value::array(std::vector<Value>(e.shape.begin(), e.shape.end()));
    Value offsets = Value::array({int64_t(e.begin), int64_t(e.end)});
    plans.back().header.emplace_back(
        name, Value::object(
                  {{"dtype", file_dtype(e.dtype)}, {"shape", shape}, {"data_offsets", offsets}}));
  }
  uint64_t total = 0;
  std::vector<std::string> files;
  for (Plan& plan : plans) {
    files.push_back(plans.size() == 1 ? stem_ + ".safetensors"
                                      : fmt::format("{}-{:05}-of-{:05}.safetensors", stem_,
                                                    files.size() + 1, plans.size()));
    shards_.push_back(std::make_shared<Shard>(directory_ + "/" + files.back(), metadata_,
                                              std::move(plan.header), plan.bytes));
    total += plan.bytes;
  }
  if (plans.size() == 1) return;
  std::vector<Value::Member> weight_map;
  for (const std::string& name : order_)
    weight_map.emplace_back(name, files[size_t(entries_.at(name).file)]);
  const Value index = Value::object({{"metadata", Value::object({{"total_size", int64_t(total)}})},
                                     {"weight_map", Value::object(std::move(weight_map))}});
  write_file_atomic(directory_ + "/" + stem_ + ".safetensors.index.json", index.json(2) + "\n");
}

void SafetensorsWriter::write(const std::string& name, int64_t begin, const Tensor& src) {
  const auto it = entries_.find(name);
  if (it == entries_.end() || shards_.empty()) fail("{}: {} is not in the plan", directory_, name);
  const SafetensorsEntry& e = it->second;
  check_range(e, begin, src.numel(), directory_ + ": " + name);
  if (src.numel() == 0) return;
  const Tensor out = src.dtype() == e.dtype ? src : src.to(e.dtype, "safetensors.write");
  Shard& shard = *shards_[size_t(e.file)];
  shard.file.write_at(out.raw(), out.nbytes(),
                      shard.data_begin + e.begin + uint64_t(begin) * size_of(e.dtype));
}

void SafetensorsWriter::close() {
  for (const auto& shard : shards_) shard->file.close();
  fsync_directory(directory_);
}

}  // namespace pith
