#include "data/unicode.h"

#include <utf8proc.h>

#include <cstdlib>

#include "core/error.h"

namespace pith {
static const utf8proc_uint8_t* bytes_of(const char* p) {
  return reinterpret_cast<const utf8proc_uint8_t*>(p);
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

uint32_t code_point(const char* p) {
  utf8proc_int32_t c = 0;
  utf8proc_iterate(bytes_of(p), utf8proc_ssize_t(utf8_length(*p)), &c);
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
    const auto* p = bytes_of(text.data() + i);
    const size_t left = text.size() - i;
    utf8proc_int32_t c = 0;
    const auto length = utf8proc_iterate(p, utf8proc_ssize_t(left), &c);
    if (length < 0) out.append(text, copied, i - copied).append("\xef\xbf\xbd");
    i += length < 0 ? subpart(p, left) : size_t(length);
    if (length < 0) copied = i;
  }
  return out.append(text, copied);
}

std::string normalize_nfc(std::string_view text) {
  const auto below_300 = [](char c) { return static_cast<unsigned char>(c) < 0xcc; };
  if (std::ranges::all_of(text, below_300)) return std::string(text);  // nothing there changes
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t n =
      utf8proc_map(bytes_of(text.data()), utf8proc_ssize_t(text.size()), &mapped,
                   utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (n < 0) fail("utf8proc: {}", utf8proc_errmsg(n));
  const std::string out(mapped, mapped + n);
  std::free(mapped);
  return out;
}

bool is_space(uint32_t c) {
  const auto category = utf8proc_category(utf8proc_int32_t(c));
  return (c >= 9 && c <= 13) || c == 0x85 ||
         (category >= UTF8PROC_CATEGORY_ZS && category <= UTF8PROC_CATEGORY_ZP);
}

bool is_word(uint32_t c) {
  const auto category = utf8proc_category(utf8proc_int32_t(c));
  const bool circled = (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
                       (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL) ||
         category == UTF8PROC_CATEGORY_PC || circled || c == 0x200c || c == 0x200d;
}

}  // namespace pith
