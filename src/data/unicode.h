#pragma once
// UTF-8 and Unicode as the `tokenizers` library 0.23 sees them: properties of Unicode 16 (its Oniguruma), canonical
// combining classes of Unicode 9 (its normalizer). PCRE2 10.42 and utf8proc 2.8 are of other versions; the differences
// were found by comparing every code point and are the two tables in unicode.cpp.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pith {

// Code point that starts at p, in valid UTF-8, and its length in bytes.
uint32_t code_point(const char* p);
inline size_t utf8_length(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}
void append_utf8(uint32_t code_point, std::string& out);

// The three below return `text` itself where nothing changes, else a view of `storage`, which they overwrite.
// U+FFFD for every maximal subpart of an ill-formed sequence (Unicode 16, section 3.9, "U+FFFD Substitution").
std::string_view repair_utf8(std::string_view text, std::string& storage);
// Normalization form C of valid UTF-8.
std::string_view normalize_nfc(std::string_view text, std::string& storage);
// What to show PCRE2 in place of valid UTF-8 `text`: characters younger than its tables become older ones of the same
// general category and the same length.
std::string_view stand_in(std::string_view text, std::string& storage);

bool is_space(uint32_t code_point);  // White_Space
bool is_word(uint32_t code_point);   // \w of Unicode TS 18: letters, marks, decimal digits, connectors, joiners

}  // namespace pith
