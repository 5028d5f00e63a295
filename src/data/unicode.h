#pragma once
// UTF-8 and Unicode as the `tokenizers` library 0.23 sees them: properties of Unicode 16 (its
// Oniguruma), combining classes of Unicode 9 (its normalizer). Debian's Oniguruma 6.9.8 and
// utf8proc 2.8 are of other versions; the tables in unicode.cpp are the differences, found by
// comparing every code point.

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

// U+FFFD for every maximal subpart of an ill-formed sequence (Unicode 16, section 3.9).
std::string repair_utf8(std::string_view text);
// Normalization form C of valid UTF-8.
std::string normalize_nfc(std::string_view text);
// What to show Oniguruma in place of valid UTF-8: characters younger than its tables become older
// ones of the same general category and length. (A pattern that names one of them sees the older
// one.)
std::string stand_in(std::string_view text);

bool is_space(uint32_t code_point);  // White_Space
bool is_word(uint32_t code_point);   // \w of Unicode TS 18

}  // namespace pith
