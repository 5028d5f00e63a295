#include "core/safetensors.h"

namespace pith {

using Entries = std::map<std::string, SafetensorsEntry>;

// Some 250,000 tensors in one file; it bounds the memory that a hostile header can make the parser
// take.
constexpr uint64_t kMaxHeader = uint64_t(32) << 20;

// In the order of DType.
const std::string kDTypes[] = {"F64", "F32", "BF16", "F8_E4M3", "I64", "I32", "U16", "U8"};

static int64_t non_negative(const Value& v) {
  if (!v.is(Value::Kind::integer) || v.as_int() < 0) v.reject("a non-negative integer");
  return v.as_int();
}

// Nothing if a dimension is negative or the bytes, zeros left out of the product, exceed 63 bits.
static std::optional<uint64_t> bytes_of(const SafetensorsEntry& e) {
  double bytes = double(size_of(e.dtype));
  for (const int64_t d : e.shape) bytes *= d < 0 ? HUGE_VAL : double(std::max<int64_t>(d, 1));
  if (bytes >= 0x1p63) return {};
  return uint64_t(e.numel()) * size_of(e.dtype);
}

static SafetensorsEntry parse_entry(const Value& v, size_t file) {
  const Value &dtype = v.at("dtype"), &shape = v.at("shape"), &offsets = v.at("data_offsets");
  const auto* known = std::ranges::find(kDTypes, dtype.as_string());
  if (known == std::end(kDTypes)) dtype.reject("one of F64 F32 BF16 F8_E4M3 I64 I32 U16 U8");
  SafetensorsEntry e{.dtype = DType(known - kDTypes), .file = file};
  for (const Value& d : shape.items()) e.shape.push_back(non_negative(d));
  const auto bytes = bytes_of(e);
  if (!bytes) shape.reject("a shape whose bytes fit 63 bits");
  if (offsets.items().size() != 2) offsets.reject("two offsets");
  e.begin = uint64_t(non_negative(offsets.items()[0]));
  e.end = uint64_t(non_negative(offsets.items()[1]));
  if (e.end - e.begin != *bytes)
    fail_input("{}: bytes {} to {}, but shape and dtype need {} bytes", offsets.where(), e.begin,
               e.end, *bytes);
  return e;
}

// The tensors must cover the data exactly, without holes or overlaps (README of the format).
static void check_coverage(const Entries& entries, uint64_t data_bytes, const std::string& path) {
  std::vector<std::tuple<uint64_t, uint64_t, std::string_view>> order;
  for (const auto& [name, e] : entries) order.emplace_back(e.begin, e.end, name);
  std::ranges::sort(order);
  uint64_t covered = 0;
  for (const auto& [begin, end, name] : order) {
    if (begin != covered || end > data_bytes)
      fail_input("{}: {} lies at bytes {} to {} of the data; expected it at {}, within {}", path,
                 printable(name), begin, end, covered, data_bytes);
    covered = end;
  }
  if (covered != data_bytes)
    fail_input("{}: {} bytes of data, but its tensors end at {}", path, data_bytes, covered);
}

// The entry of `name`; elements [begin, begin + count) must be among its own.
static const SafetensorsEntry& find(const Entries& entries, const std::string& path,
                                    const std::string& name, int64_t begin = 0, int64_t count = 0) {
  const auto it = entries.find(name);
  if (it == entries.end()) fail_input("{}: no tensor {}", path, printable(name));
  const int64_t size = it->second.numel();
  if (begin < 0 || count > size || begin > size - count)
    fail_input("{}: {}: {} elements from {} on, but it has {}", path, printable(name), count, begin,
               size);
  return it->second;
}

Safetensors::Safetensors(const std::string& path, const std::string& stem) : path_(path) {
  const std::string single = path + "/" + stem + ".safetensors", index = single + ".index.json";
  const bool directory = exists(path + "/.");
  if (!directory || exists(single)) {
    entries_ = open(directory ? single : path);
    return;
  }
  if (!exists(index))
    fail_input("{}: neither {}.safetensors nor {}.safetensors.index.json", path, stem, stem);
  const Value root = parse_json(read_file(index), index);
  std::map<std::string, Entries> shards;
  for (const auto& [name, v] : root.at("weight_map").members()) {
    const std::string& file = v.as_string();
    const bool inside = file.find_first_of(std::string_view("/\0", 2)) == file.npos;
    if (!inside || !file.ends_with(".safetensors"))
      v.reject("the name of a .safetensors file in the same directory");
    if (shards.count(file) == 0) shards[file] = open(path + "/" + file);
    if (!entries_.insert(shards[file].extract(name)).inserted)
      fail_input("{}/{}: no tensor {}, which the index names", path, file, printable(name));
  }
}

Entries Safetensors::open(const std::string& file) {
  const std::span<const std::byte> bytes = files_.emplace_back(file).bytes();
  uint64_t length = 0;
  if (bytes.size() >= sizeof length) std::memcpy(&length, bytes.data(), sizeof length);
  if (length == 0 || length > kMaxHeader || length > bytes.size() - sizeof length)
    fail_input("{}: header of {} bytes in a file of {}: truncated, or not safetensors", file,
               length, bytes.size());
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof length;
  const Value root = parse_json({text, size_t(length)}, file);
  Entries entries;
  for (const auto& [name, v] : root.members()) {
    if (name != "__metadata__") {
      entries.emplace(name, parse_entry(v, data_.size()));
      continue;
    }
    for (const auto& [key, item] : v.members()) item.as_string();  // nobody reads it
  }
  data_.push_back(bytes.subspan(sizeof length + length));
  check_coverage(entries, data_.back().size(), file);
  return entries;
}

const SafetensorsEntry& Safetensors::entry(const std::string& name) const {
  return find(entries_, path_, name);
}

std::span<const std::byte> Safetensors::bytes(const std::string& name) const {
  const SafetensorsEntry& e = entry(name);
  return data_[e.file].subspan(e.begin, e.end - e.begin);
}

void Safetensors::read(const std::string& name, int64_t begin, Tensor& dst) const {
  const SafetensorsEntry& e = find(entries_, path_, name, begin, dst.numel());
  const bool same = e.dtype == dst.dtype(), direct = same && dst.device() == Device::cpu;
  if (!same && std::max(e.dtype, dst.dtype()) > DType::bf16)
    fail_input("{}: {}: {} cannot be read as {}", path_, printable(name), kDTypes[int(e.dtype)],
               name_of(dst.dtype()));
  if (dst.numel() == 0) return;
  Tensor stored = direct ? dst : Tensor(dst.shape(), e.dtype, Device::cpu, "safetensors.read");
  std::memcpy(stored.raw(), bytes(name).data() + size_t(begin) * size_of(e.dtype), stored.nbytes());
  if (!direct) dst.copy_from(stored);
}

Tensor Safetensors::load(const std::string& name) const {
  const SafetensorsEntry& e = entry(name);
  if (e.shape.size() > 4) fail_input("{}: {} has more than 4 dimensions", path_, printable(name));
  Tensor t(Shape(e.shape), e.dtype, Device::cpu, "safetensors");
  read(name, 0, t);
  return t;
}

SafetensorsWriter::SafetensorsWriter(const std::string& directory, const std::string& stem,
                                     uint64_t shard_bytes)
    : directory_(directory), stem_(stem), shard_bytes_(shard_bytes) {}

void SafetensorsWriter::add(const std::string& name, DType dtype, std::vector<int64_t> shape) {
  SafetensorsEntry e{dtype, std::move(shape)};
  const auto bytes = bytes_of(e);
  if (!bytes || name == "__metadata__" || entries_.contains(name) || shards_[0].file)
    fail("{}: a shape that overflows, a reserved name, or added twice or after create()", name);
  const uint64_t filled = shards_.back().bytes;
  if (filled > 0 && filled + *bytes > shard_bytes_) shards_.emplace_back();
  Shard& shard = shards_.back();
  e.file = shards_.size() - 1;
  e.begin = shard.bytes;
  e.end = shard.bytes += *bytes;
  shard.header.add(
      name, Value::object({{"dtype", kDTypes[int(dtype)]},
                           {"shape", Value::array({e.shape.begin(), e.shape.end()})},
                           {"data_offsets", Value::array({int64_t(e.begin), int64_t(e.end)})}}));
  entries_.emplace(name, std::move(e));
}

void SafetensorsWriter::create() {
  int64_t total = 0;
  Value index, weight_map = Value::object();
  for (size_t i = 0; i < shards_.size(); ++i) {
    Shard& shard = shards_[i];
    const std::string name = shards_.size() == 1 ? stem_ + ".safetensors"
                                                 : fmt::format("{}-{:05}-of-{:05}.safetensors",
                                                               stem_, i + 1, shards_.size());
    for (const auto& [tensor, entry] : shard.header.members()) weight_map.add(tensor, name);
    total += int64_t(shard.bytes);
    shard.header.add("__metadata__", Value::object({{"format", "pt"}}));  // for transformers
    std::string header = shard.header.json();
    header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the data starts aligned
    const uint64_t length = header.size();
    shard.data_begin = sizeof length + length;
    shard.file = std::make_unique<OutputFile>(directory_ + "/" + name);
    shard.file->write(&length, sizeof length);
    shard.file->write(header.data(), header.size());
    shard.file->resize(shard.data_begin + shard.bytes);  // what is not written reads as zeros
  }
  if (shards_.size() == 1) return;
  index["metadata"]["total_size"] = total;
  index["weight_map"] = std::move(weight_map);
  write_file_atomic(directory_ + "/" + stem_ + ".safetensors.index.json", index.json(2) + '\n');
}

void SafetensorsWriter::write(const std::string& name, int64_t begin, const Tensor& src) {
  const SafetensorsEntry& e = find(entries_, directory_, name, begin, src.numel());
  const Shard& shard = shards_[e.file];
  if (!shard.file) fail("{}: {} is written before create()", directory_, name);
  if (src.numel() == 0) return;
  const Tensor out =
      (src.dtype() == e.dtype ? src : src.to(e.dtype, "safetensors.write")).on(Device::cpu);
  shard.file->write_at(out.raw(), out.nbytes(),
                       shard.data_begin + e.begin + uint64_t(begin) * size_of(e.dtype));
}

void SafetensorsWriter::close() {
  for (const Shard& shard : shards_) shard.file->close();
  fsync_directory(directory_);
}

}  // namespace pith
