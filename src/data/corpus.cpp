#include "data/corpus.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>

namespace pith {
namespace {

constexpr char kMagic[] = "MMIDIDX\0";  // nine bytes with the terminator
constexpr int64_t kHeader = 34;
constexpr size_t kBuffer = size_t(1) << 20;

// Numbers of an index are not aligned.
template <class T> T load(const MappedFile& file, int64_t at) {
  T value;
  std::memcpy(&value, file.bytes().data() + at, sizeof value);
  return value;
}

}  // namespace

Corpus::Corpus(const std::string& prefix) : prefix_(prefix), data_(prefix + ".bin") {
  const MappedFile index(prefix + ".idx");
  const std::string& file = index.path();
  const uint64_t size = index.bytes().size();
  if (size < kHeader || std::memcmp(index.bytes().data(), kMagic, 9) != 0)
    fail_input("{}: not a Megatron-LM index (it must begin with MMIDIDX)", file);
  if (const auto version = load<uint64_t>(index, 9); version != 1)
    fail_input("{}: index version {}, only 1 is known", file, version);
  const int code = load<uint8_t>(index, 17);
  if (code != 4 && code != 8)
    fail_input("{}: dtype code {}, only 4 (int32) and 8 (uint16) are read", file, code);
  token_bytes_ = code == 8 ? 2 : 4;
  tokens_ = int64_t(data_.bytes().size()) / token_bytes_;
  const auto sequences = load<uint64_t>(index, 18), indices = load<uint64_t>(index, 26);
  if (sequences > size / 12 || indices > size / 8 || indices < 1 ||
      kHeader + 12 * sequences + 8 * indices != size)
    fail_input("{}: {} bytes do not hold {} sequences and {} document indices", file, size,
               sequences, indices);
  read_documents(index, int64_t(sequences), int64_t(indices) - 1);
}

void Corpus::read_documents(const MappedFile& index, int64_t sequences, int64_t documents) {
  const std::string& file = index.path();
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
  if (expected != int64_t(data_.bytes().size()))
    fail_input("{}: {} bytes, {} says {}", data_.path(), data_.bytes().size(), file, expected);
  for (int64_t d = 0; d <= documents; ++d) {
    const auto first = load<int64_t>(index, firsts + 8 * d);
    const bool ends_well = (d != 0 || first == 0) && (d != documents || first == sequences);
    if (first < previous || first > sequences || !ends_well)
      fail_input("{}: document {} begins at sequence {}; they must ascend from 0 to {}", file, d,
                 first, sequences);
    document_offsets_.push_back(
        first == sequences ? tokens_ : load<int64_t>(index, offsets + 8 * first) / token_bytes_);
    previous = first;
  }
}

void Corpus::read(int64_t begin, int64_t count, int32_t* out) const {
  if (begin < 0 || count < 0 || begin > tokens_ || count > tokens_ - begin)
    fail("{}: tokens [{}, {} + {}) are outside its {}", prefix_, begin, begin, count, tokens_);
  const std::byte* from = data_.bytes().data() + begin * token_bytes_;
  if (token_bytes_ == 2)
    std::copy_n(reinterpret_cast<const uint16_t*>(from), count, out);
  else
    std::copy_n(reinterpret_cast<const int32_t*>(from), count, out);
}

int64_t Corpus::document_of(int64_t token) const {
  if (token < 0 || token >= tokens_) fail("{}: no token {} of {}", prefix_, token, tokens_);
  const auto& offsets = document_offsets_;
  return std::upper_bound(offsets.begin(), offsets.end(), token) - offsets.begin() - 1;
}

CorpusWriter::CorpusWriter(const std::string& prefix, int64_t vocab_size, int64_t documents,
                           int64_t tokens)
    : prefix_(prefix),
      vocab_size_(vocab_size),
      documents_(documents),
      tokens_(tokens),
      token_bytes_(vocab_size < 65500 ? 2 : 4),
      bin_(prefix + ".bin.partial", true),
      lengths_(prefix + ".len.partial", true) {
  const auto holds = [&](const char* end, int64_t bytes) {
    return int64_t(std::filesystem::file_size(prefix + end)) >= bytes;
  };
  if (!holds(".bin.partial", tokens * token_bytes_) || !holds(".len.partial", documents * 4))
    documents_ = tokens_ = 0;
  bin_.resize(uint64_t(tokens_ * token_bytes_));
  lengths_.resize(uint64_t(documents_ * 4));
}

void CorpusWriter::add(std::span<const int32_t> ids) {
  if (ids.size() > INT32_MAX) fail_input("a document of {} tokens is too long", ids.size());
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size_)
      fail("token id {} is outside the vocabulary of {}", id, vocab_size_);
    // The low bytes come first.
    bin_buffer_.append(reinterpret_cast<const char*>(&id), size_t(token_bytes_));
  }
  append_raw(length_buffer_, int32_t(ids.size()));
  ++documents_;
  tokens_ += int64_t(ids.size());
  if (bin_buffer_.size() + length_buffer_.size() > kBuffer) drain();
}

void CorpusWriter::drain() {
  bin_.write(bin_buffer_.data(), bin_buffer_.size());
  lengths_.write(length_buffer_.data(), length_buffer_.size());
  bin_buffer_.clear();
  length_buffer_.clear();
}

void CorpusWriter::flush_to_disk() {
  drain();
  bin_.flush_to_disk();
  lengths_.flush_to_disk();
}

void CorpusWriter::write_index() {
  const MappedFile lengths(prefix_ + ".len.partial");
  const auto length = [&](int64_t d) { return load<int32_t>(lengths, 4 * d); };
  OutputFile out(prefix_ + ".idx.partial");
  std::string buffer(kMagic, 9);
  const auto put = [&](auto value) {
    append_raw(buffer, value);
    if (buffer.size() < kBuffer) return;
    out.write(buffer.data(), buffer.size());
    buffer.clear();
  };
  append_raw(buffer, uint64_t(1), uint8_t(token_bytes_ == 2 ? 8 : 4), documents_, documents_ + 1);
  for (int64_t d = 0; d < documents_; ++d) put(length(d));
  for (int64_t d = 0, offset = 0; d < documents_; offset += int64_t(length(d++)) * token_bytes_)
    put(offset);
  for (int64_t d = 0; d <= documents_; ++d) put(d);
  out.write(buffer.data(), buffer.size());
  out.close();
}

void CorpusWriter::finish() {
  if (documents_ == 0) {
    for (const char* end : {".bin.partial", ".len.partial"}) ::unlink((prefix_ + end).c_str());
    fail_input("{}: the input holds no text", prefix_);
  }
  drain();
  bin_.close();
  lengths_.close();
  write_index();
  ::unlink((prefix_ + ".idx").c_str());  // never a new .bin beside an old index
  for (const char* end : {".bin", ".idx"})
    if (std::rename((prefix_ + end + ".partial").c_str(), (prefix_ + end).c_str()) != 0)
      fail_input("{}{}: {}", prefix_, end, std::strerror(errno));
  ::unlink((prefix_ + ".len.partial").c_str());
  const size_t slash = prefix_.rfind('/');
  fsync_directory(slash == prefix_.npos ? "." : prefix_.substr(0, slash + 1));
}

}  // namespace pith
