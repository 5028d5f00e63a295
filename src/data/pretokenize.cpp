#include "data/pretokenize.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "core/error.h"
#include "data/unicode.h"

namespace pith {
namespace {

// Contents of a character class. White_Space is spelled out: PCRE2's \s also has U+180E.
const std::string kSpace =
    "\\t-\\r "
    "\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
const std::string kNotSpace =
    "\\x00-\\x08\\x0e-\\x1f!-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{"
    "10ffff}";
// Oniguruma's \w: letters, marks, Nd, Nl, Pc and Other_Alphabetic; outside a class also the raised
// digits and fractions of Latin-1.
const std::string kWord =
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}"
    "\\x{1f170}-\\x{1f189}";
const std::string kWordAlone = kWord + "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";
// Rust's char::is_numeric, of Unicode 17.
const std::string kNumeric = "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]";
const std::string kGpt2 =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// Rewrites an Oniguruma pattern (Ruby-like syntax, Unicode, "^" and "$" at lines) for PCRE2. Only
// what means the same, or is known how to say, passes.
class Translator {
 public:
  Translator(const std::string& in, const std::string& where) : in_(in), where_(where) {}
  std::string run() {
    while (at_ < in_.size()) outside();
    return out_;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    fail_input("{}: {} at offset {} of pattern {} is not supported", where_, what, at_, in_);
  }
  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  bool next_in(size_t ahead, const char* set) const {
    return peek(ahead) && std::string_view(set).find(peek(ahead)) != std::string_view::npos;
  }
  void take(size_t n = 1) {
    out_.append(in_, at_, n);
    at_ += n;
  }

  void outside() {
    const bool continues = (peek() & 0xc0) == 0x80 || next_in(0, "*+?{)");
    if (!continues) atom_ = out_.size();
    switch (peek()) {
      case '\\': return escape(false);
      case '[': return char_class();
      case '(': return group();
      case ')':
        if (groups_.empty()) refuse("')'");
        atom_ = groups_.back();
        groups_.pop_back();
        return take();
      case '*':
      case '+':
      case '?': return take(next_in(1, "+?") ? 2 : 1);
      case '{': return interval();
      default: take();
    }
  }

  // "(?i)" inside a pattern opens a group in Oniguruma, but not in PCRE2.
  void group() {
    groups_.push_back(out_.size());
    if (peek(1) == '*') refuse("'(*'");
    if (peek(1) != '?') return take();
    size_t end = 2;
    while (next_in(end, "i-")) ++end;
    const bool known =
        end == 2 ? next_in(2, ":=!><") : peek(end) == ':' || (peek(end) == ')' && at_ == 0);
    if (!known) refuse("'(?'");
    take(end);
  }

  // {n}, {n,}, {n,m}, {,m}. A "+" after it repeats the whole (it does not make it possessive), and
  // {n}? is optional.
  void interval() {
    const size_t close = in_.find('}', at_);
    const std::string body = close == in_.npos ? "" : in_.substr(at_ + 1, close - at_ - 1);
    if (body.empty() || body == "," || body.find_first_not_of("0123456789,") != body.npos)
      refuse("'{'");
    out_ += (body[0] == ',' ? "{0" : "{") + body + "}";
    at_ = close + 1;
    if (peek() == '+' || (peek() == '?' && body.find(',') == body.npos)) {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
    if (next_in(0, "+?")) take();
  }

  void char_class() {
    take(peek(1) == '^' ? 2 : 1);
    if (peek() == ']') refuse("']' at the start of a class");
    while (peek() != ']') {
      if (at_ >= in_.size()) refuse("an unfinished class");
      if (peek() == '[') refuse("a class inside a class");
      if (peek() == '&' && peek(1) == '&') refuse("'&&'");
      peek() == '\\' ? escape(true) : take();
    }
    take();
  }

  void escape(bool in_class) {
    const char c = peek(1);
    const auto put = [&](const std::string& text) {
      out_ += text;
      at_ += 2;
    };
    const auto set = [&](const std::string& inside) {
      put(in_class ? inside : "[" + inside + "]");
    };
    const bool plain = next_in(1, "rntfae") || (!in_class && next_in(1, "AzZ"));
    if (c == 's') return set(kSpace);
    if (c == 'S') return set(kNotSpace);
    if (c == 'w') return set(in_class ? kWord : kWordAlone);
    if (c == 'W' && !in_class) return put("[^" + kWordAlone + "]");
    if (c == 'd') return put("\\p{Nd}");
    if (c == 'D') return put("\\P{Nd}");
    if (c == 'b' && !in_class) {
      const std::string word = "[" + kWordAlone + "])";
      return put("(?:(?<=" + word + "(?!" + word + "|(?<!" + word + "(?=" + word + ")");
    }
    if ((c == 'p' || c == 'P') && peek(2) == '{') return property();
    if (c == '\0' || (c & 0x80) || (isalnum(c) && !plain)) refuse(fmt::format("'\\{}'", c));
    take(2);
  }

  // \p{Lu} is a general category, \p{Han} the script (to PCRE2 a bare name means script
  // extensions).
  void property() {
    const size_t close = std::min(in_.find('}', at_), in_.size());
    bool negated = peek(1) == 'P';
    std::string name = in_.substr(at_ + 3, close - at_ - 3);
    if (name.starts_with('^')) {
      negated = !negated;
      name.erase(0, 1);
    }
    out_ += fmt::format("\\{}{{{}{}}}", negated ? 'P' : 'p', name.size() > 2 ? "sc:" : "", name);
    at_ = close + 1;
  }

  const std::string &in_, &where_;
  std::string out_;
  size_t at_ = 0, atom_ = 0;    // atom_: where in out_ the thing that a quantifier repeats begins
  std::vector<size_t> groups_;  // open groups, as atoms
};

std::string pcre2_message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

template <class T, void (*Free)(T*)> struct Freer {
  void operator()(T* p) const { Free(p); }
};
template <class T, void (*Free)(T*)> using Owned = std::unique_ptr<T, Freer<T, Free>>;

constexpr size_t kNone = ~size_t(0);

}  // namespace

struct PreTokenizer::Memory {
  Owned<pcre2_match_data, pcre2_match_data_free> match{pcre2_match_data_create(1, nullptr)};
  Owned<pcre2_match_context, pcre2_match_context_free> context{pcre2_match_context_create(nullptr)};
  Owned<pcre2_jit_stack, pcre2_jit_stack_free> stack{
      pcre2_jit_stack_create(size_t(64) << 10, size_t(64) << 20, nullptr)};
  std::string shape, prefixed_text, prefixed_shape;
  // No limits: a piece may be as long as a document.
  Memory() {
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
    pcre2_set_match_limit(context.get(), UINT32_MAX);
    pcre2_set_depth_limit(context.get(), UINT32_MAX);
    pcre2_set_heap_limit(context.get(), UINT32_MAX);
  }
};

PreTokenizer::PreTokenizer(const Value& spec) : memory_(std::make_shared<Memory>()) {
  add(spec);
  if (!byte_level_)
    fail_input("{}: there is no ByteLevel step; only byte-level BPE is supported", spec.where());
}

PreTokenizer::PreTokenizer(const PreTokenizer& other)
    : steps_(other.steps_), byte_level_(true), memory_(std::make_shared<Memory>()) {}

void PreTokenizer::add(const Value& spec) {
  if (spec.is_null()) return;
  const std::string &type = spec.at("type").as_string(), &where = spec.where();
  if (type == "Sequence") {
    for (const Value& step : spec.at("pretokenizers").items()) add(step);
    return;
  }
  if (byte_level_) fail_input("{}: {} after ByteLevel is not supported", where, type);
  if (type == "Digits") {
    const bool each = spec.at("individual_digits").as_bool();
    add_split(kNumeric, false, where, each ? Behavior::isolated : Behavior::contiguous, false);
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    if (spec.at("add_prefix_space").as_bool()) steps_.emplace_back();
    const Value* regex = spec.find("use_regex");
    if (!regex || regex->as_bool())
      add_split(Translator(kGpt2, where).run(), false, where, Behavior::isolated, false);
  } else if (type == "Split") {
    const std::string& name = spec.at("behavior").as_string();
    const std::string_view names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext",
                                      "Contiguous"};
    const auto* behavior = std::find(std::begin(names), std::end(names), name);
    if (behavior == std::end(names)) fail_input("{}: unknown behavior {}", where, name);
    const Value& pattern = spec.at("pattern");
    const Value* literal = pattern.find("String");
    add_split(
        literal ? literal->as_string() : Translator(pattern.at("Regex").as_string(), where).run(),
        literal != nullptr, where, Behavior(behavior - names), spec.at("invert").as_bool());
  } else {
    fail_input("{}: pre-tokenizer {} is not supported (only Split, Digits, ByteLevel, Sequence)",
               where, type);
  }
}

void PreTokenizer::add_split(const std::string& pattern, bool literal, const std::string& where,
                             Behavior behavior, bool invert) {
  const uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE);
  const Owned<pcre2_compile_context, pcre2_compile_context_free> context(
      pcre2_compile_context_create(nullptr));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                   options, &error, &offset, context.get());
  if (!code) fail_input("{}: {} at offset {} of {}", where, pcre2_message(error), offset, pattern);
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT, pcre2_match interprets
  const bool by_property = !literal && pattern.find("\\p{") != pattern.npos;
  steps_.push_back({{code, &pcre2_code_free}, behavior, invert, by_property});
}

void PreTokenizer::split(std::string_view text, const Sink& piece) {
  if (!text.empty())
    run(0, {text.data(), stand_in(text, memory_->shape).data(), text.size()}, piece);
}

void PreTokenizer::run(size_t step, Piece piece, const Sink& sink) {
  if (step == steps_.size()) return sink({piece.text, piece.size});
  if (steps_[step].code) return run_split(step, piece, sink);
  if (piece.text[0] != ' ') {
    Memory& m = *memory_;
    m.prefixed_text.assign(1, ' ').append(piece.text, piece.size);
    m.prefixed_shape.assign(1, ' ').append(piece.shape, piece.size);
    piece = {m.prefixed_text.data(), m.prefixed_shape.data(), piece.size + 1};
  }
  run(step + 1, piece, sink);
}

// Whether the step's pattern matches from `at` on; the place is then in memory_->match.
bool PreTokenizer::find(const Step& step, Piece piece, size_t at) {
  const auto match = [&](uint32_t options) {
    const char* subject = step.by_property ? piece.shape : piece.text;
    return pcre2_match(step.code.get(), reinterpret_cast<PCRE2_SPTR>(subject), piece.size, at,
                       PCRE2_NO_UTF_CHECK | options, memory_->match.get(), memory_->context.get());
  };
  int rc = match(0);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = match(PCRE2_NO_JIT);  // slower, on the heap
  if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
    fail("matching a pre-tokenizer pattern: {}", pcre2_message(rc));
  return rc >= 0;
}

void PreTokenizer::run_split(size_t step, Piece piece, const Sink& sink) {
  const Step& how = steps_[step];
  size_t begin = 0, end = kNone;  // the piece that may still grow; end is kNone if there is none
  bool previous = false;          // was the last segment a match?
  const auto flush = [&] {
    if (end != kNone && end > begin)
      run(step + 1, {piece.text + begin, piece.shape + begin, end - begin}, sink);
    end = kNone;
  };
  const auto segment = [&](size_t b, size_t e, bool match) {
    match ^= how.invert;
    const bool grows = (how.behavior == Behavior::contiguous && match == previous) ||
                       (how.behavior == Behavior::merged_with_previous && match && !previous) ||
                       (how.behavior == Behavior::merged_with_next && !match && previous);
    if (!grows || end == kNone) {
      flush();
      begin = b;
    }
    if (!match || how.behavior != Behavior::removed) end = e;
    previous = match;
  };
  size_t done = 0, last_end = kNone;
  for (size_t at = 0; at <= piece.size && find(how, piece, at);) {
    const size_t* found = pcre2_get_ovector_pointer(memory_->match.get());
    const size_t b = found[0], e = found[1];
    if (b == e && e == last_end) {  // an empty match right after a match does not count
      at += at < piece.size ? utf8_length(piece.shape[at]) : 1;
      continue;
    }
    at = last_end = e;
    if (done != b) segment(done, b, false);
    segment(b, e, true);
    done = e;
  }
  if (done != piece.size) segment(done, piece.size, false);
  flush();
}

}  // namespace pith
