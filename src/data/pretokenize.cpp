#include "data/pretokenize.h"

#include <oniguruma.h>
#include <utf8proc.h>

#include <climits>

namespace pith {

// As utf8proc and Oniguruma take them.
static const unsigned char* bytes(const char* p) {
  return reinterpret_cast<const unsigned char*>(p);
}

// Length of the ill-formed maximal subpart at p: what some bytes would complete, or one byte.
static size_t subpart(const utf8proc_uint8_t* p, size_t n) {
  for (size_t length = std::min(n, size_t(3)); length > 1; --length)
    for (const utf8proc_uint8_t rest : {0x80, 0xbf}) {
      utf8proc_uint8_t bytes[4] = {rest, rest, rest, rest};
      std::copy_n(p, length, bytes);
      utf8proc_int32_t c = 0;
      if (utf8proc_iterate(bytes, 4, &c) > utf8proc_ssize_t(length)) return length;
    }
  return 1;
}

size_t utf8_length(char lead) {
  return size_t(utf8proc_utf8class[static_cast<unsigned char>(lead)]);
}

uint32_t code_point(const char* p) {
  utf8proc_int32_t c = 0;
  utf8proc_iterate(bytes(p), utf8proc_ssize_t(utf8_length(*p)), &c);
  return uint32_t(c);
}

void append_utf8(uint32_t c, std::string& out) {
  utf8proc_uint8_t bytes[4];
  const auto n = utf8proc_encode_char(utf8proc_int32_t(c), bytes);
  out.append(bytes, bytes + n);
}

std::string repair_utf8(std::string_view text) {
  std::string out;
  size_t copied = 0;
  for (size_t i = 0; i < text.size();) {
    const auto* p = bytes(text.data() + i);
    const size_t left = text.size() - i;
    utf8proc_int32_t c = 0;
    const auto length = utf8proc_iterate(p, utf8proc_ssize_t(left), &c);
    if (length >= 0) {
      i += size_t(length);
      continue;
    }
    out.append(text, copied, i - copied).append("\xef\xbf\xbd");
    copied = i += subpart(p, left);
  }
  return out.append(text, copied);
}

std::string normalize_nfc(std::string_view text) {
  const auto below_300 = [](char c) { return static_cast<unsigned char>(c) < 0xcc; };
  if (std::ranges::all_of(text, below_300)) return std::string(text);  // nothing there changes
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t n =
      utf8proc_map(bytes(text.data()), utf8proc_ssize_t(text.size()), &mapped,
                   utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (n < 0) fail("utf8proc: {}", utf8proc_errmsg(n));
  std::string out(mapped, mapped + n);
  std::free(mapped);
  return out;
}

bool is_space(uint32_t c) { return ONIGENC_IS_CODE_SPACE(ONIG_ENCODING_UTF8, c); }

bool is_word(uint32_t c) {
  const auto category = utf8proc_category(utf8proc_int32_t(c));
  const bool circled = (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
                       (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL) ||
         category == UTF8PROC_CATEGORY_PC || circled || c == 0x200c || c == 0x200d;
}

// Rust's char::is_numeric, of Unicode 17.
const std::string kNumeric = "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]";
const std::string kGpt2 =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static std::string message(int code, OnigErrorInfo* info = nullptr) {
  OnigUChar text[ONIG_MAX_ERROR_MESSAGE_LEN];
  const int size = onig_error_code_to_str(text, code, info);
  return {reinterpret_cast<const char*>(text), size_t(size)};
}

static std::shared_ptr<regex_t> compile(const std::string& pattern, bool literal,
                                        const std::string& where) {
  // No limit, which is the default of the other limits: a piece may be as long as a document.
  [[maybe_unused]] static const bool ready = [] {
    OnigEncoding utf8 = ONIG_ENCODING_UTF8;
    onig_initialize(&utf8, 1);
    onig_set_retry_limit_in_match(ULONG_MAX);
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
static bool search(regex_t* regex, std::string_view text, size_t at, size_t& begin, size_t& end) {
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
  const Step& how = steps_[step];
  if (!how.regex) return run(step + 1, piece[0] == ' ' ? piece : fmt::format(" {}", piece), sink);
  size_t begin = 0, end = 0;  // the piece that may still grow; empty if there is none
  bool previous = false;      // was the last segment a match?
  const auto flush = [&] {
    if (end > begin) run(step + 1, piece.substr(begin, end - begin), sink);
  };
  const auto segment = [&](size_t b, size_t e, bool match) {
    match ^= how.invert;
    const bool grows = (how.behavior == Behavior::contiguous && match == previous) ||
                       (how.behavior == Behavior::merged_with_previous && match && !previous) ||
                       (how.behavior == Behavior::merged_with_next && !match && previous);
    if (!grows || end <= begin) {
      flush();
      begin = b;
    }
    end = match && how.behavior == Behavior::removed ? b : e;
    previous = match;
  };
  const size_t size = piece.size();
  size_t done = 0, at = 0, b = 0, e = 0;
  while (at <= size && search(how.regex.get(), piece, at, b, e)) {
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
