#include "data/tokenize.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"
#include "data/corpus.h"
#include "data/tokenizer.h"
#include "testing.h"

namespace pith {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

std::string tokenizer_dir() { return PITH_SOURCE_DIR "/examples/tiny"; }

void put(const std::string& path, std::string_view text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

TokenizeOptions options(const Strings& inputs, const std::string& output) {
  TokenizeOptions o;
  o.tokenizer = tokenizer_dir();
  o.inputs = inputs;
  o.output = output;
  o.workers = 2;
  return o;
}

// The documents of a corpus as text, each without its end-of-text token, which must be there.
Strings documents(const std::string& prefix) {
  const Tokenizer t(tokenizer_dir());
  const Corpus c(prefix);
  Strings out;
  const std::vector<int64_t>& offsets = c.document_offsets();
  for (size_t d = 0; d + 1 < offsets.size(); ++d) {
    std::vector<int32_t> ids(size_t(offsets[d + 1] - offsets[d]));
    c.read(offsets[d], int64_t(ids.size()), ids.data());
    EXPECT_EQ(ids.back(), *t.eos_id());
    ids.pop_back();
    out.push_back(t.decode(ids));
  }
  return out;
}

std::string line_of(const std::string& text, const std::string& key = "text") {
  Value v;
  v["n"] = 1;
  v[key] = text;
  return v.json() + "\n";
}

std::string zstd(const std::string& text) {
  const std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(),
                                                                   &ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);  // as the program zstd does
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress2(context.get(), out.data(), out.size(), text.data(), text.size()));
  return out;
}

std::string gzip(const std::string& text) {
  const TempDir dir;
  const gzFile file = gzopen((dir / "gz").c_str(), "wb");
  gzwrite(file, text.data(), unsigned(text.size()));
  gzclose(file);
  return read_file(dir / "gz");
}

std::string message_of(const TokenizeOptions& o) {
  try {
    tokenize_corpus(o);
  } catch (const InputError& e) {
    return e.what();
  }
  return "no InputError";
}

std::string some_text(size_t i) {
  std::string text = "document " + std::to_string(i) + ":";
  for (size_t k = 0; k < i % 97; ++k)
    text += " word" + std::to_string(i * 31 % (k + 7)) + (k % 9 ? "" : ";\n");
  return text;
}

TEST(Tokenize, EveryKindOfInput) {
  const TempDir dir;
  put(dir / "a.txt", "first");
  put(dir / "b.jsonl",
      line_of("second") + "\n  \n" + line_of("third\nline") + line_of("last", "text"));
  const std::string more = line_of("packed one") + line_of("packed two");
  const std::string gzipped = gzip(more), packed = zstd(more);
  put(dir / "c.jsonl.gz", gzipped + gzipped);  // two members
  put(dir / "d.jsonl.zst", packed + packed);   // two frames
  put(dir / "empty.txt", "");
  const TokenizeResult r = tokenize_corpus(options(
      {dir / "a.txt", dir / "b.jsonl", dir / "c.jsonl.gz", dir / "d.jsonl.zst", dir / "empty.txt"},
      dir / "out/c"));
  EXPECT_EQ(
      documents(dir / "out/c"),
      (Strings{"first", "second", "third\nline", "last", "packed one", "packed two", "packed one",
               "packed two", "packed one", "packed two", "packed one", "packed two"}));
  EXPECT_EQ(r.documents, 12);
  EXPECT_EQ(r.tokens, Corpus(dir / "out/c").tokens());
  EXPECT_EQ(r.bytes, 5 + 6 + 10 + 4 + 80);
  EXPECT_NE(r.str().find("12 documents"), std::string::npos);

  put(dir / "empty.jsonl", "");
  put(dir / "empty.jsonl.gz", gzip(""));
  put(dir / "empty.jsonl.zst", zstd(""));
  EXPECT_NE(
      message_of(options({dir / "empty.jsonl", dir / "empty.jsonl.gz", dir / "empty.jsonl.zst"},
                         dir / "bad"))
          .find("no text"),
      std::string::npos);
  const auto refused = [&](const std::string& name, const std::string& bytes) {
    put(dir / name, bytes);
    const std::string message = message_of(options({dir / name}, dir / "bad"));
    EXPECT_NE(message.find(name), message.npos) << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
  };
  for (size_t cut : {3, 20}) {
    refused("cut.jsonl.zst", packed.substr(0, packed.size() - cut));
    refused("cut.jsonl.gz", gzipped.substr(0, gzipped.size() - cut));
  }
  for (const size_t at : {0, 12, 30}) {
    std::string bad_zstd = packed, bad_gzip = gzipped;
    bad_zstd[at] ^= 0x41;
    bad_gzip[at] ^= 0x41;
    refused("bad.jsonl.zst", bad_zstd);
    refused("bad.jsonl.gz", bad_gzip);
  }
  EXPECT_FALSE(fs::exists(dir / "bad.bin") || fs::exists(dir / "bad.idx"));
}

TEST(Tokenize, DirectoriesAndGlobs) {
  const TempDir dir;
  put(dir / "tree/b.h", "b");
  put(dir / "tree/a/z.h", "az");
  put(dir / "tree/a/z.txt", "text");
  put(dir / "tree/.git/config", "hidden");
  put(dir / "tree/image.h", std::string("\x89PNG\0\1\2", 7));
  put(dir / "tree/lines.jsonl", line_of("a line"));
  fs::create_directory_symlink(dir / "tree", dir / "tree/a/loop");
  put(dir / "elsewhere/e.h", "linked");
  fs::create_directory_symlink(dir / "elsewhere", dir / "tree/link");
  fs::create_symlink(dir / "absent", dir / "tree/dangling.h");
  TokenizeOptions o = options({dir / "tree/"}, dir / "c");
  tokenize_corpus(o);
  EXPECT_EQ(documents(dir / "c"), (Strings{"az", "text", "b", "a line", "linked"}));
  o.globs = {"*.txt", "a/*.h", "lines*"};
  o.output = dir / "d";
  tokenize_corpus(o);
  EXPECT_EQ(documents(dir / "d"), (Strings{"az", "text", "a line"}));
  o.globs = {"*.nothing"};
  o.output = dir / "e";
  EXPECT_NE(message_of(o).find("--glob"), std::string::npos);
}

TEST(Tokenize, StandardInput) {
  const TempDir dir;
  const auto run = [&](const std::string& text, const std::string& output) {
    put(dir / "stdin", text);
    const int keep = ::dup(0);
    if (!freopen((dir / "stdin").c_str(), "rb", stdin)) ADD_FAILURE();
    tokenize_corpus(options({"-"}, output));
    ::dup2(keep, 0);
    ::close(keep);
    return documents(output);
  };
  EXPECT_EQ(run(" \n" + line_of("one") + line_of("two"), dir / "a"), (Strings{"one", "two"}));
  EXPECT_EQ(run("plain\n{text}\n", dir / "b"), (Strings{"plain\n{text}\n"}));
  EXPECT_EQ(run("other", dir / "b"), (Strings{"other"}));  // never taken for the same input
}

TEST(Tokenize, SameOutputForAnyNumberOfWorkers) {
  const TempDir dir;
  std::string lines;
  for (size_t i = 0; lines.size() < 5000000; ++i) lines += line_of(some_text(i));
  put(dir / "a.jsonl", lines);
  for (size_t i = 0; i < 600; ++i) put(dir / ("tree/" + std::to_string(i) + ".txt"), some_text(i));
  std::string bin, idx;
  for (const int workers : {1, 2, 7}) {
    TokenizeOptions o =
        options({dir / "a.jsonl", dir / "tree"}, dir / ("c" + std::to_string(workers)));
    o.workers = workers;
    tokenize_corpus(o);
    if (bin.empty()) {
      bin = read_file(o.output + ".bin");
      idx = read_file(o.output + ".idx");
      const Strings texts = documents(o.output);
      EXPECT_EQ(texts[777], some_text(777));
      EXPECT_EQ(texts.back(), some_text(99));  // sorted as text
    }
    EXPECT_EQ(read_file(o.output + ".bin"), bin);
    EXPECT_EQ(read_file(o.output + ".idx"), idx);
  }
}

TEST(Tokenize, UpToDate) {
  const TempDir dir;
  put(dir / "a.txt", "some text");
  TokenizeOptions o = options({dir / "a.txt"}, dir / "c");
  const TokenizeResult first = tokenize_corpus(o);
  EXPECT_FALSE(first.up_to_date);
  const TokenizeResult again = tokenize_corpus(o);
  EXPECT_TRUE(again.up_to_date);
  EXPECT_EQ(again.tokens, first.tokens);
  EXPECT_EQ(again.bytes, 9);
  o.eos = false;
  const TokenizeResult without = tokenize_corpus(o);
  EXPECT_FALSE(without.up_to_date);
  EXPECT_EQ(without.tokens, first.tokens - 1);
  put(dir / "a.txt", "some other text");
  EXPECT_FALSE(tokenize_corpus(o).up_to_date);
  put(dir / "c.bin", "x");  // damaged since
  EXPECT_THROW(tokenize_corpus(o), InputError);
}

TEST(Tokenize, BadInput) {
  const TempDir dir;
  const auto says = [&](const Strings& inputs, const std::string& what) {
    const std::string message = message_of(options(inputs, dir / "c"));
    EXPECT_NE(message.find(what), message.npos) << message;
    EXPECT_FALSE(fs::exists(dir / "c.bin") || fs::exists(dir / "c.idx") ||
                 fs::exists(dir / "c.tokenize.json"));
  };
  put(dir / "a.jsonl", line_of("fine") + line_of("fine") + "{\"text\": \"cut\n");
  says({dir / "a.jsonl"}, "a.jsonl:3");
  put(dir / "a.jsonl", line_of("fine") + "\n" + line_of("x", "content"));
  says({dir / "a.jsonl"}, "a.jsonl:3");
  put(dir / "a.jsonl", line_of("fine") + "{\"text\": 5}");
  says({dir / "a.jsonl"}, "a.jsonl:2");
  put(dir / "a.jsonl", "[1]\n");
  says({dir / "a.jsonl"}, "a.jsonl:1");
  put(dir / "empty.txt", "");
  says({dir / "empty.txt"}, "no text");
  says({dir / "absent.txt"}, "absent.txt");
  put(dir / "a.txt.gz", "x");
  says({dir / "a.txt.gz"}, "a.txt.gz");
  // Of several bad lines the first is reported, whoever meets it first.
  std::string lines;
  while (lines.size() < 4000000) lines += line_of(some_text(lines.size()));
  const auto line = std::count(lines.begin(), lines.end(), '\n') + 1;
  put(dir / "a.jsonl", lines + "bad\n" + lines + "bad\n");
  TokenizeOptions o = options({dir / "a.jsonl"}, dir / "c");
  o.workers = 4;
  const std::string message = message_of(o);
  EXPECT_NE(message.find("a.jsonl:" + std::to_string(line) + ":"), message.npos) << message;
  o.workers = -1;
  EXPECT_NE(message_of(o).find("--workers"), std::string::npos);
}

TEST(Tokenize, ContinuesAfterKill) {
  const TempDir dir;
  std::string lines;
  for (size_t i = 0; lines.size() < 30000000; ++i) lines += line_of(some_text(i));
  put(dir / "a.jsonl", lines);
  TokenizeOptions o = options({dir / "a.jsonl"}, dir / "c");
  const pid_t child = ::fork();
  if (child == 0) {
    if (!freopen("/dev/null", "w", stderr)) ::_exit(3);
    tokenize_corpus(o);
    ::_exit(0);
  }
  int status = 0;
  pid_t ended = 0;
  while (ended == 0) {
    if (fs::exists(dir / "c.tokenize.partial")) ::kill(child, SIGKILL);
    ::usleep(1000);
    ended = ::waitpid(child, &status, WNOHANG);
  }
  ASSERT_TRUE(WIFSIGNALED(status)) << "finished before it could be killed";
  EXPECT_FALSE(fs::exists(dir / "c.bin") || fs::exists(dir / "c.idx"));
  const TokenizeResult r = tokenize_corpus(o);
  EXPECT_GT(r.continued, 0);
  o.output = dir / "whole";
  const TokenizeResult whole = tokenize_corpus(o);
  EXPECT_EQ(whole.continued, 0);
  EXPECT_EQ(r.documents, whole.documents);
  EXPECT_EQ(r.bytes, whole.bytes);
  EXPECT_TRUE(read_file(dir / "c.bin") == read_file(dir / "whole.bin"));
  EXPECT_TRUE(read_file(dir / "c.idx") == read_file(dir / "whole.idx"));
  EXPECT_FALSE(fs::exists(dir / "c.tokenize.partial") || fs::exists(dir / "c.bin.partial"));

  // What another run left is not continued.
  put(dir / "c.tokenize.partial",
      R"({"fingerprint":"0123456789abcdef","chunks":1,"documents":1,"tokens":1,"bytes":5})");
  put(dir / "c.bin.partial", "xxxxxxxx");
  o.output = dir / "c";
  put(dir / "a.jsonl", line_of("new"));
  EXPECT_EQ(tokenize_corpus(o).continued, 0);
  EXPECT_EQ(documents(dir / "c"), Strings{"new"});
}

}  // namespace
}  // namespace pith
