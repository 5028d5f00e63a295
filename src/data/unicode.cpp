#include "data/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/error.h"

namespace pith {
namespace {

// First, last, stand-in: every code point that Unicode 15 and 16 added, with an older one of equal general category
// and UTF-8 length, of the same script where it is a large one.
constexpr uint32_t kNewer[] = {
    0x897, 0x897, 0x898, 0xcf3, 0xcf3, 0xcd6, 0xece, 0xece, 0xecd, 0x1b4e, 0x1b4f, 0x1b5a,
    0x1b7f, 0x1b7f, 0x1b7e, 0x1c89, 0x1c89, 0xa640, 0x1c8a, 0x1c8a, 0x1c88, 0x2427, 0x2429,
    0x2426, 0x2ffc, 0x2fff, 0x2ffb, 0x31e4, 0x31e5, 0x31e3, 0x31ef, 0x31ef, 0x31e3, 0xa7cb,
    0xa7cc, 0xa7c9, 0xa7cd, 0xa7cd, 0xa7ca, 0xa7da, 0xa7da, 0xa7d8, 0xa7db, 0xa7db, 0xa7d9,
    0xa7dc, 0xa7dc, 0xa7d8, 0x105c0, 0x105f3, 0x10600, 0x10d40, 0x10d49, 0x10d39, 0x10d4a,
    0x10d4d, 0x10d23, 0x10d4e, 0x10d4e, 0x16b40, 0x10d4f, 0x10d4f, 0x10d23, 0x10d50, 0x10d65,
    0x10cb2, 0x10d69, 0x10d6d, 0x10d27, 0x10d6e, 0x10d6e, 0x10ead, 0x10d6f, 0x10d6f, 0x16b40,
    0x10d70, 0x10d85, 0x10cf2, 0x10d8e, 0x10d8f, 0x1d6c1, 0x10ec2, 0x10ec4, 0x1ee00, 0x10efc,
    0x10eff, 0x10f46, 0x1123f, 0x11240, 0x1122b, 0x11241, 0x11241, 0x1123e, 0x11380, 0x11389,
    0x11361, 0x1138b, 0x1138b, 0x11361, 0x1138e, 0x1138e, 0x11361, 0x11390, 0x113b5, 0x11361,
    0x113b7, 0x113b7, 0x11400, 0x113b8, 0x113ba, 0x11363, 0x113bb, 0x113c0, 0x11374, 0x113c2,
    0x113c2, 0x11363, 0x113c5, 0x113c5, 0x11363, 0x113c7, 0x113ca, 0x11363, 0x113cc, 0x113cd,
    0x11363, 0x113ce, 0x113ce, 0x11374, 0x113cf, 0x113cf, 0x11435, 0x113d0, 0x113d0, 0x11374,
    0x113d1, 0x113d1, 0x11400, 0x113d2, 0x113d2, 0x11374, 0x113d3, 0x113d3, 0x11400, 0x113d4,
    0x113d5, 0x1144b, 0x113d7, 0x113d8, 0x1144b, 0x113e1, 0x113e2, 0x11438, 0x116d0, 0x116e3,
    0x116c9, 0x11b00, 0x11b09, 0x11aa2, 0x11bc0, 0x11be0, 0x11c00, 0x11be1, 0x11be1, 0x11c41,
    0x11bf0, 0x11bf9, 0x11c50, 0x11f00, 0x11f01, 0x11ef4, 0x11f02, 0x11f02, 0x11ef2, 0x11f03,
    0x11f03, 0x11ef6, 0x11f04, 0x11f10, 0x11ef2, 0x11f12, 0x11f33, 0x11ef2, 0x11f34, 0x11f35,
    0x11ef6, 0x11f36, 0x11f3a, 0x11ef4, 0x11f3e, 0x11f3f, 0x11ef6, 0x11f40, 0x11f40, 0x11ef4,
    0x11f41, 0x11f41, 0x11ef6, 0x11f42, 0x11f42, 0x11ef4, 0x11f43, 0x11f4f, 0x11ef8, 0x11f50,
    0x11f59, 0x11da9, 0x11f5a, 0x11f5a, 0x11ef4, 0x1342f, 0x1342f, 0x1342e, 0x13439, 0x1343f,
    0x13438, 0x13440, 0x13440, 0x11ef4, 0x13441, 0x13446, 0x1342e, 0x13447, 0x13455, 0x11ef4,
    0x13460, 0x143fa, 0x1342e, 0x16100, 0x1611d, 0x16800, 0x1611e, 0x16129, 0x16af0, 0x1612a,
    0x1612c, 0x16f51, 0x1612d, 0x1612f, 0x16af0, 0x16130, 0x16139, 0x16a60, 0x16d40, 0x16d42,
    0x16b43, 0x16d43, 0x16d6a, 0x16b8f, 0x16d6b, 0x16d6c, 0x16b43, 0x16d6d, 0x16d6f, 0x16e97,
    0x16d70, 0x16d79, 0x16b59, 0x18cff, 0x18cff, 0x18d00, 0x1b132, 0x1b132, 0x1b11f, 0x1b155,
    0x1b155, 0x1b164, 0x1cc00, 0x1ccef, 0x1cf50, 0x1ccf0, 0x1ccf9, 0x1d7ce, 0x1cd00, 0x1ceb3,
    0x1cf50, 0x1d2c0, 0x1d2d3, 0x1d2e0, 0x1df25, 0x1df2a, 0x1df1e, 0x1e030, 0x1e06d, 0x1e137,
    0x1e08f, 0x1e08f, 0x1e02a, 0x1e4d0, 0x1e4ea, 0x1e2eb, 0x1e4eb, 0x1e4eb, 0x1e13d, 0x1e4ec,
    0x1e4ef, 0x1e2ef, 0x1e4f0, 0x1e4f9, 0x1e2f9, 0x1e5d0, 0x1e5ed, 0x1e7e0, 0x1e5ee, 0x1e5ef,
    0x1e8d0, 0x1e5f0, 0x1e5f0, 0x1e7e0, 0x1e5f1, 0x1e5fa, 0x1e2f9, 0x1e5ff, 0x1e5ff, 0x1e95e,
    0x1f6dc, 0x1f6dc, 0x1f6dd, 0x1f774, 0x1f776, 0x1f773, 0x1f77b, 0x1f77f, 0x1f780, 0x1f7d9,
    0x1f7d9, 0x1f7d8, 0x1f8b2, 0x1f8bb, 0x1f8b1, 0x1f8c0, 0x1f8c1, 0x1f8b1, 0x1fa75, 0x1fa77,
    0x1fa74, 0x1fa87, 0x1fa89, 0x1fa86, 0x1fa8f, 0x1fa8f, 0x1fa90, 0x1faad, 0x1faaf, 0x1faac,
    0x1fabb, 0x1fabf, 0x1faba, 0x1fac6, 0x1fac6, 0x1fac5, 0x1face, 0x1facf, 0x1fad0, 0x1fada,
    0x1fadc, 0x1fad9, 0x1fadf, 0x1fadf, 0x1fae0, 0x1fae8, 0x1fae9, 0x1fae7, 0x1faf7, 0x1faf8,
    0x1faf6, 0x1fbcb, 0x1fbef, 0x1fbca, 0x2b739, 0x2b739, 0x2b738, 0x2ebf0, 0x2ee5d, 0x2ebe0,
    0x31350, 0x323af, 0x3134a};

// First, last: code points whose combining class or composition the library's normalizer does not know (it lets them
// stand as starters), and U+11A7, which utf8proc 2.8 drops after a Hangul syllable.
constexpr uint32_t kInert[] = {
    0x7fd, 0x7fd, 0x898, 0x89f, 0x8ca, 0x8d3, 0x9fe, 0x9fe, 0xc3c, 0xc3c, 0xd3b, 0xd3c, 0xeba,
    0xeba, 0x11a7, 0x11a7, 0x1715, 0x1715, 0x1abf, 0x1ace, 0x1df6, 0x1dfa, 0xa82c, 0xa82c,
    0x10d24, 0x10d27, 0x10eab, 0x10eac, 0x10efd, 0x10eff, 0x10f46, 0x10f50, 0x10f82, 0x10f85,
    0x11070, 0x11070, 0x1133b, 0x1133b, 0x1145e, 0x1145e, 0x11839, 0x1183a, 0x11930, 0x11930,
    0x11938, 0x11938, 0x1193d, 0x1193e, 0x11943, 0x11943, 0x119e0, 0x119e0, 0x11a34, 0x11a34,
    0x11a47, 0x11a47, 0x11a99, 0x11a99, 0x11d42, 0x11d42, 0x11d44, 0x11d45, 0x11d97, 0x11d97,
    0x11f41, 0x11f42, 0x16ff0, 0x16ff1, 0x1e08f, 0x1e08f, 0x1e130, 0x1e136, 0x1e2ae, 0x1e2ae,
    0x1e2ec, 0x1e2ef, 0x1e4ec, 0x1e4ef};

enum : uint8_t { kMayChange = 1, kStandsAlone = 2, kIsNewer = 4 };

std::string nfc(std::string_view text) {
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t n = utf8proc_map(
      reinterpret_cast<const utf8proc_uint8_t*>(text.data()), utf8proc_ssize_t(text.size()),
      &mapped, utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (n < 0) fail("utf8proc: {}", utf8proc_errmsg(n));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, &std::free);
  return std::string(reinterpret_cast<const char*>(mapped), size_t(n));
}

// First position from i on where the next 8 bytes are not all ASCII (or not 8).
size_t skip_ascii(std::string_view text, size_t i) {
  for (uint64_t word; i + 8 <= text.size(); i += 8) {
    std::memcpy(&word, text.data() + i, 8);
    if (word & 0x8080808080808080u) break;
  }
  return i;
}

// Flags of every code point. kMayChange: a mark, a conjoining jamo, or a character with a canonical form other than
// itself: normalization has to look at it and at the character before. Everything else is left alone by NFC.
struct Flags {
  std::vector<uint8_t> of = std::vector<uint8_t>(0x110000);
  Flags() {
    for (uint32_t c = 0xc0; c < of.size(); ++c) {
      const utf8proc_property_t* p = utf8proc_get_property(utf8proc_int32_t(c));
      const bool mark = p->category == UTF8PROC_CATEGORY_MN || p->category == UTF8PROC_CATEGORY_MC ||
                        p->category == UTF8PROC_CATEGORY_ME || p->combining_class != 0;
      const bool decomposes = p->decomp_seqindex != UINT16_MAX && p->decomp_type == 0;
      const bool jamo = c >= 0x1160 && c < 0x1200;
      if (mark || jamo || (decomposes && !is_own_nfc(c))) of[c] = kMayChange;
    }
    for (size_t i = 0; i < std::size(kInert); i += 2)
      for (uint32_t c = kInert[i]; c <= kInert[i + 1]; ++c) of[c] = kStandsAlone;
    for (size_t i = 0; i < std::size(kNewer); i += 3)
      for (uint32_t c = kNewer[i]; c <= kNewer[i + 1]; ++c) of[c] = kStandsAlone | kIsNewer;
  }
  static bool is_own_nfc(uint32_t c) {
    std::string text;
    append_utf8(c, text);
    return nfc(text) == text;
  }
};

const Flags& flags() {
  static const Flags table;
  return table;
}

uint32_t older(uint32_t c) {
  for (size_t i = 0; i < std::size(kNewer); i += 3)
    if (c >= kNewer[i] && c <= kNewer[i + 1]) return kNewer[i + 2];
  return c;
}

// Bytes of the well-formed sequence at p, or minus the length of the ill-formed maximal subpart there
// (Unicode 16, table 3-7).
int sequence(const unsigned char* p, size_t n) {
  const unsigned char lead = p[0];
  if (lead < 0x80) return 1;
  if (lead < 0xc2 || lead > 0xf4) return -1;
  const int need = int(utf8_length(lead));
  const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (n < 2 || p[1] < low || p[1] > high) return -1;
  for (int i = 2; i < need; ++i)
    if (size_t(i) >= n || (p[i] & 0xc0) != 0x80) return -i;
  return need;
}

}  // namespace

uint32_t code_point(const char* text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text);
  switch (utf8_length(p[0])) {
    case 1: return p[0];
    case 2: return (p[0] & 0x1fu) << 6 | (p[1] & 0x3fu);
    case 3: return (p[0] & 0xfu) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
    default: return (p[0] & 7u) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu);
  }
}

void append_utf8(uint32_t c, std::string& out) {
  if (c < 0x80) {
    out += char(c);
    return;
  }
  const int tail = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  out += char((0xff00 >> (tail + 1) & 0xff) | c >> (6 * tail));
  for (int i = tail - 1; i >= 0; --i) out += char(0x80 | (c >> (6 * i) & 0x3f));
}

std::string_view repair_utf8(std::string_view text, std::string& storage) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const size_t n = text.size();
  size_t copied = 0;
  bool changed = false;
  for (size_t i = skip_ascii(text, 0); i < n; i = skip_ascii(text, i)) {
    const int length = sequence(p + i, n - i);
    if (length > 0) {
      i += size_t(length);
      continue;
    }
    if (!changed) storage.clear();
    changed = true;
    storage.append(text, copied, i - copied).append("\xef\xbf\xbd");
    i += size_t(-length);
    copied = i;
  }
  return changed ? std::string_view(storage.append(text, copied)) : text;
}

std::string_view normalize_nfc(std::string_view text, std::string& storage) {
  const std::vector<uint8_t>& of = flags().of;
  size_t start = 0;   // where a stretch to normalize would have to begin: the last character that could take a mark
  size_t copied = 0;  // up to here is in storage
  bool changed = false;
  for (size_t i = 0; i < text.size();) {
    if (const size_t next = skip_ascii(text, i); next != i) {
      i = next;
      start = i - 1;
      continue;
    }
    const unsigned char lead = static_cast<unsigned char>(text[i]);
    const uint8_t f = lead < 0x80 ? 0 : of[code_point(text.data() + i)];
    if (!(f & kMayChange)) {
      const size_t next = i + utf8_length(lead);
      start = f & kStandsAlone ? next : i;
      i = next;
      continue;
    }
    while (i < text.size() && (text[i] & 0x80) && (of[code_point(text.data() + i)] & kMayChange))
      i += utf8_length(static_cast<unsigned char>(text[i]));
    if (!changed) storage.clear();
    changed = true;
    storage.append(text, copied, start - copied);
    storage.append(nfc(text.substr(start, i - start)));
    copied = start = i;
  }
  return changed ? std::string_view(storage.append(text, copied)) : text;
}

std::string_view stand_in(std::string_view text, std::string& storage) {
  const std::vector<uint8_t>& of = flags().of;
  bool changed = false;
  for (size_t i = skip_ascii(text, 0); i < text.size(); i = skip_ascii(text, i)) {
    const size_t length = utf8_length(static_cast<unsigned char>(text[i]));
    if (length >= 3 && (of[code_point(text.data() + i)] & kIsNewer)) {
      if (!changed) storage = text;
      changed = true;
      std::string replacement;
      append_utf8(older(code_point(text.data() + i)), replacement);
      storage.replace(i, length, replacement);
    }
    i += length;
  }
  return changed ? std::string_view(storage) : text;
}

bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_word(uint32_t c) {
  const utf8proc_category_t category = utf8proc_category(utf8proc_int32_t(older(c)));
  const bool circled = (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
                       (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);  // Other_Alphabetic
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL) ||
         category == UTF8PROC_CATEGORY_PC || circled || c == 0x200c || c == 0x200d;
}

}  // namespace pith
