#include "data/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <unordered_map>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"
#include "data/pretokenize.h"
#include "data/unicode.h"

namespace pith {
namespace {

constexpr uint32_t kNever = ~0u;  // the rank of a pair that does not merge

struct AddedToken {
  int32_t id;
  bool single_word, lstrip, rstrip;
};

// Added tokens of one kind, by text.
struct AddedTokens {
  std::map<std::string, AddedToken, std::less<>> by_text;
  std::set<size_t, std::greater<>> sizes;
  std::bitset<65536> starts;  // pairs of first bytes

  static size_t start(std::string_view text) {
    const auto byte = [&](size_t i) { return i < text.size() ? text[i] & 0xff : 0; };
    return size_t(byte(0) << 8 | byte(1));
  }
  void add(const std::string& text, AddedToken token) {
    by_text[text] = token;
    sizes.insert(text.size());
    if (text.size() > 1) starts.set(start(text));
    for (size_t second = 0; text.size() == 1 && second < 256; ++second)
      starts.set(start(text) + second);
  }
  // The size of the longest token that begins `text`, or 0.
  size_t longest(std::string_view text) const {
    if (!starts[start(text)]) return 0;
    for (const size_t size : sizes)
      if (size <= text.size() && by_text.contains(text.substr(0, size))) return size;
    return 0;
  }
};

uint32_t last_code_point(std::string_view text) {
  size_t i = text.size() - 1;
  while (i > 0 && (text[i] & 0xc0) == 0x80) --i;
  return code_point(text.data() + i);
}

// Calls found(id) and between(text) for the leftmost-longest matches in `text` and what is between
// them. As in the library, stripped spaces belong to the match, and a discarded match still uses
// its text up.
template <class Found, class Between>
void split_at_tokens(const AddedTokens& tokens, std::string_view text, Found&& found,
                     Between&& between) {
  size_t done = 0;
  for (size_t at = 0; !tokens.sizes.empty() && at < text.size();) {
    const size_t size = tokens.longest(text.substr(at));
    size_t begin = at, end = at + size;
    at += std::max(size, size_t(1));
    if (size == 0) continue;
    const AddedToken& token = tokens.by_text.find(text.substr(begin, size))->second;
    if (token.single_word && ((begin > 0 && is_word(last_code_point(text.substr(0, begin)))) ||
                              (end < text.size() && is_word(code_point(text.data() + end)))))
      continue;
    while (token.lstrip && begin > done && is_space(last_code_point(text.substr(0, begin)))) {
      --begin;
      while ((text[begin] & 0xc0) == 0x80) --begin;
    }
    if (token.lstrip) begin = std::max(begin, done);
    while (token.rstrip && end < text.size() && is_space(code_point(text.data() + end)))
      end += utf8_length(text[end]);
    if (done < begin) between(text.substr(done, begin - done));
    if (begin < end) found(token.id);  // what an earlier match stripped is gone
    done = end;
  }
  if (done < text.size()) between(text.substr(done));
}

// GPT-2's printable characters for bytes: itself where printable in Latin-1, else U+0100 and on.
std::array<std::string, 256> spelled_bytes() {
  std::array<std::string, 256> of;
  uint32_t next = 0x100;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b != 0xad);
    append_utf8(printable ? b : next++, of[b]);
  }
  return of;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}
struct PairHash {
  size_t operator()(uint64_t k) const { return (k ^ k >> 29) * 0x9e3779b97f4a7c15u >> 20; }
};

bool flag(const Value& object, const char* key) {
  const Value* v = object.find(key);
  return v && !v->is_null() && v->as_bool();
}

}  // namespace

struct Tokenizer::Model {
  explicit Model(const std::string& path);
  void read_bpe(const Value& bpe);
  void read_merges(const Value& merges);
  void read_added(const Value& added);
  void read_normalizer(const Value& spec);
  void find_eos();
  void set_token(int64_t id, const std::string& text);
  int32_t find(const std::string& text) const {  // -1 if there is none
    const auto it = vocabulary.find(text);
    return it == vocabulary.end() ? -1 : it->second;
  }

  struct Token {
    std::string bytes;  // what it decodes to; nothing for an id that nobody has
    bool own = false, added = false, special = false;  // own: of the BPE model
  };
  std::string file;
  std::vector<Token> tokens;
  std::unordered_map<std::string, int32_t> vocabulary;  // as spelled in the file
  AddedTokens raw, normalized;                          // looked for before and after normalization
  bool nfc = false;
  std::unique_ptr<PreTokenizer> pretokenizer;

  std::array<std::string, 256> spelled = spelled_bytes();
  std::unordered_map<std::string_view, char> byte_of;  // the inverse
  std::array<int32_t, 256> byte_id;                    // -1 where the vocabulary lacks the byte
  int32_t unknown = -1;                                // stands for such bytes; -1: they vanish
  bool fuse_unknown = false, ignore_merges = false;
  std::unordered_map<uint64_t, uint32_t, PairHash> merges;  // pair to rank
  std::vector<int32_t> merged;                              // rank to id
  int32_t eos = -1;
};

Tokenizer::Model::Model(const std::string& path) {
  struct stat info {};
  const bool directory = stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
  file = directory ? path + "/tokenizer.json" : path;
  for (int b = 0; b < 256; ++b) byte_of[spelled[size_t(b)]] = char(b);
  const Value json = parse_json(read_file(file), file);
  read_bpe(json.at("model"));
  if (const Value* v = json.find("normalizer")) read_normalizer(*v);
  pretokenizer = std::make_unique<PreTokenizer>(json.at("pre_tokenizer"));
  const Value& decoder = json.at("decoder");
  const std::string type = decoder.is_null() ? "null" : decoder.at("type").as_string();
  if (type != "ByteLevel")
    fail_input("{}: decoder {} is not supported (only ByteLevel)", file, type);
  if (const Value* v = json.find("added_tokens")) read_added(*v);
  find_eos();
}

void Tokenizer::Model::set_token(int64_t id, const std::string& text) {
  if (id < 0 || id > 1 << 28) fail_input("{}: token id {} is out of range", file, id);
  if (size_t(id) >= tokens.size()) tokens.resize(size_t(id) + 1);
  std::string bytes;
  for (size_t i = 0, n; i < text.size(); i += n) {
    n = utf8_length(text[i]);
    const auto it = byte_of.find(std::string_view(text).substr(i, n));
    if (it == byte_of.end()) {  // not a byte-level token: stands for itself
      bytes = text;
      break;
    }
    bytes += it->second;
  }
  tokens[size_t(id)].bytes = bytes;
}

void Tokenizer::Model::read_bpe(const Value& bpe) {
  if (const Value* type = bpe.find("type"); type && type->as_string() != "BPE")
    fail_input("{}: model type {} is not supported (only BPE)", file, type->as_string());
  if (const Value* v = bpe.find("dropout"); v && !v->is_null() && v->as_real() != 0)
    fail_input("{}: dropout {} is not supported", file, v->as_real());
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (const Value* v = bpe.find(key); v && !v->is_null() && !v->as_string().empty())
      fail_input("{}: {} \"{}\" is not supported", file, key, v->as_string());
  if (flag(bpe, "byte_fallback")) fail_input("{}: byte_fallback is not supported", file);
  fuse_unknown = flag(bpe, "fuse_unk");
  ignore_merges = flag(bpe, "ignore_merges");
  for (const auto& [text, id] : bpe.at("vocab").members()) {
    set_token(id.as_int(), text);
    vocabulary[text] = int32_t(id.as_int());
    tokens[size_t(id.as_int())].own = true;
  }
  for (size_t b = 0; b < 256; ++b) byte_id[b] = find(spelled[b]);
  if (const Value* v = bpe.find("unk_token"); v && !v->is_null()) {
    unknown = find(v->as_string());
    if (unknown < 0 && std::count(byte_id.begin(), byte_id.end(), -1))
      fail_input("{}: unk_token {} is not in the vocabulary", file, v->as_string());
  }
  read_merges(bpe.at("merges"));
}

void Tokenizer::Model::read_merges(const Value& list) {
  const auto id = [&](const std::string& text, const Value& merge) {
    const int32_t found = find(text);
    if (found < 0) merge.reject(fmt::format("tokens of the vocabulary (\"{}\" is not)", text));
    return found;
  };
  merges.reserve(2 * list.items().size());
  for (const Value& merge : list.items()) {
    std::string left, right;
    if (merge.is(Value::Kind::string)) {
      const std::string& text = merge.as_string();
      if (text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      if (space == text.npos || space != text.rfind(' ')) merge.reject("two tokens");
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      if (merge.items().size() != 2) merge.reject("two tokens");
      left = merge.items()[0].as_string();
      right = merge.items()[1].as_string();
    }
    merges[pair_key(id(left, merge), id(right, merge))] = uint32_t(merged.size());
    merged.push_back(id(left + right, merge));
  }
}

void Tokenizer::Model::read_normalizer(const Value& spec) {
  if (spec.is_null()) return;
  const std::string& type = spec.at("type").as_string();
  if (type == "Sequence") {
    for (const Value& step : spec.at("normalizers").items()) read_normalizer(step);
  } else if (type == "NFC") {
    nfc = true;
  } else {
    fail_input("{}: normalizer {} is not supported (only NFC)", spec.where(), type);
  }
}

// The library does not read the ids of added tokens: one that the model lacks gets the next free
// id. Of several with one text the last counts.
void Tokenizer::Model::read_added(const Value& list) {
  int32_t next = int32_t(vocabulary.size());
  std::map<int32_t, const Value*> by_id;
  for (const Value& token : list.items()) {
    const std::string& text = token.at("content").as_string();
    if (text.empty()) continue;
    const auto [it, is_new] = vocabulary.emplace(text, next);
    next += is_new;
    if (const Value* id = token.find("id"); id && id->as_int() != it->second)
      warn_once(fmt::format("{}: added token {} gets id {}, not {}", file, text, it->second,
                            id->as_int()));
    by_id[it->second] = &token;
  }
  for (const auto& [id, token] : by_id) {
    const bool is_normalized = flag(*token, "normalized");
    std::string text = token->at("content").as_string(), storage;
    if (is_normalized && nfc) text = std::string(normalize_nfc(text, storage));
    set_token(id, text);
    tokens[size_t(id)].added = true;
    tokens[size_t(id)].special = flag(*token, "special");
    (is_normalized ? normalized : raw)
        .add(text,
             {id, flag(*token, "single_word"), flag(*token, "lstrip"), flag(*token, "rstrip")});
  }
}

void Tokenizer::Model::find_eos() {
  std::vector<std::string> names = {"<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>",
                                    "<eos>"};
  const std::string config = file.substr(0, file.rfind('/') + 1) + "tokenizer_config.json";
  if (struct stat info{}; stat(config.c_str(), &info) == 0) {
    const Value json = parse_json(read_file(config), config);
    const Value* token = json.find("eos_token");
    if (token && token->is(Value::Kind::object)) token = token->find("content");
    if (token && !token->is_null()) names.insert(names.begin(), token->as_string());
  }
  for (const std::string& name : names)
    if (const int32_t id = find(name); eos < 0 && id >= 0 && tokens[size_t(id)].added) eos = id;
}

Tokenizer::Tokenizer(const std::string& path) : model_(std::make_unique<Model>(path)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  Encoder(*this).encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string out, storage;
  for (const int32_t id : ids)
    if (id >= 0 && id < vocab_size() && !(skip_special && is_special(id)))
      out += model_->tokens[size_t(id)].bytes;
  return std::string(repair_utf8(out, storage));
}

int32_t Tokenizer::vocab_size() const { return int32_t(model_->tokens.size()); }

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
  const int32_t id = model_->find(std::string(token));
  return id < 0 ? std::nullopt : std::optional(id);
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && model_->tokens[size_t(id)].special;
}

std::optional<int32_t> Tokenizer::eos_id() const {
  return model_->eos < 0 ? std::nullopt : std::optional(model_->eos);
}

void Tokenizer::set_eos(int32_t id) {
  if (id < 0 || id >= vocab_size())
    fail_input("end-of-text id {} is outside the vocabulary of {}", id, vocab_size());
  model_->eos = id;
}

const std::string& Tokenizer::file() const { return model_->file; }

struct Encoder::State {
  explicit State(const Tokenizer::Model& m)
      : model(m), pretokenizer(*m.pretokenizer), cache(kSlots) {
    sink = [this](std::string_view piece) { cached(piece); };
  }
  void section(std::string_view text);
  void cached(std::string_view piece);
  void bpe(std::string_view piece);
  void merge();

  // Pieces of up to kKey bytes and kIds ids, by hash; a new one replaces what is in its place.
  static constexpr size_t kKey = 23, kIds = 9, kSlots = size_t(1) << 15;
  struct alignas(64) Slot {
    uint64_t key[3] = {};  // the bytes, zeros, and the length in the last byte
    uint32_t count = 0;
    int32_t ids[kIds];
  };
  struct Symbol {
    int32_t id;
    uint32_t next, previous;  // kNever at the ends
    uint32_t rank;            // of the pair with the next symbol
  };
  const Tokenizer::Model& model;
  PreTokenizer pretokenizer;
  PreTokenizer::Sink sink;
  std::vector<Slot> cache;
  std::vector<Symbol> symbols;
  std::vector<uint64_t> heap;  // rank << 32 | position
  std::string repaired, normalized, spelled;
  std::vector<int32_t>* out = nullptr;
};

Encoder::Encoder(const Tokenizer& tokenizer) : state_(std::make_unique<State>(*tokenizer.model_)) {}
Encoder::Encoder(Encoder&&) noexcept = default;
Encoder::~Encoder() = default;

void Encoder::encode(std::string_view text, std::vector<int32_t>& out) {
  State& s = *state_;
  s.out = &out;
  split_at_tokens(
      s.model.raw, repair_utf8(text, s.repaired), [&](int32_t id) { out.push_back(id); },
      [&](std::string_view between) { s.section(between); });
}

void Encoder::State::section(std::string_view text) {
  if (model.nfc) text = normalize_nfc(text, normalized);
  split_at_tokens(
      model.normalized, text, [&](int32_t id) { out->push_back(id); },
      [&](std::string_view between) { pretokenizer.split(between, sink); });
}

void Encoder::State::cached(std::string_view piece) {
  if (piece.size() > kKey) return bpe(piece);
  uint64_t key[3] = {};
  std::memcpy(key, piece.data(), piece.size());
  key[2] |= uint64_t(piece.size()) << 56;
  uint64_t hash = (key[0] ^ (key[1] * 0x9e3779b97f4a7c15u)) + key[2] * 0xc2b2ae3d27d4eb4fu;
  hash = (hash ^ hash >> 31) * 0xbf58476d1ce4e5b9u;
  Slot& slot = cache[hash >> 49];
  if (slot.key[0] == key[0] && slot.key[1] == key[1] && slot.key[2] == key[2]) {
    out->insert(out->end(), slot.ids, slot.ids + slot.count);
    return;
  }
  const size_t before = out->size();
  bpe(piece);
  const size_t count = out->size() - before;
  if (count > kIds) return;
  std::memcpy(slot.key, key, sizeof key);
  slot.count = uint32_t(count);
  std::copy(out->begin() + ptrdiff_t(before), out->end(), slot.ids);
}

// Sennrich et al. 2016 (arXiv 1508.07909): merges the adjacent pair of lowest rank, leftmost first,
// until none is left.
void Encoder::State::bpe(std::string_view piece) {
  if (piece.size() >= kNever)
    fail_input("a piece of {} bytes is too long to tokenize", piece.size());
  if (model.ignore_merges) {
    spelled.clear();
    for (const unsigned char c : piece) spelled += model.spelled[c];
    if (const int32_t id = model.find(spelled); id >= 0 && model.tokens[size_t(id)].own)
      return out->push_back(id);
  }
  symbols.clear();
  bool fusing = false;
  for (const unsigned char c : piece) {
    int32_t id = model.byte_id[c];
    const bool unknown = id < 0;
    if (unknown) id = fusing && model.fuse_unknown ? -1 : model.unknown;
    fusing = unknown;
    if (id >= 0)
      symbols.push_back({id, uint32_t(symbols.size() + 1), uint32_t(symbols.size() - 1), kNever});
  }
  if (symbols.empty()) return;
  symbols.back().next = kNever;
  merge();
  for (uint32_t i = 0; i != kNever; i = symbols[i].next) out->push_back(symbols[i].id);
}

void Encoder::State::merge() {
  const auto rank_pair = [&](uint32_t i) {
    Symbol& s = symbols[i];
    s.rank = kNever;
    if (s.next == kNever) return;
    const auto it = model.merges.find(pair_key(s.id, symbols[s.next].id));
    if (it == model.merges.end()) return;
    s.rank = it->second;
    heap.push_back(uint64_t(s.rank) << 32 | i);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  heap.clear();
  for (uint32_t i = 0; i < symbols.size(); ++i) rank_pair(i);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint32_t rank = uint32_t(heap.back() >> 32), i = uint32_t(heap.back());
    heap.pop_back();
    Symbol& s = symbols[i];
    if (s.rank != rank) continue;  // the pair is gone
    Symbol& right = symbols[s.next];
    s.id = model.merged[rank];
    s.next = right.next;
    right.rank = kNever;
    if (s.next != kNever) symbols[s.next].previous = i;
    rank_pair(i);
    if (s.previous != kNever) rank_pair(s.previous);
  }
}

}  // namespace pith
