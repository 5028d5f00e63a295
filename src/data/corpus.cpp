#include "data/corpus.h"

namespace pith {

constexpr char kMagic[] = "MMIDIDX\0";  // nine bytes with the terminator
constexpr int64_t kHeader = 34;

// Numbers of an index are not aligned.
template <class T> static T load(const void* data, int64_t at) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + at, sizeof value);
  return value;
}

Corpus::Corpus(const std::string& prefix) : prefix_(prefix), data_(prefix + ".bin") {
  const std::string file = prefix + ".idx";
  const MappedFile map(file);
  const std::byte* index = map.bytes().data();
  const auto size = int64_t(map.bytes().size()), data_size = int64_t(data_.bytes().size());
  if (size < kHeader || std::memcmp(index, kMagic, 9) != 0)
    fail_input("{}: not a Megatron-LM index (it must begin with MMIDIDX)", file);
  if (const auto version = load<uint64_t>(index, 9); version != 1)
    fail_input("{}: index version {}, only 1 is known", file, version);
  const int code = load<uint8_t>(index, 17);
  if (code != 4 && code != 8)
    fail_input("{}: dtype code {}, only 4 (int32) and 8 (uint16) are read", file, code);
  token_bytes_ = code == 8 ? 2 : 4;
  const auto sequences = load<int64_t>(index, 18), indices = load<int64_t>(index, 26);
  if (sequences < 0 || sequences > size / 12 || indices < 1 || indices > size / 8 ||
      kHeader + 12 * sequences + 8 * indices != size)
    fail_input("{}: {} bytes do not hold {} sequences and {} document indices", file, size,
               uint64_t(sequences), uint64_t(indices));
  const int64_t offsets = kHeader + 4 * sequences, firsts = offsets + 8 * sequences;
  int64_t expected = 0, previous = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = load<int32_t>(index, kHeader + 4 * i);
    const auto offset = load<int64_t>(index, offsets + 8 * i);
    if (length < 0) fail_input("{}: sequence {} has length {}", file, i, length);
    if (offset != expected)
      fail_input("{}: sequence {} is at byte {}, the lengths before it add up to {}", file, i,
                 offset, expected);
    expected += length * token_bytes_;
  }
  if (expected != data_size)
    fail_input("{}.bin: {} bytes, {} says {}", prefix, data_size, file, expected);
  for (int64_t d = 0; d < indices; ++d) {
    const auto first = load<int64_t>(index, firsts + 8 * d);
    const bool ends_well = (d != 0 || first == 0) && (d != indices - 1 || first == sequences);
    if (first < previous || first > sequences || !ends_well)
      fail_input("{}: document {} begins at sequence {}; they must ascend from 0 to {}", file, d,
                 first, sequences);
    const auto offset = first == sequences ? expected : load<int64_t>(index, offsets + 8 * first);
    document_offsets_.push_back(offset / token_bytes_);
    previous = first;
  }
}

void Corpus::read(int64_t begin, int64_t count, int32_t* out) const {
  if (begin < 0 || count < 0 || begin > tokens() || count > tokens() - begin)
    fail("{}: tokens [{}, {} + {}) are outside its {}", prefix_, begin, begin, count, tokens());
  const std::byte* from = data_.bytes().data() + begin * token_bytes_;
  if (token_bytes_ == 2)
    std::copy_n(reinterpret_cast<const uint16_t*>(from), count, out);
  else
    std::copy_n(reinterpret_cast<const int32_t*>(from), count, out);
}

CorpusWriter::CorpusWriter(const std::string& prefix, int64_t vocab_size, int64_t documents,
                           int64_t tokens)
    : prefix_(prefix), vocab_size_(vocab_size), documents_(documents), tokens_(tokens) {
  const auto holds = [&](const char* end, int64_t bytes) {
    return int64_t(std::filesystem::file_size(prefix + end)) >= bytes;
  };
  if (!holds(".bin.partial", tokens * token_bytes_) || !holds(".len.partial", documents * 4))
    documents_ = tokens_ = 0;
  bin_.resize(uint64_t(tokens_ * token_bytes_));
  lengths_.resize(uint64_t(documents_ * 4));
}

void CorpusWriter::add(std::span<const int32_t> ids, std::span<const int32_t> lengths) {
  std::string bytes;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size_)
      fail("token id {} is outside the vocabulary of {}", id, vocab_size_);
    // The low bytes come first.
    bytes.append(reinterpret_cast<const char*>(&id), size_t(token_bytes_));
  }
  bin_.write(bytes.data(), bytes.size());
  lengths_.write(lengths.data(), lengths.size_bytes());
  documents_ += int64_t(lengths.size());
  tokens_ += int64_t(ids.size());
}

void CorpusWriter::flush_to_disk() {
  bin_.flush_to_disk();
  lengths_.flush_to_disk();
}

void CorpusWriter::finish() {
  if (documents_ == 0) {
    for (const char* end : {".bin.partial", ".len.partial"}) ::unlink((prefix_ + end).c_str());
    fail_input("{}: the input holds no text", prefix_);
  }
  bin_.close();
  lengths_.close();
  const std::string lengths = read_file(prefix_ + ".len.partial");
  std::string index(std::begin(kMagic), std::end(kMagic));
  append_raw(index, uint64_t(1), uint8_t(token_bytes_ == 2 ? 8 : 4), documents_, documents_ + 1);
  index += lengths;
  for (int64_t d = 0, offset = 0; d < documents_; ++d) {
    append_raw(index, offset);
    offset += load<int32_t>(lengths.data(), 4 * d) * int64_t(token_bytes_);
  }
  for (int64_t d = 0; d <= documents_; ++d) append_raw(index, d);  // each is one sequence
  write_file_atomic(prefix_ + ".idx.partial", index);
  ::unlink((prefix_ + ".idx").c_str());  // never a new .bin beside an old index
  for (const char* end : {".bin", ".idx"})
    if (std::rename((prefix_ + end + ".partial").c_str(), (prefix_ + end).c_str()) != 0)
      fail_input("{}{}: {}", prefix_, end, std::strerror(errno));
  ::unlink((prefix_ + ".len.partial").c_str());
  fsync_directory(prefix_.substr(0, prefix_.rfind('/') + 1) + ".");
}

}  // namespace pith
