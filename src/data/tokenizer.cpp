#include "data/tokenizer.h"

#include <queue>
#include <sstream>

#include "core/file.h"

namespace pith {

constexpr uint32_t kNever = ~0u;  // the rank of a pair that does not merge

// Calls found(id) and between(text) for the leftmost-longest matches in `text` and what is between
// them. As in the library, stripped spaces belong to the match, and a discarded match still uses
// its text up.
static void split_at_tokens(const auto& tokens, std::string_view text, auto&& found,
                            auto&& between) {
  const auto is_word_at = [&](size_t i) { return is_word(code_point(text.data() + i)); };
  const auto is_space_at = [&](size_t i) { return is_space(code_point(text.data() + i)); };
  const auto character_before = [&](size_t i) {
    do --i;
    while (i > 0 && (text[i] & 0xc0) == 0x80);
    return i;
  };
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const auto& candidates = tokens[static_cast<unsigned char>(text[at])];
    const auto match = std::ranges::find_if(
        candidates, [&](const auto& t) { return text.substr(at).starts_with(t.first); });
    if (match == candidates.end()) {
      ++at;
      continue;
    }
    const auto& [content, token] = *match;
    size_t begin = at, end = at += content.size();
    if (token.single_word && ((begin > 0 && is_word_at(character_before(begin))) ||
                              (end < text.size() && is_word_at(end))))
      continue;
    while (token.lstrip && begin > done && is_space_at(character_before(begin)))
      begin = character_before(begin);
    while (token.rstrip && end < text.size() && is_space_at(end)) end += utf8_length(text[end]);
    if (token.lstrip) begin = std::max(begin, done);
    if (done < begin) between(text.substr(done, begin - done));
    if (begin < end) found(token.id);  // what an earlier match stripped is gone
    done = end;
  }
  if (done < text.size()) between(text.substr(done));
}

// GPT-2's printable character for a byte: itself where printable in Latin-1, else U+0100 and on.
static uint32_t character_of(uint32_t byte) {
  if (byte <= 0x20) return 0x100 + byte;
  if (byte >= 0x7f && byte <= 0xa0) return 0x121 + byte - 0x7f;
  return byte == 0xad ? 0x143 : byte;
}

// The byte that a character stands for, or -1.
static int byte_of(uint32_t c) {
  for (const uint32_t byte : {c, c - 0x100, c - 0x121 + 0x7f, 0xadu})
    if (byte < 0x100 && character_of(byte) == c) return int(byte);
  return -1;
}

static std::string spelled(std::string_view bytes) {
  std::string out;
  for (const unsigned char byte : bytes) append_utf8(character_of(byte), out);
  return out;
}

static uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}

// The member `key` if there is one that is not null.
static const Value* given(const Value& object, const char* key) {
  const Value* v = object.find(key);
  return v && !v->is_null() ? v : nullptr;
}

static bool flag(const Value& object, const char* key) {
  const Value* v = given(object, key);
  return v && v->as_bool();
}

Tokenizer::Tokenizer(const std::string& path) {
  std::error_code error;
  file_ = std::filesystem::is_directory(path, error) ? path + "/tokenizer.json" : path;
  const Value json = parse_json(read_file(file_), file_);
  read_bpe(json.at("model"));
  if (const Value* v = given(json, "normalizer")) read_normalizer(*v);
  pretokenizer_.emplace(json.at("pre_tokenizer"));
  if (const std::string& type = json.at("decoder").at("type").as_string(); type != "ByteLevel")
    fail_input("{}: decoder {} is not supported (only ByteLevel)", file_, type);
  if (const Value* v = json.find("added_tokens")) read_added(*v);
}

int32_t Tokenizer::find(const std::string& text) const {
  const auto it = vocabulary_.find(text);
  return it == vocabulary_.end() ? -1 : it->second;
}

void Tokenizer::set_token(int64_t id, const std::string& text) {
  if (id < 0 || id > 1 << 28) fail_input("{}: token id {} is out of range", file_, id);
  if (id >= vocab_size()) bytes_.resize(size_t(id) + 1);
  std::string& bytes = bytes_[size_t(id)];
  bytes.clear();
  for (size_t i = 0; i < text.size(); i += utf8_length(text[i])) {
    const int byte = byte_of(code_point(text.data() + i));
    if (byte < 0) {  // not a byte-level token: stands for itself
      bytes = text;
      return;
    }
    bytes += char(byte);
  }
}

void Tokenizer::read_bpe(const Value& bpe) {
  if (const Value* type = bpe.find("type"); type && type->as_string() != "BPE")
    fail_input("{}: model type {} is not supported (only BPE)", file_, type->as_string());
  for (const char* key :
       {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}) {
    const Value* v = given(bpe, key);
    if (v && !std::set<std::string>{"\"\"", "false", "0.0", "0"}.contains(v->json()))
      fail_input("{}: {} {} is not supported", file_, key, v->json());
  }
  fuse_unknown_ = flag(bpe, "fuse_unk");
  ignore_merges_ = flag(bpe, "ignore_merges");
  for (const auto& [text, id] : bpe.at("vocab").members()) {
    set_token(id.as_int(), text);
    vocabulary_[text] = int32_t(id.as_int());
  }
  for (size_t b = 0; b < 256; ++b) byte_id_[b] = find(spelled(std::string(1, char(b))));
  if (const Value* v = given(bpe, "unk_token")) {
    unknown_ = find(v->as_string());
    if (unknown_ < 0 && std::count(byte_id_.begin(), byte_id_.end(), -1))
      fail_input("{}: unk_token {} is not in the vocabulary", file_, v->as_string());
  }
  const std::vector<Value>& merges = bpe.at("merges").items();
  merges_.reserve(2 * merges.size());
  for (const Value& merge : merges) {
    std::vector<std::string> tokens;  // left and right, then what they make
    if (merge.is(Value::Kind::string)) {
      if (merge.as_string().starts_with("#version")) continue;
      std::istringstream text(merge.as_string());
      for (std::string token; std::getline(text, token, ' ');) tokens.push_back(token);
    } else {
      for (const Value& token : merge.items()) tokens.push_back(token.as_string());
    }
    if (tokens.size() != 2) merge.reject("two tokens");
    tokens.push_back(tokens[0] + tokens[1]);
    for (const std::string& token : tokens)
      if (find(token) < 0)
        merge.reject(fmt::format("tokens of the vocabulary (\"{}\" is not)", token));
    merges_[pair_key(find(tokens[0]), find(tokens[1]))] = uint32_t(merged_.size());
    merged_.push_back(find(tokens[2]));
  }
}

void Tokenizer::read_normalizer(const Value& spec) {
  const std::string& type = spec.at("type").as_string();
  if (type == "Sequence") {
    for (const Value& step : spec.at("normalizers").items()) read_normalizer(step);
  } else if (type == "NFC") {
    nfc_ = true;
  } else {
    fail_input("{}: normalizer {} is not supported (only NFC)", spec.where(), type);
  }
}

// The library does not read the ids of added tokens: one that the model lacks gets the next free
// id. Of several with one text the last counts. The end-of-text token is one of them.
void Tokenizer::read_added(const Value& list) {
  auto next = int32_t(vocabulary_.size());
  std::map<std::string, int32_t> ids;
  std::map<int32_t, const Value*> by_id;
  for (const Value& token : list.items()) {
    const std::string& text = token.at("content").as_string();
    if (text.empty()) continue;
    const int32_t own = find(text);
    const auto [it, is_new] = ids.emplace(text, own < 0 ? next : own);
    next += is_new && own < 0;
    by_id[it->second] = &token;
  }
  for (const auto& [id, token] : by_id) {
    const bool normalized = flag(*token, "normalized");
    std::string text = token->at("content").as_string();
    if (normalized && nfc_) text = normalize_nfc(text);
    set_token(id, text);
    AddedTokens& tokens = normalized ? normalized_ : raw_;
    tokens[static_cast<unsigned char>(text[0])][text] = {
        id, flag(*token, "single_word"), flag(*token, "lstrip"), flag(*token, "rstrip")};
  }

  std::vector<std::string> names = {"<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>",
                                    "<eos>"};
  const std::filesystem::path config =
      std::filesystem::path(file_).replace_filename("tokenizer_config.json");
  if (exists(config)) {
    const Value json = parse_json(read_file(config), config);
    const Value* token = given(json, "eos_token");
    if (token && token->is(Value::Kind::object)) token = given(*token, "content");
    if (token) names.insert(names.begin(), token->as_string());
  }
  const auto name = std::ranges::find_if(names, [&](auto& n) { return ids.contains(n); });
  if (name != names.end()) eos_ = ids.at(*name);
}

// Sennrich et al. 2016 (arXiv 1508.07909): merges the adjacent pair of lowest rank, leftmost first,
// until none is left.
void Tokenizer::bpe(std::string_view piece, std::vector<int32_t>& out) const {
  if (ignore_merges_)
    if (const int32_t id = find(spelled(piece)); id >= 0) return out.push_back(id);
  struct Symbol {
    int32_t id;
    uint32_t next, previous;  // kNever at the ends
    uint32_t rank;            // of the pair with the next symbol
  };
  std::vector<Symbol> symbols;
  bool fusing = false;
  for (const unsigned char c : piece) {
    int32_t id = byte_id_[c];
    const bool unknown = id < 0;
    if (unknown) id = fusing && fuse_unknown_ ? -1 : unknown_;
    fusing = unknown;
    const auto at = uint32_t(symbols.size());
    if (id >= 0) symbols.push_back({id, at + 1, at - 1, kNever});
  }
  if (symbols.empty()) return;
  symbols.back().next = kNever;
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue;  // rank << 32 | place
  const auto rank_pair = [&](uint32_t i) {
    Symbol& s = symbols[i];
    s.rank = kNever;
    if (s.next == kNever) return;
    const auto it = merges_.find(pair_key(s.id, symbols[s.next].id));
    if (it == merges_.end()) return;
    s.rank = it->second;
    queue.push(uint64_t(s.rank) << 32 | i);
  };
  for (uint32_t i = 0; i < symbols.size(); ++i) rank_pair(i);
  while (!queue.empty()) {
    const auto rank = uint32_t(queue.top() >> 32), i = uint32_t(queue.top());
    queue.pop();
    Symbol& s = symbols[i];
    if (s.rank != rank) continue;  // the pair is gone
    Symbol& right = symbols[s.next];
    s.id = merged_[rank];
    s.next = right.next;
    right.rank = kNever;
    if (s.next != kNever) symbols[s.next].previous = i;
    rank_pair(i);
    if (s.previous != kNever) rank_pair(s.previous);
  }
  for (uint32_t i = 0; i != kNever; i = symbols[i].next) out.push_back(symbols[i].id);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, PieceCache* cache) const {
  constexpr size_t kLongest = 64;  // of a piece in the cache
  std::vector<int32_t> ids;
  const auto found = [&](int32_t id) { ids.push_back(id); };
  const auto add_piece = [&](std::string_view piece) {
    if (!cache || piece.size() > kLongest) return bpe(piece, ids);
    auto& [known, its_ids] = (*cache)[std::hash<std::string_view>()(piece) % cache->size()];
    if (known != piece) {
      known = piece;
      its_ids.clear();
      bpe(piece, its_ids);
    }
    ids.insert(ids.end(), its_ids.begin(), its_ids.end());
  };
  const auto normalized = [&](std::string_view part) { pretokenizer_->split(part, add_piece); };
  split_at_tokens(raw_, repair_utf8(text), found, [&](std::string_view part) {
    split_at_tokens(normalized_, nfc_ ? normalize_nfc(part) : part, found, normalized);
  });
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string out;
  for (const int32_t id : ids)
    if (id >= 0 && id < vocab_size()) out += bytes_[size_t(id)];
  return repair_utf8(out);
}

}  // namespace pith
