#include "data/pretokenize.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "core/error.h"
#include "data/unicode.h"

namespace pith {
namespace {

// Contents of a character class. White_Space is spelled out because PCRE2's \s also has U+180E.
constexpr const char* kSpace =
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
constexpr const char* kNotSpace =
    "\\x00-\\x08\\x0e-\\x1f!-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}"
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}";
// Oniguruma's \w: letters, marks, Nd, Nl, Pc and Other_Alphabetic, and for Latin-1 the digits of ISO 8859-1.
constexpr const char* kWord =
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}"
    "\\x{1f170}-\\x{1f189}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";
// Rust's char::is_numeric, of Unicode 17.
constexpr const char* kNumeric = "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]";
constexpr const char* kGpt2 =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// Rewrites an Oniguruma pattern, one construct at a time.
class Translator {
 public:
  Translator(const std::string& in, const std::string& where) : in_(in), where_(where) {}
  std::string run() {
    while (at_ < in_.size()) in_[at_] == '[' ? char_class() : outside();
    return out_;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    fail_input("{}: {} at offset {} of pattern {} is not supported", where_, what, at_, in_);
  }
  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  void take(size_t n = 1) {
    out_.append(in_, at_, n);
    at_ += n;
  }

  void outside() {
    const char c = peek();
    if ((c & 0xc0) != 0x80 && c != '*' && c != '+' && c != '?' && c != '{' && c != ')') atom_ = out_.size();
    switch (c) {
      case '\\': return escape(false);
      case '(': return group();
      case ')':
        if (groups_.empty()) refuse("')'");
        atom_ = groups_.back();
        groups_.pop_back();
        return take();
      case '*':
      case '+':
      case '?': return take(peek(1) == '+' || peek(1) == '?' ? 2 : 1);
      case '{': return interval();
      default: take();
    }
  }

  void group() {
    groups_.push_back(out_.size());
    if (peek(1) == '*') refuse("'(*'");
    if (peek(1) != '?') return take();
    size_t end = at_ + 2;
    while (end < in_.size() && (in_[end] == 'i' || in_[end] == '-')) ++end;
    const char c = end < in_.size() ? in_[end] : '\0';
    const bool flags = end > at_ + 2;
    // "(?i)" inside a pattern opens a group in Oniguruma, but not in PCRE2.
    if (flags ? c != ':' && (c != ')' || at_ != 0) : std::string_view(":=!><").find(c) == std::string_view::npos) refuse("'(?'");
    take(end - at_);
  }

  // {n}, {n,}, {n,m}, {,m}. A "+" after it repeats the whole (it does not make it possessive), and {n}? is optional.
  void interval() {
    const size_t close = in_.find('}', at_);
    const std::string body = close == in_.npos ? "" : in_.substr(at_ + 1, close - at_ - 1);
    if (body.empty() || body == "," || body.find_first_not_of("0123456789,") != body.npos) refuse("'{'");
    out_ += body[0] == ',' ? "{0" + body + "}" : "{" + body + "}";
    at_ = close + 1;
    if (peek() == '+' || (peek() == '?' && body.find(',') == body.npos)) {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
    if (peek() == '+' || peek() == '?') take();
  }

  void char_class() {
    atom_ = out_.size();
    take();
    if (peek() == '^') take();
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
    const auto set = [&](const char* inside) {
      put(in_class ? inside : std::string("[") + inside + "]");
    };
    const auto complement = [&](const char* inside) {
      if (in_class) refuse(fmt::format("'\\{}' in a class", c));
      put(std::string("[^") + inside + "]");
    };
    switch (c) {
      case 's': return set(kSpace);
      case 'S': return set(kNotSpace);
      case 'w': return set(kWord);
      case 'W': return complement(kWord);
      case 'd': return put("\\p{Nd}");
      case 'D': return put("\\P{Nd}");
      case 'h': return set("0-9a-fA-F");
      case 'H': return complement("0-9a-fA-F");
      case 'v': return put("\\x0b");
      case 'b':
      case 'B': {
        if (in_class) refuse("'\\b' in a class");
        const std::string after = fmt::format("(?<=[{}])", kWord), before = fmt::format("(?=[{}])", kWord);
        const std::string not_after = fmt::format("(?<![{}])", kWord), not_before = fmt::format("(?![{}])", kWord);
        return put(c == 'b' ? "(?:" + after + not_before + "|" + not_after + before + ")"
                            : "(?:" + after + before + "|" + not_after + not_before + ")");
      }
      case 'p':
      case 'P': return property();
      case 'x':
      case 'u': return hexadecimal();
      default: {
        const bool known = std::string_view("rntfae").find(c) != std::string_view::npos ||
                           (!in_class && std::string_view("AzZR").find(c) != std::string_view::npos);
        if (c == '\0' || (c & 0x80) || (isalnum(c) && !known)) refuse(fmt::format("'\\{}'", c));
        take(2);
      }
    }
  }

  // \x{H...}, \uHHHH, and \xHH below 80 (from there on it is a byte, not a code point).
  void hexadecimal() {
    const bool braces = peek(1) == 'x' && peek(2) == '{';
    const size_t begin = at_ + (braces ? 3 : 2), count = peek(1) == 'u' ? 4 : 2;
    const size_t end = braces ? in_.find('}', at_) : std::min(begin + count, in_.size());
    const std::string digits = end == in_.npos ? "" : in_.substr(begin, end - begin);
    if (digits.empty() || digits.find_first_not_of("0123456789abcdefABCDEF") != digits.npos ||
        (!braces && (digits.size() != count || (count == 2 && digits[0] > '7'))))
      refuse("a hexadecimal escape");
    out_ += "\\x{" + digits + "}";
    at_ = end + braces;
  }

  // \p{Lu} is a general category, \p{Han} the script property (a bare name means script extensions to PCRE2).
  void property() {
    const size_t close = in_.find('}', at_);
    if (peek(2) != '{' || close == in_.npos) refuse("'\\p' without braces");
    bool negated = peek(1) == 'P';
    std::string name = in_.substr(at_ + 3, close - at_ - 3);
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.erase(0, 1);
    }
    out_ += fmt::format("\\{}{{{}{}}}", negated ? 'P' : 'p', name.size() > 2 && name != "Any" ? "sc:" : "", name);
    at_ = close + 1;
  }

  const std::string &in_, &where_;
  std::string out_;
  size_t at_ = 0, atom_ = 0;     // atom_: where in out_ the thing that a quantifier would repeat begins
  std::vector<size_t> groups_;   // open groups, as atoms
};

std::string pcre2_message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

constexpr size_t kNone = ~size_t(0);

}  // namespace

std::string pcre2_pattern(const std::string& onig, const std::string& where) {
  return Translator(onig, where).run();
}

struct PreTokenizer::Scratch::State {
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match{
      pcre2_match_data_create(1, nullptr), &pcre2_match_data_free};
  std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context{
      pcre2_match_context_create(nullptr), &pcre2_match_context_free};
  std::unique_ptr<pcre2_jit_stack, decltype(&pcre2_jit_stack_free)> stack{
      pcre2_jit_stack_create(size_t(64) << 10, size_t(64) << 20, nullptr), &pcre2_jit_stack_free};
  std::string shape, prefixed_text, prefixed_shape;
};

PreTokenizer::Scratch::Scratch(const PreTokenizer&) : state_(std::make_unique<State>()) {
  // No limits: a piece may be as long as a document, and what is slow to match was slow in the library too.
  pcre2_jit_stack_assign(state_->context.get(), nullptr, state_->stack.get());
  pcre2_set_match_limit(state_->context.get(), UINT32_MAX);
  pcre2_set_depth_limit(state_->context.get(), UINT32_MAX);
  pcre2_set_heap_limit(state_->context.get(), UINT32_MAX);
}
PreTokenizer::Scratch::Scratch(Scratch&&) noexcept = default;
PreTokenizer::Scratch::~Scratch() = default;

PreTokenizer::PreTokenizer(const Value& spec) {
  add(spec);
  if (!byte_level_) fail_input("{}: only byte-level BPE is supported, and there is no ByteLevel step", spec.where());
}

void PreTokenizer::add(const Value& spec) {
  if (spec.is_null()) return;
  const std::string& type = spec.at("type").as_string();
  if (type == "Sequence") {
    for (const Value& step : spec.at("pretokenizers").items()) add(step);
    return;
  }
  if (byte_level_) fail_input("{}: pre-tokenizer {} after ByteLevel is not supported", spec.where(), type);
  if (type == "Digits") {
    const bool each = spec.at("individual_digits").as_bool();
    add_split(kNumeric, false, spec.where(), each ? Behavior::isolated : Behavior::contiguous);
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    if (spec.at("add_prefix_space").as_bool()) steps_.emplace_back();
    const Value* use_regex = spec.find("use_regex");
    if (!use_regex || use_regex->as_bool()) add_split(pcre2_pattern(kGpt2, type), false, spec.where());
  } else if (type == "Split") {
    const std::string& name = spec.at("behavior").as_string();
    const char* const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    size_t behavior = 0;
    while (behavior < std::size(names) && name != names[behavior]) ++behavior;
    if (behavior == std::size(names)) fail_input("{}: unknown behavior {}", spec.where(), name);
    const Value& pattern = spec.at("pattern");
    const Value* literal = pattern.find("String");
    add_split(literal ? literal->as_string() : pcre2_pattern(pattern.at("Regex").as_string(), spec.where()),
              literal != nullptr, spec.where(), Behavior(behavior), spec.at("invert").as_bool());
  } else {
    fail_input("{}: pre-tokenizer {} is not supported (only Split, Digits, ByteLevel, Sequence)", spec.where(), type);
  }
}

void PreTokenizer::add_split(const std::string& pattern, bool literal, const std::string& where, Behavior behavior,
                             bool invert) {
  const uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE);
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  std::shared_ptr<pcre2_code> code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options,
                                                 &error, &offset, context.get()),
                                   &pcre2_code_free);
  if (!code) {
    fail_input("{}: pattern not supported by PCRE2: {} at offset {} of {}", where, pcre2_message(error), offset, pattern);
  }
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, pcre2_match interprets
  steps_.push_back({std::move(code), behavior, invert});
}

void PreTokenizer::split(std::string_view text, Scratch& scratch, const Sink& piece) const {
  const std::string_view shape = stand_in(text, scratch.state_->shape);
  if (!text.empty()) run(0, {text.data(), shape.data(), text.size()}, *scratch.state_, piece);
}

void PreTokenizer::run(size_t step, Piece piece, Scratch::State& state, const Sink& sink) const {
  if (step == steps_.size()) return sink({piece.text, piece.size});
  if (steps_[step].code) return run_split(step, piece, state, sink);
  if (piece.text[0] != ' ') {
    state.prefixed_text.assign(1, ' ').append(piece.text, piece.size);
    state.prefixed_shape.assign(1, ' ').append(piece.shape, piece.size);
    piece = {state.prefixed_text.data(), state.prefixed_shape.data(), piece.size + 1};
  }
  run(step + 1, piece, state, sink);
}

void PreTokenizer::run_split(size_t step, Piece piece, Scratch::State& state, const Sink& sink) const {
  const Step& how = steps_[step];
  size_t begin = 0, end = kNone;  // the piece that may still grow; end is kNone if there is none
  bool previous = false;          // was the last segment a match?
  const auto flush = [&] {
    if (end != kNone && end > begin) run(step + 1, {piece.text + begin, piece.shape + begin, end - begin}, state, sink);
    end = kNone;
  };
  const auto segment = [&](size_t b, size_t e, bool match) {
    match ^= how.invert;
    const bool grows = end != kNone && ((how.behavior == Behavior::contiguous && match == previous) ||
                                        (how.behavior == Behavior::merged_with_previous && match && !previous) ||
                                        (how.behavior == Behavior::merged_with_next && !match && previous));
    if (!grows) {
      flush();
      begin = b;
    }
    if (!match || how.behavior != Behavior::removed) end = e;
    previous = match;
  };
  size_t done = 0, at = 0, last_end = kNone;
  PCRE2_SPTR subject = reinterpret_cast<PCRE2_SPTR>(piece.shape);
  while (at <= piece.size) {
    int rc = pcre2_match(how.code.get(), subject, piece.size, at, PCRE2_NO_UTF_CHECK, state.match.get(),
                         state.context.get());
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
      rc = pcre2_match(how.code.get(), subject, piece.size, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, state.match.get(),
                       state.context.get());
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) fail("matching a pre-tokenizer pattern: {}", pcre2_message(rc));
    const size_t* found = pcre2_get_ovector_pointer(state.match.get());
    const size_t b = found[0], e = found[1];
    if (b == e && e == last_end) {  // an empty match right after a match does not count
      at += at < piece.size ? utf8_length(static_cast<unsigned char>(piece.shape[at])) : 1;
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
