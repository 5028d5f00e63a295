#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <random>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"
#include "data/pretokenize.h"
#include "testing.h"

namespace pith {
namespace {

using Strings = std::vector<std::string>;
using Ids = std::vector<int32_t>;

std::string spelled(std::string_view bytes) {  // as a vocabulary spells bytes
  std::string out;
  uint32_t next = 0x100, of[256];
  for (uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b > 0x20 && b < 0x7f) || (b > 0xa0 && b != 0xad);
    of[b] = printable ? b : next++;
  }
  for (const char c : bytes) append_utf8(of[static_cast<unsigned char>(c)], out);
  return out;
}

// Every byte is a token with its own value as id; then the merges, in order. Members of `more`
// replace those of the file.
std::string write_tokenizer(const TempDir& dir,
                            const std::vector<std::pair<std::string, std::string>>& merges,
                            const std::map<std::string, std::string>& more = {},
                            const std::map<std::string, std::string>& model = {}) {
  Value json, bpe, vocab = Value::object(), list = Value::array();
  int id = 0;
  for (; id < 256; ++id) vocab[spelled(std::string(1, char(id)))] = id;
  for (const auto& [left, right] : merges) {
    if (!vocab.find(spelled(left + right))) vocab[spelled(left + right)] = id++;
    list.push_back(Value::array({Value(spelled(left)), Value(spelled(right))}));
  }
  bpe["type"] = "BPE";
  bpe["vocab"] = vocab;
  bpe["merges"] = list;
  for (const auto& [key, text] : model) bpe[key] = parse_json(text, key);
  json["model"] = bpe;
  json["normalizer"] = Value();
  json["pre_tokenizer"] =
      parse_json(R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false})", "");
  json["decoder"] = parse_json(R"({"type":"ByteLevel"})", "");
  for (const auto& [key, text] : more) json[key] = parse_json(text, key);
  const std::string path = dir / "tokenizer.json";
  std::ofstream(path) << json.json();
  return path;
}

Strings pieces(const std::string& steps, const std::string& text) {
  const std::string last = R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false})";
  PreTokenizer p(
      parse_json(R"({"type":"Sequence","pretokenizers":[)" + steps + "," + last + "]}", ""));
  Strings out;
  p.split(text, [&](std::string_view piece) { out.emplace_back(piece); });
  return out;
}

Strings split(const std::string& pattern, const std::string& text,
              const std::string& behavior = "Isolated", bool invert = false) {
  Value step, regex;
  regex["Regex"] = pattern;
  step["type"] = "Split";
  step["pattern"] = regex;
  step["behavior"] = behavior;
  step["invert"] = invert;
  return pieces(step.json(), text);
}

TEST(Tokenizer, GoldenCases) {
  for (const char* name : {"tokenizer_qwen", "tokenizer_gptoss"}) {
    const std::string dir = golden_dir() + "/" + name;
    const Tokenizer t(dir);
    PieceCache cache(64);  // so small that pieces replace each other
    const Value cases = parse_json(read_file(dir + "/cases.json"), name);
    EXPECT_GT(cases.items().size(), 10u);
    for (const Value& c : cases.items()) {
      Ids want;
      for (const Value& id : c.at("ids").items()) want.push_back(int32_t(id.as_int()));
      const std::string& text = c.at("text").as_string();
      for (PieceCache* given : {&cache, &cache, static_cast<PieceCache*>(nullptr)})
        EXPECT_EQ(t.encode(text, given), want) << name << ": " << text;
      EXPECT_EQ(t.decode(want), c.at("decoded").as_string());
    }
    EXPECT_EQ(t.vocab_size(), 2000);
    EXPECT_EQ(t.eos_id(), 0);
    EXPECT_EQ(t.encode("<|im_end|>"), Ids{2});
    EXPECT_EQ(t.decode(Ids{1, 42, 2}), "<|im_start|>H<|im_end|>");
  }
}

// The oracle: look for the best pair from scratch, over and over.
Ids naive_bpe(Ids ids, const std::vector<std::array<int32_t, 3>>& merges) {
  for (;;) {
    size_t best = merges.size(), at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i)
      for (size_t r = 0; r < best; ++r)
        if (merges[r][0] == ids[i] && merges[r][1] == ids[i + 1]) {
          best = r;
          at = i;
        }
    if (best == merges.size()) return ids;
    ids[at] = merges[best][2];
    ids.erase(ids.begin() + ptrdiff_t(at) + 1);
  }
}

TEST(Tokenizer, MergesAsTheNaiveAlgorithm) {
  std::mt19937 random(7);
  for (int round = 0; round < 20; ++round) {
    const TempDir dir;
    std::vector<std::pair<std::string, std::string>> merges;
    std::vector<std::array<int32_t, 3>> table;
    Strings tokens = {"a", "b", "c"};
    std::map<std::string, int32_t> ids = {{"a", 'a'}, {"b", 'b'}, {"c", 'c'}};
    while (merges.size() < 25) {
      const std::string left = tokens[random() % tokens.size()],
                        right = tokens[random() % tokens.size()];
      if (std::count(merges.begin(), merges.end(), std::pair(left, right))) continue;
      merges.emplace_back(left, right);
      const auto [it, is_new] = ids.emplace(left + right, 256 + int32_t(ids.size()) - 3);
      if (is_new) tokens.push_back(left + right);
      table.push_back({ids[left], ids[right], it->second});
    }
    const Tokenizer t(write_tokenizer(dir, merges));
    PieceCache cache(1 << 10);
    for (int i = 0; i < 200; ++i) {
      std::string text(random() % 60, 'a');
      for (char& c : text) c = "abcabcabcd"[random() % 10];
      const Ids got = t.encode(text, &cache);
      ASSERT_EQ(got, naive_bpe(Ids(text.begin(), text.end()), table)) << text;
      ASSERT_EQ(t.decode(got), text);
    }
  }
}

TEST(Tokenizer, LegacyMergesIgnoreMergesAndUnknownBytes) {
  const TempDir dir;
  const Tokenizer legacy(
      write_tokenizer(dir, {{"a", "b"}}, {}, {{"merges", R"(["#version: 0.2","a b"])"}}));
  EXPECT_EQ(legacy.encode("ab"), Ids{256});
  // Without the merge "ab" + "c" the token abc can only be reached as a whole.
  const std::vector<std::pair<std::string, std::string>> merges = {{"a", "b"}, {"ab", "c"}};
  const std::map<std::string, std::string> one = {{"merges", R"([["a","b"]])"}};
  EXPECT_EQ(Tokenizer(write_tokenizer(dir, merges, {}, one)).encode("abc"), (Ids{256, 'c'}));
  auto ignoring = one;
  ignoring["ignore_merges"] = "true";
  EXPECT_EQ(Tokenizer(write_tokenizer(dir, merges, {}, ignoring)).encode("abc"), Ids{257});

  std::map<std::string, std::string> small = {{"vocab", R"({"a":0,"b":1,"?":2,"ab":3})"},
                                              {"merges", R"([["a","b"]])"}};
  EXPECT_EQ(Tokenizer(write_tokenizer(dir, {}, {}, small)).encode("axxb"), Ids{3});  // x vanishes
  small["unk_token"] = "\"?\"";
  EXPECT_EQ(Tokenizer(write_tokenizer(dir, {}, {}, small)).encode("axxb"), (Ids{0, 2, 2, 1}));
  small["fuse_unk"] = "true";
  EXPECT_EQ(Tokenizer(write_tokenizer(dir, {}, {}, small)).encode("axxb"), (Ids{0, 2, 1}));
}

TEST(Tokenizer, AddedTokens) {
  const TempDir dir;
  const auto ids = [&](const std::string& flags, const std::string& content,
                       const std::string& text) {
    return Tokenizer(write_tokenizer(dir, {},
                                     {{"added_tokens", "[{\"id\":256,\"content\":\"" + content +
                                                           "\",\"special\":true," + flags + "}]"}}))
        .encode(text);
  };
  const int32_t X = 256;
  EXPECT_EQ(ids("\"lstrip\":false", "<x>", " <x> <x>"), (Ids{' ', X, ' ', X}));
  EXPECT_EQ(ids("\"lstrip\":true", "<x>", "a \t<x> b"), (Ids{'a', X, ' ', 'b'}));
  EXPECT_EQ(ids("\"rstrip\":true", "<x>", "a <x>\xc2\xa0\n b"), (Ids{'a', ' ', X, 'b'}));
  EXPECT_EQ(ids("\"single_word\":true", "xy", "xy xyz _xy (xy)"),
            (Ids{X, ' ', 'x', 'y', 'z', ' ', '_', 'x', 'y', ' ', '(', X, ')'}));
  EXPECT_EQ(ids("\"single_word\":true", "xy", "\xc3\xa9xy xy\xcc\x81"),
            (Ids{0xc3, 0xa9, 'x', 'y', ' ', 'x', 'y', 0xcc, 0x81}));
  // The second match was stripped away with the first, and counts no more.
  EXPECT_EQ(ids("\"lstrip\":true,\"rstrip\":true", "  ", "a    b"), (Ids{'a', X, 'b'}));

  const std::map<std::string, std::string> two = {
      {"added_tokens",
       R"([{"id":256,"content":"<a>","special":true},{"id":257,"content":"<a><b>","special":false},
                           {"id":258,"content":"e\u0301","normalized":true}])"},
      {"normalizer", R"({"type":"Sequence","normalizers":[{"type":"NFC"}]})"}};
  const Tokenizer t(write_tokenizer(dir, {}, two));
  EXPECT_EQ(t.encode("<a><b><a>"), (Ids{257, 256}));  // the longest at the leftmost place
  EXPECT_EQ(t.encode("\xc3\xa9"
                     "e\xcc\x81"),
            (Ids{258, 258}));  // both are U+00E9 once normalized
  EXPECT_EQ(t.decode(Ids{257, 256, 'z'}), "<a><b><a>z");
  EXPECT_EQ(t.vocab_size(), 259);
}

TEST(Tokenizer, EndOfText) {
  const TempDir dir;
  const std::string added = R"([{"id":256,"content":"<|endoftext|>","special":true},
                               {"id":257,"content":"<|done|>","special":true}])";
  const std::string path = write_tokenizer(dir, {}, {{"added_tokens", added}});
  EXPECT_EQ(Tokenizer(path).eos_id(), 256);
  write_file_atomic(dir / "tokenizer_config.json", R"({"eos_token":{"content":"<|done|>"}})");
  EXPECT_EQ(Tokenizer(path).eos_id(), 257);
  write_file_atomic(dir / "tokenizer_config.json", R"({"eos_token":"<|done|>"})");
  EXPECT_EQ(Tokenizer(dir.path).eos_id(), 257);
  write_tokenizer(dir, {});
  EXPECT_FALSE(Tokenizer(path).eos_id().has_value());
}

TEST(Tokenizer, MalformedUtf8) {
  const TempDir dir;
  const Tokenizer t(write_tokenizer(dir, {}));
  const auto through = [&](const std::string& text) { return t.decode(t.encode(text)); };
  const std::string r = "\xef\xbf\xbd";
  EXPECT_EQ(through("a\xff"
                    "b"),
            "a" + r + "b");
  EXPECT_EQ(through("\xf0\x9f\x98"), r);  // a truncated emoji is one subpart
  EXPECT_EQ(through("\xf0\x9f\x98x\xe4\xb8"), r + "x" + r);
  EXPECT_EQ(through("\xc0\x80"), r + r);                  // overlong
  EXPECT_EQ(through("\xed\xa0\x80"), r + r + r);          // a surrogate
  EXPECT_EQ(through("\xf4\x90\x80\x80"), r + r + r + r);  // beyond U+10FFFF
  EXPECT_EQ(through("\xf0\x8f\xbf\xbf"), r + r + r + r);
  EXPECT_EQ(t.decode(Ids{'h', 0xe4, 0xb8}), "h" + r);
  EXPECT_EQ(t.decode(Ids{-1, 'h', 9999}), "h");
}

TEST(Tokenizer, Nfc) {
  const auto nfc = [](const std::string& text) { return normalize_nfc(text); };
  EXPECT_EQ(nfc("caf\x65\xcc\x81 au lait"), "caf\xc3\xa9 au lait");
  EXPECT_EQ(nfc("\xc3\xa9"), "\xc3\xa9");
  EXPECT_EQ(nfc("a\xcc\x81\xcc\xa3z"),
            "\xe1\xba\xa1\xcc\x81z");  // U+0323 is reordered before U+0301
  EXPECT_EQ(nfc("\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8"), "\xea\xb0\x81");  // conjoining jamo
  EXPECT_EQ(nfc("\xe2\x84\xab"), "\xc3\x85");                              // the angstrom sign
}

TEST(PreTokenizer, Behaviors) {
  const std::string s = "ab  12\xc3\xa9"
                        "3\n\n x9",
                    e = "\xc3\xa9", p = "\\s|\\d";
  EXPECT_EQ(split(p, s), (Strings{"ab", " ", " ", "1", "2", e, "3", "\n", "\n", " ", "x", "9"}));
  EXPECT_EQ(split(p, s, "Removed"), (Strings{"ab", e, "x"}));
  EXPECT_EQ(split(p, s, "Removed", true), (Strings{" ", " ", "1", "2", "3", "\n", "\n", " ", "9"}));
  EXPECT_EQ(split(p, s, "MergedWithPrevious"),
            (Strings{"ab ", " ", "1", "2", e + "3", "\n", "\n", " ", "x9"}));
  EXPECT_EQ(split(p, s, "MergedWithPrevious", true),
            (Strings{"ab", " ", " ", "1", "2" + e, "3", "\n", "\n", " x", "9"}));
  EXPECT_EQ(split(p, s, "MergedWithNext"),
            (Strings{"ab", " ", " ", "1", "2" + e, "3", "\n", "\n", " x", "9"}));
  EXPECT_EQ(split(p, s, "MergedWithNext", true),
            (Strings{"ab ", " ", "1", "2", e + "3", "\n", "\n", " ", "x9"}));
  EXPECT_EQ(split(p, s, "Contiguous"), (Strings{"ab", "  12", e, "3\n\n ", "x", "9"}));
  EXPECT_EQ(pieces(R"({"type":"Digits","individual_digits":true})", s),
            (Strings{"ab  ", "1", "2", e, "3", "\n\n x", "9"}));
  EXPECT_EQ(pieces(R"({"type":"Digits","individual_digits":false})", s),
            (Strings{"ab  ", "12", e, "3", "\n\n x", "9"}));
  EXPECT_EQ(
      pieces(R"({"type":"Split","pattern":{"String":"b."},"behavior":"Isolated","invert":false})",
             "ab.bc"),
      (Strings{"a", "b.", "bc"}));
}

// Pieces as the library cuts them; each pattern means something else, or nothing, to other engines.
TEST(PreTokenizer, OnigurumaSemantics) {
  const std::string mvs = "\xe1\xa0\x8e", s = "\xc5\xbf", k = "K\xcc\x81",
                    two = "\xc2\xb2";  // U+180E, U+017F, U+00B2
  const std::string t = "12345 dead" + mvs + " " + s + "s " + k + "\nx" + two + "g\n";
  const std::string rest = " dead" + mvs + " " + s + "s " + k + "\nx";
  EXPECT_EQ(split("\\p{N}{1,3}+", t),
            (Strings{"12345", rest, two, "g\n"}));  // not possessive: repeated
  EXPECT_EQ(split("\\p{N}{1,3}", t), (Strings{"123", "45", rest, two, "g\n"}));
  EXPECT_EQ(split("\\s+$", t), (Strings{t.substr(0, t.size() - 1), "\n"}));
  EXPECT_EQ(split("^.", t),
            (Strings{"1", "2345" + rest.substr(0, rest.size() - 1), "x", two + "g\n"}));
  const Strings words = {"12345", " ", "dead", mvs + " ",       s + "s",
                         " ",     k,   "\n",   "x" + two + "g", "\n"};
  EXPECT_EQ(split("\\w+", t), words);
  EXPECT_EQ(split("\\b", t), words);
  EXPECT_EQ(split("(?i:s)+", t),
            (Strings{"12345 dead" + mvs + " ", s + "s", " " + k + "\nx" + two + "g\n"}));
  EXPECT_EQ(split("\\d*", "12a"), (Strings{"12", "a"}));
  EXPECT_EQ(split("\\s+(?!\\S)|\\s+", "a   b" + mvs + " \xc2\x85"),
            (Strings{"a", "  ", " ", "b" + mvs, " \xc2\x85"}));
  EXPECT_EQ(split("a{2}?", "aaa"), (Strings{"aa", "a"}));
  EXPECT_EQ(split("\\p{S}+",
                  "a\xf0\x9f\x98\x80"
                  "b"),
            (Strings{"a", "\xf0\x9f\x98\x80", "b"}));
  EXPECT_EQ(split("\\p{Han}", "\xe3\x80\x81\xe7\x9a\x84"),
            (Strings{"\xe3\x80\x81", "\xe7\x9a\x84"}));
  EXPECT_EQ(split("a(*FAIL)|b", "ab"), (Strings{"a", "b"}));
  EXPECT_EQ(split("a(?i)b|c", "aB ac c C aC"), (Strings{"aB", " ", "ac", " c C ", "aC"}));
  EXPECT_EQ(split("(?~a)", "bab"), (Strings{"b", "a", "b"}));
  EXPECT_EQ(split("[a[bc]]", "xabcx"), (Strings{"x", "a", "b", "c", "x"}));
  EXPECT_EQ(split("[a-z&&[^b]]", "abc"), (Strings{"a", "b", "c"}));
  EXPECT_EQ(split("(?m:.)", "a\nb"), (Strings{"a", "\n", "b"}));
  EXPECT_EQ(split("(a)\\1", "aab"), (Strings{"aa", "b"}));
  EXPECT_EQ(split("a{", "xa{b"), (Strings{"x", "a{", "b"}));
  EXPECT_EQ(split("[]a]", "x]a"), (Strings{"x", "]", "a"}));
  EXPECT_EQ(split("\\h+", "xaf0x"), (Strings{"x", "af0", "x"}));
  EXPECT_EQ(split("\\pL", "apLb"), (Strings{"a", "pL", "b"}));
  EXPECT_EQ(split("\\p{Alphabetic}+", "1ab2"), (Strings{"1", "ab", "2"}));
  for (const char* pattern : {"\\x85", "(", "a)", "[a", "(?P<n>a)", "\\p{Foo}"})
    EXPECT_THROW(split(pattern, "a"), InputError) << pattern;
  const std::string message = error_of([] { split("a)", "a"); });
  for (const char* part : {"pretokenizers", "unmatched close parenthesis", "pattern a)"})
    EXPECT_NE(message.find(part), message.npos) << message;
}

TEST(Tokenizer, RefusesByName) {
  const TempDir dir;
  using Members = std::map<std::string, std::string>;
  const auto refusal = [&](const Members& more, const Members& model = {}) {
    return error_of([&] { Tokenizer(write_tokenizer(dir, {}, more, model)); });
  };
  const auto says = [](const std::string& message, const std::string& what) {
    EXPECT_NE(message.find(what), message.npos) << message;
  };
  says(refusal({}, {{"type", "\"Unigram\""}}), "Unigram");
  says(refusal({}, {{"byte_fallback", "true"}}), "byte_fallback");
  says(refusal({}, {{"dropout", "0.1"}}), "dropout 0.1");
  says(refusal({}, {{"end_of_word_suffix", "\"</w>\""}}), "end_of_word_suffix");
  says(refusal({}, {{"merges", R"(["a b c"])"}}), "two tokens");
  says(refusal({}, {{"merges", R"([["a","b"]])"}}), "ab");
  says(refusal({}, {{"vocab", R"({"a":-1})"}}), "token id");
  says(refusal({{"normalizer", R"({"type":"NFKC"})"}}), "NFKC");
  says(refusal({{"pre_tokenizer", R"({"type":"Metaspace"})"}}), "Metaspace");
  says(refusal({{"pre_tokenizer", "null"}}), "ByteLevel");
  says(
      refusal({{"pre_tokenizer",
                R"({"type":"Sequence","pretokenizers":[{"type":"ByteLevel","add_prefix_space":true},
                {"type":"Digits","individual_digits":true}]})"}}),
      "Digits after ByteLevel");
  says(refusal({{"decoder", R"({"type":"WordPiece"})"}}), "WordPiece");
  EXPECT_EQ(refusal({}), "(no InputError)");
  says(error_of([&] { Tokenizer("/nonexistent"); }), "/nonexistent");
}

// Quadratic work in any step would take hours.
TEST(Tokenizer, LongPieces) {
  const Tokenizer qwen(golden_dir() + "/tokenizer_qwen"),
      gptoss(golden_dir() + "/tokenizer_gptoss");
  std::mt19937 random(1);
  std::string letters(size_t(1) << 20, 'a');
  for (char& c : letters) c = char('a' + random() % 26);
  const std::string spaces(size_t(1) << 20, ' '), capitals(size_t(1) << 20, 'A'),
      digits(size_t(1) << 18, '7');
  for (const std::string& text :
       {letters, spaces + "x", capitals, digits, letters + spaces + "\n" + capitals})
    for (const Tokenizer* t : {&qwen, &gptoss}) ASSERT_EQ(t->decode(t->encode(text)), text);
  EXPECT_EQ(split("(?:a|b)+c?", std::string(200000, 'a')).size(), 1u);
}

TEST(Tokenizer, ThreadsShareOneTokenizer) {
  const Tokenizer t(golden_dir() + "/tokenizer_gptoss");
  const std::string text = read_file(PITH_SOURCE_DIR "/tests/tokenizer_test.cpp");
  const Ids want = t.encode(text);
  std::vector<Ids> got(4);
  std::vector<std::thread> threads;
  for (Ids& ids : got)
    threads.emplace_back([&] {
      PieceCache cache(1 << 15);
      ids = t.encode(text, &cache);
    });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& ids : got) EXPECT_EQ(ids, want);
}

}  // namespace
}  // namespace pith
