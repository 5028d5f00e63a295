#include "data/pretokenize.h"

#include <oniguruma.h>

#include <climits>

#include "data/unicode.h"

namespace pith {
namespace {

// Rust's char::is_numeric, of Unicode 17.
const std::string kNumeric = "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]";
const std::string kGpt2 =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

const OnigUChar* bytes(const char* p) { return reinterpret_cast<const OnigUChar*>(p); }

std::string message(int code, OnigErrorInfo* info = nullptr) {
  OnigUChar text[ONIG_MAX_ERROR_MESSAGE_LEN];
  const int size = onig_error_code_to_str(text, code, info);
  return {reinterpret_cast<const char*>(text), size_t(size)};
}

std::shared_ptr<regex_t> compile(const std::string& pattern, bool literal,
                                 const std::string& where) {
  // No limits: a piece may be as long as a document.
  [[maybe_unused]] static const bool ready = [] {
    OnigEncoding utf8 = ONIG_ENCODING_UTF8;
    onig_initialize(&utf8, 1);
    onig_set_retry_limit_in_match(ULONG_MAX);
    onig_set_retry_limit_in_search(0);
    onig_set_match_stack_limit_size(0);
    return true;
  }();
  OnigErrorInfo info{};
  regex_t* regex = nullptr;
  const int error = onig_new(&regex, bytes(pattern.data()), bytes(pattern.data() + pattern.size()),
                             ONIG_OPTION_NONE, ONIG_ENCODING_UTF8,
                             literal ? ONIG_SYNTAX_ASIS : ONIG_SYNTAX_ONIGURUMA, &info);
  if (error != ONIG_NORMAL)
    fail_input("{}: {} in pattern {}", where, message(error, &info), printable(pattern, 400));
  return {regex, &onig_free};
}

// Where the first match from `at` on is, or false.
bool search(regex_t* regex, std::string_view text, size_t at, size_t& begin, size_t& end) {
  const auto free_region = [](OnigRegion* r) { onig_region_free(r, 1); };
  thread_local const std::unique_ptr<OnigRegion, decltype(free_region)> region(onig_region_new());
  const OnigUChar *first = bytes(text.data()), *last = first + text.size();
  const int found =
      onig_search(regex, first, last, first + at, last, region.get(), ONIG_OPTION_NONE);
  if (found < ONIG_MISMATCH) fail("matching a pre-tokenizer pattern: {}", message(found));
  if (found == ONIG_MISMATCH) return false;
  begin = size_t(region->beg[0]);
  end = size_t(region->end[0]);
  return true;
}

}  // namespace

PreTokenizer::PreTokenizer(const Value& spec) {
  add(spec);
  if (!byte_level_)
    fail_input("{}: there is no ByteLevel step; only byte-level BPE is supported", spec.where());
}

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
    steps_.push_back(
        {compile(kNumeric, false, where), each ? Behavior::isolated : Behavior::contiguous});
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    if (spec.at("add_prefix_space").as_bool()) steps_.emplace_back();
    const Value* regex = spec.find("use_regex");
    if (!regex || regex->as_bool()) steps_.push_back({compile(kGpt2, false, where)});
  } else if (type == "Split") {
    const std::string& name = spec.at("behavior").as_string();
    const std::string_view names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext",
                                      "Contiguous"};
    const auto* behavior = std::find(std::begin(names), std::end(names), name);
    if (behavior == std::end(names)) fail_input("{}: unknown behavior {}", where, name);
    const Value& pattern = spec.at("pattern");
    const Value* literal = pattern.find("String");
    const Value& text = literal ? *literal : pattern.at("Regex");
    steps_.push_back({compile(text.as_string(), literal, where), Behavior(behavior - names),
                      spec.at("invert").as_bool()});
  } else {
    fail_input("{}: pre-tokenizer {} is not supported (only Split, Digits, ByteLevel, Sequence)",
               where, type);
  }
}

void PreTokenizer::split(std::string_view text, const Sink& piece) const {
  if (text.size() >= INT_MAX)  // Oniguruma counts in int
    fail_input("a text of {} bytes is too long to tokenize", text.size());
  if (!text.empty()) run(0, text, piece);
}

void PreTokenizer::run(size_t step, std::string_view piece, const Sink& sink) const {
  if (step == steps_.size()) return sink(piece);
  if (steps_[step].regex) return run_split(step, piece, sink);
  run(step + 1, piece[0] == ' ' ? piece : fmt::format(" {}", piece), sink);
}

void PreTokenizer::run_split(size_t step, std::string_view piece, const Sink& sink) const {
  const auto& [regex, behavior, invert] = steps_[step];
  size_t begin = 0, end = 0;  // the piece that may still grow; empty if there is none
  bool previous = false;      // was the last segment a match?
  const auto flush = [&] {
    if (end > begin) run(step + 1, piece.substr(begin, end - begin), sink);
  };
  const auto segment = [&](size_t b, size_t e, bool match) {
    match ^= invert;
    const bool grows = (behavior == Behavior::contiguous && match == previous) ||
                       (behavior == Behavior::merged_with_previous && match && !previous) ||
                       (behavior == Behavior::merged_with_next && !match && previous);
    if (!grows || end <= begin) {
      flush();
      begin = b;
    }
    end = match && behavior == Behavior::removed ? b : e;
    previous = match;
  };
  const size_t size = piece.size();
  size_t done = 0, at = 0, b = 0, e = 0;
  while (at <= size && search(regex.get(), piece, at, b, e)) {
    at = e;
    if (b == e && e == done) {  // an empty match right after a match does not count
      at += at < size ? utf8_length(piece[at]) : 1;
      continue;
    }
    if (done < b) segment(done, b, false);
    segment(b, e, true);
    done = e;
  }
  if (done < size) segment(done, size, false);
  flush();
}

}  // namespace pith
