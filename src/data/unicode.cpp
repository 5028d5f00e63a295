#include "data/unicode.h"

#include <utf8proc.h>

#include <cstdlib>

#include "core/error.h"

namespace pith {
namespace {

// Code points (hexadecimal) that combine with nothing. First those whose combining class or
// composition the library's normalizer does not know, and U+11A7, which utf8proc 2.8 drops after a
// Hangul syllable; then what Unicode 15 and 16 added, with older characters of the same general
// category and length, of the same script where it is a large one, to put in their place.
constexpr struct {
  uint32_t stand_in;
  const char* code_points;
} kInert[] = {
    {0,
     "7fd 898-89f 8ca-8d3 9fe c3c d3b-d3c eba 11a7 1715 1abf-1ace 1df6-1dfa a82c 10d24-10d27 "
     "10eab-10eac 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 11930 11938 "
     "1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 16ff0-16ff1 "
     "1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef"},
    {0x898, "897 cf3 ece"},
    {0x1b5a, "1b4e-1b4f 1b7f"},
    {0x1c88, "1c8a"},
    {0x2426, "2427-2429 2ffc-2fff 31e4-31e5 31ef"},
    {0xa640, "1c89"},
    {0xa7c9, "a7cb-a7cc a7da a7dc"},
    {0xa7ca, "a7cd a7db"},
    {0x10100, "10d6e 113d4-113d5 113d7-113d8 11b00-11b09 11be1 11f43-11f4f 16d6d-16d6f 1e5ff"},
    {0x10107, "1d2c0-1d2d3"},
    {0x101fd,
     "10d69-10d6d 10efc-10eff 11241 113b8-113c0 113c2 113c5 113c7-113ca 113cc-113d0 113d2 "
     "113e1-113e2 11f00-11f01 11f03 11f34-11f3a 11f3e-11f42 11f5a 13440 13447-13455 "
     "1611e-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef"},
    {0x10280,
     "105c0-105f3 10d4a-10d4d 10d4f 1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 "
     "113d1 113d3 11bc0-11be0 11f02 11f04-11f10 11f12-11f33 1342f 13441-13446 13460-143fa "
     "16100-1611d 16d43-16d6a 18cff 1e4d0-1e4ea 1e5d0-1e5ed 1e5f0"},
    {0x10400, "10d50-10d65"},
    {0x10428, "10d70-10d85"},
    {0x104a0,
     "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 "
     "1e4f0-1e4f9 1e5f1-1e5fa"},
    {0x16b40, "10d4e 10d6f 16d40-16d42 16d6b-16d6c 1e030-1e06d 1e4eb"},
    {0x110bd, "13439-1343f"},
    {0x1b11f, "1b132"},
    {0x1b164, "1b155"},
    {0x1df00, "1df25-1df2a"},
    {0x1ee00, "10ec2-10ec4"},
    {0x1f300,
     "10d8e-10d8f 1cc00-1ccef 1cd00-1ceb3 1f6dc 1f774-1f776 1f77b-1f77f 1f7d9 1f8b2-1f8bb "
     "1f8c0-1f8c1 1fa75-1fa77 1fa87-1fa89 1fa8f 1faad-1faaf 1fabb-1fabf 1fac6 1face-1facf "
     "1fada-1fadc 1fadf 1fae8-1fae9 1faf7-1faf8 1fbcb-1fbef"},
    {0x2b738, "2b739 2ebf0-2ee5d 31350-323af"},
};

// By code point: the index into kInert plus one, or 0 if it is not there.
uint8_t inert_index(uint32_t c) {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> of(0x110000);
    for (size_t i = 0; i < std::size(kInert); ++i) {
      char* end = nullptr;
      for (const char* range = kInert[i].code_points; *range; range = end) {
        const unsigned long first = std::strtoul(range, &end, 16);
        const unsigned long last = *end == '-' ? std::strtoul(end + 1, &end, 16) : first;
        for (unsigned long at = first; at <= last; ++at) of[at] = uint8_t(i + 1);
      }
    }
    return of;
  }();
  return table[c];
}

uint32_t older(uint32_t c) {
  const int index = inert_index(c);
  const uint32_t stand_in = index ? kInert[index - 1].stand_in : 0;
  return stand_in ? stand_in : c;
}

const utf8proc_uint8_t* bytes_of(const char* p) {
  return reinterpret_cast<const utf8proc_uint8_t*>(p);
}

// Appends the normal form of a segment.
void append_nfc(std::string_view text, std::string& out) {
  if (std::none_of(text.begin(), text.end(), [](char c) { return c & 0x80; })) {
    out += text;
    return;
  }
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t n =
      utf8proc_map(bytes_of(text.data()), utf8proc_ssize_t(text.size()), &mapped,
                   utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (n < 0) fail("utf8proc: {}", utf8proc_errmsg(n));
  out.append(reinterpret_cast<const char*>(mapped), size_t(n));
  std::free(mapped);
}

// Writes a character and returns its length.
size_t encode(uint32_t c, char* to) {
  return size_t(utf8proc_encode_char(utf8proc_int32_t(c), reinterpret_cast<utf8proc_uint8_t*>(to)));
}

// First position from i on where the next 8 bytes are not all ASCII (or not 8).
size_t skip_ascii(std::string_view text, size_t i) {
  for (uint64_t word; i + 8 <= text.size(); i += 8) {
    std::memcpy(&word, text.data() + i, 8);
    if (word & 0x8080808080808080u) break;
  }
  return i;
}

// Length of the ill-formed maximal subpart at p: what some bytes would complete, or one byte.
size_t subpart(const utf8proc_uint8_t* p, size_t n) {
  for (size_t length = std::min(n, size_t(3)); length > 1; --length)
    for (const utf8proc_uint8_t rest : {0x80, 0xbf}) {
      utf8proc_uint8_t bytes[4] = {rest, rest, rest, rest};
      std::copy_n(p, length, bytes);
      utf8proc_int32_t c = 0;
      if (utf8proc_iterate(bytes, 4, &c) > utf8proc_ssize_t(length)) return length;
    }
  return 1;
}

}  // namespace

uint32_t code_point(const char* p) {
  utf8proc_int32_t c = 0;
  utf8proc_iterate(bytes_of(p), utf8proc_ssize_t(utf8_length(*p)), &c);
  return uint32_t(c);
}

void append_utf8(uint32_t c, std::string& out) {
  char bytes[4];
  out.append(bytes, encode(c, bytes));
}

std::string repair_utf8(std::string_view text) {
  std::string out;
  size_t copied = 0;
  for (size_t i = skip_ascii(text, 0); i < text.size(); i = skip_ascii(text, i)) {
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
  std::string out;
  size_t begin = 0;  // of the segment, which ends before a line end or an inert character
  for (size_t i = 0, n; i < text.size(); i += n) {
    n = utf8_length(text[i]);
    if (text[i] != '\n' && (n == 1 || !inert_index(code_point(text.data() + i)))) continue;
    append_nfc(text.substr(begin, i - begin), out);
    out.append(text, i, n);
    begin = i + n;
  }
  append_nfc(text.substr(begin), out);
  return out;
}

std::string stand_in(std::string_view text) {
  std::string out(text);
  for (size_t i = skip_ascii(out, 0); i < out.size(); i = skip_ascii(out, i)) {
    const uint32_t c = code_point(&out[i]);
    i += encode(older(c), &out[i]);
  }
  return out;
}

bool is_space(uint32_t c) {
  const auto category = utf8proc_category(utf8proc_int32_t(c));
  return (c >= 9 && c <= 13) || c == 0x85 ||
         (category >= UTF8PROC_CATEGORY_ZS && category <= UTF8PROC_CATEGORY_ZP);
}

bool is_word(uint32_t c) {
  const auto category = utf8proc_category(utf8proc_int32_t(older(c)));
  const bool circled = (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
                       (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL) ||
         category == UTF8PROC_CATEGORY_PC || circled || c == 0x200c || c == 0x200d;
}

}  // namespace pith
