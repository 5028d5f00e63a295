#pragma once
// UTF-8 and Unicode as the `tokenizers` library sees them. The tables are those of the installed
// utf8proc (2.8: Unicode 14) and Oniguruma (6.9.8: Unicode 14); tokenizers 0.23 knows Unicode 16.
// Letters, digits and marks that came in between may be cut in other places.

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

bool is_space(uint32_t code_point);  // White_Space
bool is_word(uint32_t code_point);   // \w of Unicode TS 18

}  // namespace pith
