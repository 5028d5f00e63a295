#pragma once
// UTF-8 and Unicode as the `tokenizers` library 0.23 sees them: properties of Unicode 16 (its
// Oniguruma), combining classes of Unicode 9 (its normalizer). PCRE2 10.42 and utf8proc 2.8 are of
// other versions; the tables in unicode.cpp are the differences, found by comparing every code
// point.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pith {

// Length in bytes of the character that begins with `lead`, and the character at p, in valid UTF-8.
inline size_t utf8_length(char lead) {
  const auto c = static_cast<unsigned char>(lead);
  return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}
uint32_t code_point(const char* p);
void append_utf8(uint32_t code_point, std::string& out);

// The next three return `text` itself where nothing changes, else a view of `storage`, which they
// overwrite.

// U+FFFD for every maximal subpart of an ill-formed sequence (Unicode 16, section 3.9).
std::string_view repair_utf8(std::string_view text, std::string& storage);
// Normalization form C of valid UTF-8.
std::string_view normalize_nfc(std::string_view text, std::string& storage);
// What to show PCRE2 in place of valid UTF-8: characters younger than its tables become older ones
// of the same general category and length. (A pattern that names one of them, or a range around it,
// sees the older one.)
std::string_view stand_in(std::string_view text, std::string& storage);

bool is_space(uint32_t code_point);  // White_Space
bool is_word(uint32_t code_point);   // \w of Unicode TS 18

}  // namespace pith
