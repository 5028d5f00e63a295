#include "data/corpus.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/error.h"

namespace pith {
namespace {

static_assert(std::endian::native == std::endian::little, "the corpus files are little-endian");

constexpr char kMagic[] = "MMIDIDX\0";  // nine bytes with the terminator
constexpr int64_t kHeader = 34;
constexpr size_t kBuffer = size_t(1) << 20;

// Numbers of an index are not aligned.
template <class T> T load(std::span<const std::byte> bytes, int64_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

int token_bytes_for(int64_t vocab_size) { return vocab_size < 65500 ? 2 : 4; }

int64_t file_size(const std::string& path) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 ? int64_t(info.st_size) : -1;
}

void rename_or_fail(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) fail_input("{}: {}", to, std::strerror(errno));
}

}  // namespace

Corpus::Corpus(const std::string& prefix)
    : prefix_(prefix), index_(prefix + ".idx"), data_(prefix + ".bin") {
  const auto bytes = index_.bytes();
  const std::string& file = index_.path();
  if (bytes.size() < kHeader || std::memcmp(bytes.data(), kMagic, 9) != 0)
    fail_input("{}: not a Megatron-LM index (it must begin with MMIDIDX)", file);
  const uint64_t version = load<uint64_t>(bytes, 9);
  if (version != 1) fail_input("{}: index version {}, only 1 is known", file, version);
  const int code = load<uint8_t>(bytes, 17);
  if (code != 4 && code != 8)
    fail_input("{}: dtype code {}, only 4 (int32) and 8 (uint16) are read", file, code);
  token_bytes_ = code == 8 ? 2 : 4;
  const uint64_t sequences = load<uint64_t>(bytes, 18), indices = load<uint64_t>(bytes, 26);
  const uint64_t size = bytes.size();
  if (sequences > size / 12 || indices > size / 8 || indices < 1 ||
      kHeader + 12 * sequences + 8 * indices != size)
    fail_input("{}: {} bytes do not hold {} sequences and {} document indices", file, size,
               sequences, indices);
  sequences_ = int64_t(sequences);
  documents_ = int64_t(indices) - 1;
  tokens_ = int64_t(data_.bytes().size()) / token_bytes_;
  check_index();
}

void Corpus::check_index() const {
  const auto bytes = index_.bytes();
  const std::string& file = index_.path();
  int64_t expected = 0;
  for (int64_t i = 0; i < sequences_; ++i) {
    const int64_t length = load<int32_t>(bytes, kHeader + 4 * i);
    const int64_t offset = load<int64_t>(bytes, kHeader + 4 * sequences_ + 8 * i);
    if (length < 0) fail_input("{}: sequence {} has length {}", file, i, length);
    if (offset != expected)
      fail_input("{}: sequence {} is at byte {}, the lengths before it add up to {}", file, i,
                 offset, expected);
    expected += length * token_bytes_;
  }
  if (expected != int64_t(data_.bytes().size()))
    fail_input("{}: {} bytes, {} says {}", data_.path(), data_.bytes().size(), file, expected);
  int64_t previous = 0;
  for (int64_t d = 0; d <= documents_; ++d) {
    const int64_t first = load<int64_t>(bytes, kHeader + 12 * sequences_ + 8 * d);
    const bool ends_well = (d != 0 || first == 0) && (d != documents_ || first == sequences_);
    if (first < previous || first > sequences_ || !ends_well)
      fail_input("{}: document {} begins at sequence {}; they must ascend from 0 to {}", file, d,
                 first, sequences_);
    previous = first;
  }
}

void Corpus::read(int64_t begin, int64_t count, int32_t* out) const {
  if (begin < 0 || count < 0 || begin > tokens_ || count > tokens_ - begin)
    fail("{}: tokens [{}, {} + {}) are outside its {}", prefix_, begin, begin, count, tokens_);
  if (count == 0) return;
  const std::byte* from = data_.bytes().data() + begin * token_bytes_;
  if (token_bytes_ == 2) {
    const auto* ids = reinterpret_cast<const uint16_t*>(from);
    std::copy(ids, ids + count, out);
  } else {
    std::memcpy(out, from, size_t(count) * 4);
  }
}

int64_t Corpus::sequence_offset(int64_t i) const {
  if (i < 0 || i > sequences_) fail("{}: no sequence {} of {}", prefix_, i, sequences_);
  if (i == sequences_) return tokens_;
  return load<int64_t>(index_.bytes(), kHeader + 4 * sequences_ + 8 * i) / token_bytes_;
}

int64_t Corpus::document_offset(int64_t d) const {
  if (d < 0 || d > documents_) fail("{}: no document {} of {}", prefix_, d, documents_);
  return sequence_offset(load<int64_t>(index_.bytes(), kHeader + 12 * sequences_ + 8 * d));
}

int64_t Corpus::document_of(int64_t token) const {
  if (token < 0 || token >= tokens_) fail("{}: no token {} of {}", prefix_, token, tokens_);
  int64_t low = 0, high = documents_;  // document_offset(low) <= token < document_offset(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (document_offset(middle) <= token ? low : high) = middle;
  }
  return low;
}

CorpusWriter::CorpusWriter(const std::string& prefix, int64_t vocab_size, int64_t documents,
                           int64_t tokens)
    : prefix_(prefix),
      vocab_size_(vocab_size),
      documents_(documents),
      tokens_(tokens),
      token_bytes_(token_bytes_for(vocab_size)),
      bin_(prefix + ".bin.partial", true),
      lengths_(prefix + ".len.partial", true) {
  if (!can_continue(prefix, vocab_size, documents, tokens))
    fail_input("{}.bin.partial holds fewer than {} documents of {} tokens", prefix, documents,
               tokens);
  bin_.resize(uint64_t(tokens) * uint64_t(token_bytes_));
  lengths_.resize(uint64_t(documents) * 4);
}

bool CorpusWriter::can_continue(const std::string& prefix, int64_t vocab_size, int64_t documents,
                                int64_t tokens) {
  return documents >= 0 && tokens >= 0 && file_size(prefix + ".len.partial") >= documents * 4 &&
         file_size(prefix + ".bin.partial") >= tokens * token_bytes_for(vocab_size);
}

void CorpusWriter::add(std::span<const int32_t> ids) {
  if (ids.size() > INT32_MAX) fail_input("a document of {} tokens is too long", ids.size());
  const size_t at = bin_buffer_.size();
  bin_buffer_.resize(at + ids.size() * size_t(token_bytes_));
  char* to = bin_buffer_.data() + at;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size_)
      fail("token id {} is outside the vocabulary of {}", id, vocab_size_);
    std::memcpy(to, &id, size_t(token_bytes_));  // the low bytes come first
    to += token_bytes_;
  }
  length_buffer_.push_back(int32_t(ids.size()));
  ++documents_;
  tokens_ += int64_t(ids.size());
  if (bin_buffer_.size() > kBuffer || length_buffer_.size() > kBuffer / 4) drain();
}

void CorpusWriter::drain() {
  bin_.write(bin_buffer_.data(), bin_buffer_.size());
  lengths_.write(length_buffer_.data(), length_buffer_.size() * 4);
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
  OutputFile out(prefix_ + ".idx.partial");
  std::string buffer(std::begin(kMagic), std::begin(kMagic) + 9);
  const auto put = [&](auto value) {
    buffer.append(reinterpret_cast<const char*>(&value), sizeof value);
    if (buffer.size() < kBuffer) return;
    out.write(buffer.data(), buffer.size());
    buffer.clear();
  };
  put(uint64_t(1));
  put(uint8_t(token_bytes_ == 2 ? 8 : 4));
  put(uint64_t(documents_));
  put(uint64_t(documents_ + 1));
  for (int64_t d = 0; d < documents_; ++d) put(load<int32_t>(lengths.bytes(), 4 * d));
  int64_t offset = 0;
  for (int64_t d = 0; d < documents_; ++d) {
    put(offset);
    offset += int64_t(load<int32_t>(lengths.bytes(), 4 * d)) * token_bytes_;
  }
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
  rename_or_fail(prefix_ + ".bin.partial", prefix_ + ".bin");
  rename_or_fail(prefix_ + ".idx.partial", prefix_ + ".idx");
  ::unlink((prefix_ + ".len.partial").c_str());
  const size_t slash = prefix_.rfind('/');
  fsync_directory(slash == prefix_.npos ? "." : prefix_.substr(0, slash + 1));
}

}  // namespace pith
