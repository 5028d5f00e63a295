#include "data/corpus.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>

#include "core/error.h"
#include "core/file.h"
#include "testing.h"

namespace pith {
namespace {

using Ids = std::vector<int32_t>;

void write(const std::string& prefix, int64_t vocab, const std::vector<Ids>& documents) {
  CorpusWriter writer(prefix, vocab);
  for (const Ids& d : documents) writer.add(d, Ids{int32_t(d.size())});
  EXPECT_FALSE(exists(prefix + ".idx"));
  writer.finish();
}

TEST(Corpus, RoundTrip) {
  for (const int64_t vocab : {300, 65499, 65500, 200000}) {
    const TempDir dir;
    const int32_t top = int32_t(vocab - 1);
    write(dir / "c", vocab, {{1, 2, top}, {7}, {0, top, 5, 6}});
    const Corpus c(dir / "c");
    EXPECT_EQ(read_file(dir / "c.bin").size(), vocab < 65500 ? 16u : 32u);
    EXPECT_EQ(c.tokens(), 8);
    Ids all(8);
    c.read(0, 8, all.data());
    EXPECT_EQ(all, (Ids{1, 2, top, 7, 0, top, 5, 6}));
    int32_t two[2];
    c.read(2, 2, two);
    EXPECT_EQ(two[0], top);
    EXPECT_EQ(two[1], 7);
    c.read(8, 0, two);
    EXPECT_THROW(c.read(7, 2, two), Error);
    EXPECT_THROW(c.read(-1, 1, two), Error);
    EXPECT_EQ(c.document_offsets(), (std::vector<int64_t>{0, 3, 4, 8}));
    EXPECT_FALSE(exists(dir / "c.bin.partial") || exists(dir / "c.len.partial"));
  }
}

TEST(Corpus, FileLayout) {
  const TempDir dir;
  write(dir / "c", 300, {{1, 2}, {258}});
  EXPECT_EQ(read_file(dir / "c.bin"), std::string("\1\0\2\0\2\1", 6));
  std::string want("MMIDIDX\0\0", 9);
  const auto put = [&](auto v) { want.append(reinterpret_cast<const char*>(&v), sizeof v); };
  put(uint64_t(1)), put(uint8_t(8)), put(uint64_t(2)), put(uint64_t(3));
  put(int32_t(2)), put(int32_t(1)), put(int64_t(0)), put(int64_t(4));
  put(int64_t(0)), put(int64_t(1)), put(int64_t(2));
  EXPECT_EQ(read_file(dir / "c.idx"), want);
}

TEST(Corpus, DocumentsOfSeveralSequences) {
  const TempDir dir;
  write(dir / "c", 300, {{1, 2}, {3}, {4, 5, 6}});
  std::string index =
      read_file(dir / "c.idx");  // now sequences 0 and 1 are a document, and one is empty
  const int64_t documents[] = {0, 2, 2, 3};
  index.resize(34 + 12 * 3);
  const uint64_t count = 4;
  std::memcpy(index.data() + 26, &count, 8);
  index.append(reinterpret_cast<const char*>(documents), sizeof documents);
  write_file_atomic(dir / "c.idx", index);
  const Corpus c(dir / "c");
  EXPECT_EQ(c.document_offsets(), (std::vector<int64_t>{0, 3, 3, 6}));
}

TEST(Corpus, Continues) {
  const TempDir dir;
  write(dir / "whole", 70000, {{1, 2, 3}, {4}, {5, 69999}});
  {
    CorpusWriter writer(dir / "c", 70000);
    writer.add(Ids{1, 2, 3}, Ids{3});
    writer.add(Ids{4}, Ids{1});
    writer.flush_to_disk();
    writer.add(Ids{9, 9, 9}, Ids{3});  // not said to be safe, so dropped
    writer.flush_to_disk();
  }
  CorpusWriter writer(dir / "c", 70000, 2, 4);
  writer.add(Ids{5, 69999}, Ids{2});
  EXPECT_EQ(writer.documents(), 3);
  EXPECT_EQ(writer.tokens(), 6);
  writer.finish();
  EXPECT_EQ(read_file(dir / "c.bin"), read_file(dir / "whole.bin"));
  EXPECT_EQ(read_file(dir / "c.idx"), read_file(dir / "whole.idx"));

  CorpusWriter more(dir / "d", 70000);
  more.add(Ids{1, 2, 3}, Ids{3});
  more.flush_to_disk();
  CorpusWriter fresh(dir / "d", 70000, 1, 4);  // more than there is
  EXPECT_EQ(fresh.documents(), 0);
  EXPECT_EQ(fresh.tokens(), 0);
}

TEST(Corpus, WriterRefuses) {
  const TempDir dir;
  CorpusWriter writer(dir / "c", 300);
  EXPECT_THROW(writer.finish(), InputError);
  EXPECT_THROW(writer.add(Ids{300}, Ids{1}), Error);
  EXPECT_THROW(writer.add(Ids{-1}, Ids{1}), Error);
  EXPECT_FALSE(exists(dir / "c.bin"));
}

TEST(Corpus, HostileFiles) {
  const TempDir dir;
  const std::string prefix = dir / "c";
  write(prefix, 300, {{1, 2}, {3}});
  const std::string index = read_file(prefix + ".idx"), bin = read_file(prefix + ".bin");
  const auto refused = [&](const std::string& idx, const std::string& data,
                           const std::string& why) {
    std::ofstream(prefix + ".idx", std::ios::binary) << idx;
    std::ofstream(prefix + ".bin", std::ios::binary) << data;
    try {
      const Corpus c(prefix);
      ADD_FAILURE() << "accepted: " << why;
    } catch (const InputError& e) {
      EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
    }
  };
  const auto patched = [&](size_t at, auto value) {
    std::string copy = index;
    std::memcpy(copy.data() + at, &value, sizeof value);
    return copy;
  };
  for (size_t n = 0; n < index.size(); ++n)
    refused(index.substr(0, n), bin, n < 34 ? "not a Megatron-LM index" : "bytes do not hold");
  refused(index + "x", bin, "bytes do not hold");
  refused(patched(0, 'X'), bin, "not a Megatron-LM index");
  refused(patched(9, uint64_t(2)), bin, "version 2");
  refused(patched(17, uint8_t(6)), bin, "dtype code 6");
  refused(patched(17, uint8_t(4)), bin, "at byte 4");
  refused(patched(18, uint64_t(3)), bin, "bytes do not hold");
  refused(patched(18, ~uint64_t(0)), bin, "bytes do not hold");
  refused(patched(18, uint64_t(1) << 62), bin, "bytes do not hold");
  refused(patched(26, uint64_t(0)), bin, "bytes do not hold");
  refused(patched(34, int32_t(-2)), bin, "length -2");
  refused(patched(34, int32_t(1)), bin, "at byte 4");
  refused(patched(38, int32_t(1 << 30)), bin, "c.bin: 6 bytes");
  refused(patched(42, int64_t(2)), bin, "at byte 2");
  refused(patched(50, int64_t(1) << 40), bin, "sequence 1");
  refused(patched(58, int64_t(1)), bin, "begins at sequence 1");
  refused(patched(66, int64_t(5)), bin, "begins at sequence 5");
  refused(patched(66, int64_t(-1)), bin, "begins at sequence -1");
  refused(patched(74, int64_t(1)), bin, "begins at sequence 1");
  refused(index, bin.substr(0, 5), "5 bytes");
  refused(index, bin + "xx", "8 bytes");
  refused(index, "", "0 bytes");
  write_file_atomic(prefix + ".idx", index);
  write_file_atomic(prefix + ".bin", bin);
  EXPECT_EQ(Corpus(prefix).tokens(), 3);
  EXPECT_THROW(Corpus(dir / "absent"), InputError);
}

}  // namespace
}  // namespace pith
