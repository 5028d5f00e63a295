#pragma once
// safetensors: u64 header length, JSON header, data. Reading maps the files; nothing is copied
// until asked. Format: https://github.com/huggingface/safetensors (README, "Format").

#include "core/file.h"
#include "core/tensor.h"
#include "core/value.h"

namespace pith {

struct SafetensorsEntry {
  DType dtype;
  std::vector<int64_t> shape;   // as in the file, any rank
  uint64_t begin = 0, end = 0;  // bytes, relative to the data section of its file
  size_t file = 0;              // index into the shards
  int64_t numel() const {
    return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies());
  }
};

// One file, or a directory holding model.safetensors or model.safetensors.index.json with its
// shards (`stem` replaces "model"). Hostile headers are rejected with InputError: a length beyond
// the file, malformed JSON, an unknown dtype, negative or overflowing shapes, offsets outside the
// data, overlapping or unequal to shape x dtype, an index naming a missing tensor, file or a path
// outside the directory. The dtypes read are F64 F32 BF16 F8_E4M3 I64 I32 U16 U8.
class Safetensors {
 public:
  explicit Safetensors(const std::string& path, const std::string& stem = "model");
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  bool has(const std::string& name) const { return entries_.count(name) != 0; }
  // InputError "FILE: no tensor NAME"
  const SafetensorsEntry& entry(const std::string& name) const;
  std::span<const std::byte> bytes(const std::string& name) const;
  // Elements [begin, begin + dst.numel()) in row-major order, converted to dst's floating dtype.
  void read(const std::string& name, int64_t begin, Tensor& dst) const;
  Tensor load(const std::string& name) const;  // whole tensor, dtype as stored, rank up to 4
  const std::string& path() const { return path_; }

 private:
  std::map<std::string, SafetensorsEntry> open(const std::string& file);
  std::string path_;
  std::vector<MappedFile> files_;
  std::vector<std::span<const std::byte>> data_;  // of each file, after its header
  std::map<std::string, SafetensorsEntry> entries_;
};

// Writing is planned first, so that any process can write its own slice at its own offset: add()
// assigns tensors, in order, to shards of at most `shard_bytes`; create() writes every header (and
// the index when there is more than one shard) and sizes the files; write() puts elements at their
// place.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::string& directory, const std::string& stem,
                    uint64_t shard_bytes = uint64_t(4) << 30);
  void add(const std::string& name, DType dtype, std::vector<int64_t> shape);
  // Files: STEM.safetensors, or STEM-00001-of-0000N.safetensors with STEM.safetensors.index.json.
  void create();
  // Elements [begin, begin + src.numel()) of `name`; src (cpu) is converted to the file's dtype.
  void write(const std::string& name, int64_t begin, const Tensor& src);
  void close();  // fsync all

 private:
  struct Shard {
    Value header = Value::object();
    uint64_t bytes = 0, data_begin = 0;
    std::unique_ptr<OutputFile> file = nullptr;  // from create() on
  };
  std::string directory_, stem_;
  uint64_t shard_bytes_;
  std::map<std::string, SafetensorsEntry> entries_;
  std::vector<Shard> shards_ = std::vector<Shard>(1);
};

}  // namespace pith
