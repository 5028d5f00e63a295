#include "data/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
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
  std::string text;  // what is looked for
  int32_t id;
  bool single_word, lstrip, rstrip;
};

// Added tokens of one kind, sorted by text.
struct AddedTokens {
  std::vector<AddedToken> sorted;
  std::array<bool, 256> starts{};

  void add(AddedToken token) {
    starts[static_cast<unsigned char>(token.text[0])] = true;
    const auto at = std::lower_bound(sorted.begin(), sorted.end(), token.text,
                                     [](const AddedToken& a, const std::string& b) { return a.text < b; });
    sorted.insert(at, std::move(token));
  }

  // The longest token that begins at text[at], or nullptr: the sorted range that agrees so far shrinks byte by byte.
  const AddedToken* longest(std::string_view text, size_t at) const {
    const AddedToken* best = nullptr;
    auto low = sorted.begin(), high = sorted.end();
    for (size_t k = 0; low != high && at + k < text.size(); ++k) {
      const auto byte = [k](const AddedToken& a) { return k < a.text.size() ? int((unsigned char)a.text[k]) : -1; };
      const int want = static_cast<unsigned char>(text[at + k]);
      low = std::partition_point(low, high, [&](const AddedToken& a) { return byte(a) < want; });
      high = std::partition_point(low, high, [&](const AddedToken& a) { return byte(a) == want; });
      if (low != high && low->text.size() == k + 1) best = &*low;
    }
    return best;
  }
};

uint32_t last_code_point(std::string_view text) {
  size_t i = text.size() - 1;
  while (i > 0 && (text[i] & 0xc0) == 0x80) --i;
  return code_point(text.data() + i);
}

// Calls found(token, begin, end) and between(begin, end) for the leftmost-longest matches in `text` and what is
// between them. As in the library, stripped spaces belong to the match, and a discarded one still uses its text up.
template <class Found, class Between>
void split_at_tokens(const AddedTokens& tokens, std::string_view text, Found&& found, Between&& between) {
  size_t done = 0;
  for (size_t at = 0; !tokens.sorted.empty() && at < text.size();) {
    const AddedToken* token = nullptr;
    if (tokens.starts[static_cast<unsigned char>(text[at])]) token = tokens.longest(text, at);
    if (!token) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->text.size();
    at = end;
    if (token->single_word && ((begin > 0 && is_word(last_code_point(text.substr(0, begin)))) ||
                               (end < text.size() && is_word(code_point(text.data() + end)))))
      continue;
    if (token->lstrip) {
      while (begin > done && is_space(last_code_point(text.substr(0, begin))))
        do --begin;
        while ((text[begin] & 0xc0) == 0x80);
      begin = std::max(begin, done);
    }
    if (token->rstrip)
      while (end < text.size() && is_space(code_point(text.data() + end)))
        end += utf8_length(static_cast<unsigned char>(text[end]));
    if (done < begin) between(text.substr(done, begin - done));
    if (begin < end) found(*token);  // what an earlier match stripped is gone
    done = end;
  }
  if (done < text.size()) between(text.substr(done));
}

// GPT-2's printable stand-in for every byte: itself where printable in Latin-1, else U+0100 and on, in order.
std::array<uint32_t, 256> byte_characters() {
  std::array<uint32_t, 256> of{};
  uint32_t next = 0x100;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    of[b] = printable ? b : next++;
  }
  return of;
}

// Left and right token id to rank: a hash table with open addressing, at most half full.
class MergeTable {
 public:
  void reserve(size_t merges) {
    shift_ = 60;
    while ((size_t(1) << (64 - shift_)) < 2 * merges) --shift_;
    slots_.assign(size_t(1) << (64 - shift_), {~uint64_t(0), kNever});
  }
  void set(int32_t left, int32_t right, uint32_t rank) {
    const uint64_t k = key(left, right);
    size_t i = index(k);
    while (slots_[i].rank != kNever && slots_[i].key != k) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = {k, rank};
  }
  uint32_t rank(int32_t left, int32_t right) const {
    const uint64_t k = key(left, right);
    for (size_t i = index(k);; i = (i + 1) & (slots_.size() - 1))
      if (slots_[i].key == k || slots_[i].rank == kNever) return slots_[i].rank;
  }

 private:
  struct Slot {
    uint64_t key;
    uint32_t rank;
  };
  static uint64_t key(int32_t left, int32_t right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }
  size_t index(uint64_t k) const { return (k * 0x9e3779b97f4a7c15u ^ k >> 29) * 0xbf58476d1ce4e5b9u >> shift_; }
  int shift_ = 60;
  std::vector<Slot> slots_;
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
  void set_token(int32_t id, const std::string& text);

  std::string file;
  std::unordered_map<std::string, int32_t> vocabulary;  // the model's own
  std::unordered_map<std::string, int32_t> added;
  std::vector<std::string> bytes;  // by id: what the token decodes to
  std::vector<bool> known, special;
  AddedTokens raw, normalized;     // looked for before and after normalization
  bool nfc = false;
  std::unique_ptr<PreTokenizer> pretokenizer;

  std::array<uint32_t, 256> characters = byte_characters();
  std::unordered_map<uint32_t, char> byte_of;
  std::array<int32_t, 256> byte_id;  // -1 where the vocabulary lacks the byte
  int32_t unknown = -1;              // stands for such bytes; -1: they vanish
  bool fuse_unknown = false, ignore_merges = false;
  MergeTable merges;
  std::vector<int32_t> merged;       // rank to id
  int32_t eos = -1;
};

Tokenizer::Model::Model(const std::string& path) {
  struct stat status;
  const bool directory = stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
  file = directory ? path + "/tokenizer.json" : path;
  for (uint32_t b = 0; b < 256; ++b) byte_of[characters[b]] = char(b);
  const Value json = parse_json(read_file(file), file);
  read_bpe(json.at("model"));
  if (const Value* v = json.find("normalizer")) read_normalizer(*v);
  const Value* pre = json.find("pre_tokenizer");
  if (!pre) fail_input("{}: no pre_tokenizer; only byte-level BPE is supported", file);
  pretokenizer = std::make_unique<PreTokenizer>(*pre);
  const Value* decoder = json.find("decoder");
  const Value* type = decoder && !decoder->is_null() ? decoder->find("type") : nullptr;
  if (!type || type->as_string() != "ByteLevel")
    fail_input("{}: decoder {} is not supported (only ByteLevel)", file, type ? type->as_string() : "null");
  if (const Value* v = json.find("added_tokens")) read_added(*v);
  find_eos();
}

void Tokenizer::Model::set_token(int32_t id, const std::string& text) {
  if (id < 0 || id > 1 << 28) fail_input("{}: token id {} is out of range", file, id);
  if (size_t(id) >= bytes.size()) {
    bytes.resize(size_t(id) + 1);
    known.resize(size_t(id) + 1);
    special.resize(size_t(id) + 1);
  }
  std::string decoded;
  for (size_t i = 0; i < text.size(); i += utf8_length(static_cast<unsigned char>(text[i]))) {
    const auto it = byte_of.find(code_point(text.data() + i));
    if (it == byte_of.end()) {  // not a byte-level token: stands for itself
      decoded = text;
      break;
    }
    decoded += it->second;
  }
  bytes[size_t(id)] = decoded;
  known[size_t(id)] = true;
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
    if (id.as_int() < 0 || id.as_int() > 1 << 28) id.reject("a token id");
    vocabulary.emplace(text, int32_t(id.as_int()));
    set_token(int32_t(id.as_int()), text);
  }
  for (uint32_t b = 0; b < 256; ++b) {
    std::string character;
    append_utf8(characters[b], character);
    const auto it = vocabulary.find(character);
    byte_id[b] = it == vocabulary.end() ? -1 : it->second;
  }
  if (const Value* v = bpe.find("unk_token"); v && !v->is_null()) {
    const auto it = vocabulary.find(v->as_string());
    if (it == vocabulary.end() && std::count(byte_id.begin(), byte_id.end(), -1))
      fail_input("{}: unk_token {} is not in the vocabulary", file, v->as_string());
    if (it != vocabulary.end()) unknown = it->second;
  }
  read_merges(bpe.at("merges"));
}

void Tokenizer::Model::read_merges(const Value& list) {
  const auto id = [&](const std::string& text, const Value& merge) {
    const auto it = vocabulary.find(text);
    if (it == vocabulary.end()) merge.reject(fmt::format("tokens of the vocabulary (\"{}\" is not)", text));
    return it->second;
  };
  merges.reserve(list.items().size());
  uint32_t rank = 0;
  for (const Value& merge : list.items()) {
    std::string left, right;
    if (merge.is(Value::Kind::string)) {
      const std::string& text = merge.as_string();
      if (text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos) merge.reject("two tokens");
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      if (merge.items().size() != 2) merge.reject("two tokens");
      left = merge.items()[0].as_string();
      right = merge.items()[1].as_string();
    }
    merges.set(id(left, merge), id(right, merge), rank++);
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

// The library does not read the ids of added tokens: one that is not in the vocabulary gets the next free id.
void Tokenizer::Model::read_added(const Value& list) {
  int32_t next = int32_t(vocabulary.size());
  std::unordered_map<int32_t, const Value*> by_id;
  for (const Value& token : list.items()) {
    const std::string& text = token.at("content").as_string();
    if (text.empty()) continue;
    int32_t id;
    if (const auto it = added.find(text); it != added.end()) id = it->second;
    else if (const auto own = vocabulary.find(text); own != vocabulary.end()) id = own->second;
    else id = next++;
    if (const Value* stated = token.find("id"); stated && stated->as_int() != id)
      warn_once(fmt::format("{}: added token {} has id {}, not {}: ids follow the vocabulary", file, text, id,
                            stated->as_int()));
    added[text] = id;
    by_id[id] = &token;
  }
  for (const auto& [id, token] : by_id) {
    const bool is_normalized = flag(*token, "normalized");
    std::string storage;
    const std::string& content = token->at("content").as_string();
    const std::string text(is_normalized && nfc ? normalize_nfc(content, storage) : content);
    set_token(id, text);
    special[size_t(id)] = flag(*token, "special");
    (is_normalized ? normalized : raw)
        .add({text, id, flag(*token, "single_word"), flag(*token, "lstrip"), flag(*token, "rstrip")});
  }
}

void Tokenizer::Model::find_eos() {
  const size_t slash = file.rfind('/');
  const std::string config = (slash == file.npos ? "" : file.substr(0, slash + 1)) + "tokenizer_config.json";
  std::vector<std::string> names = {"<|endoftext|>", "</s>", "<|end_of_text|>", "<|return|>", "<|eot_id|>",
                                    "<|im_end|>", "<eos>", "<｜end▁of▁sentence｜>"};
  if (struct stat status; stat(config.c_str(), &status) == 0) {
    const Value json = parse_json(read_file(config), config);
    const Value* token = json.find("eos_token");
    if (token && token->is(Value::Kind::object)) token = token->find("content");
    if (token && !token->is_null()) names.insert(names.begin(), token->as_string());
  }
  for (const std::string& name : names) {
    const auto it = added.find(name);
    if (it == added.end()) continue;
    eos = it->second;
    return;
  }
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
    if (id >= 0 && id < vocab_size() && !(skip_special && is_special(id))) out += model_->bytes[size_t(id)];
  return std::string(repair_utf8(out, storage));
}

int32_t Tokenizer::vocab_size() const { return int32_t(model_->bytes.size()); }

std::optional<int32_t> Tokenizer::id_of(std::string_view token) const {
  for (const auto* map : {&model_->added, &model_->vocabulary})
    if (const auto it = map->find(std::string(token)); it != map->end()) return it->second;
  return std::nullopt;
}

bool Tokenizer::is_special(int32_t id) const { return id >= 0 && id < vocab_size() && model_->special[size_t(id)]; }

std::optional<int32_t> Tokenizer::eos_id() const {
  return model_->eos < 0 ? std::nullopt : std::optional<int32_t>(model_->eos);
}

void Tokenizer::set_eos(int32_t id) {
  if (id < 0 || id >= vocab_size()) fail_input("end-of-text id {} is outside the vocabulary of {}", id, vocab_size());
  model_->eos = id;
}

const std::string& Tokenizer::file() const { return model_->file; }

struct Encoder::State {
  explicit State(const Tokenizer::Model& m) : model(m), scratch(*m.pretokenizer), cache(kSlots) {
    sink = [this](std::string_view piece) { cached(piece); };
  }
  void section(std::string_view text);
  void cached(std::string_view piece);
  void bpe(std::string_view piece);
  void merge();

  // Pieces of up to kKey bytes and kIds ids, by hash; a new piece replaces the one in its place. One cache line each.
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
  PreTokenizer::Scratch scratch;
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
  split_at_tokens(s.model.raw, repair_utf8(text, s.repaired),
                  [&](const AddedToken& token) { out.push_back(token.id); },
                  [&](std::string_view between) { s.section(between); });
}

void Encoder::State::section(std::string_view text) {
  if (model.nfc) text = normalize_nfc(text, normalized);
  split_at_tokens(model.normalized, text, [&](const AddedToken& token) { out->push_back(token.id); },
                  [&](std::string_view between) { model.pretokenizer->split(between, scratch, sink); });
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

// Sennrich et al. 2016 (arXiv 1508.07909): merges the adjacent pair of lowest rank, leftmost first, until none is left.
void Encoder::State::bpe(std::string_view piece) {
  if (piece.size() >= kNever) fail_input("a piece of {} bytes is too long to tokenize", piece.size());
  if (model.ignore_merges) {
    spelled.clear();
    for (const char c : piece) append_utf8(model.characters[static_cast<unsigned char>(c)], spelled);
    if (const auto it = model.vocabulary.find(spelled); it != model.vocabulary.end()) {
      out->push_back(it->second);
      return;
    }
  }
  symbols.clear();
  bool fusing = false;
  for (const char c : piece) {
    int32_t id = model.byte_id[static_cast<unsigned char>(c)];
    const bool unknown = id < 0;
    if (unknown) id = fusing && model.fuse_unknown ? -1 : model.unknown;
    fusing = unknown;
    if (id >= 0) symbols.push_back({id, uint32_t(symbols.size() + 1), uint32_t(symbols.size() - 1), kNever});
  }
  if (symbols.empty()) return;
  symbols.back().next = kNever;
  merge();
  for (uint32_t i = 0; i != kNever; i = symbols[i].next) out->push_back(symbols[i].id);
}

void Encoder::State::merge() {
  const auto rank_pair = [&](uint32_t i) {
    Symbol& s = symbols[i];
    s.rank = s.next == kNever ? kNever : model.merges.rank(s.id, symbols[s.next].id);
    if (s.rank != kNever) heap.push_back(uint64_t(s.rank) << 32 | i);
    return s.rank != kNever;
  };
  heap.clear();
  for (uint32_t i = 0; i < symbols.size(); ++i) rank_pair(i);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
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
    if (rank_pair(i)) std::push_heap(heap.begin(), heap.end(), std::greater<>());
    if (s.previous != kNever && rank_pair(s.previous)) std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
}

}  // namespace pith
