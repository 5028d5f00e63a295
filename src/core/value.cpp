#include "core/value.h"

#include <utf8proc.h>

#include <charconv>
#include <cmath>

#include "core/error.h"

namespace pith {
namespace {

// Escaped as in JSON; what is not UTF-8 becomes U+FFFD.
std::string escaped(std::string_view text) {
  constexpr std::string_view kSpecial = "\"\\\n\t\r", kLetters = "\"\\ntr";
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t code = 0;
    const auto n = utf8proc_iterate(bytes + i, utf8proc_ssize_t(text.size() - i), &code);
    const size_t special = kSpecial.find(text[i]);
    if (n <= 0) {
      out += "\xef\xbf\xbd";
    } else if (special != kSpecial.npos) {
      out += {'\\', kLetters[special]};
    } else if (code < 0x20 || code == 0x7f) {
      out += fmt::format("\\u{:04x}", code);
    } else {
      out += text.substr(i, size_t(n));
    }
    i += n <= 0 ? 1 : size_t(n);
  }
  return out;
}

std::string real_json(double v) {
  if (!std::isfinite(v)) return "null";
  char buffer[32];
  const std::string text(buffer, std::to_chars(buffer, buffer + sizeof buffer, v).ptr);
  return text.find_first_of(".e") == text.npos ? text + ".0" : text;  // a real when read again
}

void append_json(std::string& out, const Value& v, int indent, int depth) {
  switch (v.kind()) {
    case Value::Kind::null: out += "null"; return;
    case Value::Kind::boolean: out += v.as_bool() ? "true" : "false"; return;
    case Value::Kind::integer: out += std::to_string(v.as_int()); return;
    case Value::Kind::real: out += real_json(v.as_real()); return;
    case Value::Kind::string: out += '"' + escaped(v.as_string()) + '"'; return;
    default: break;
  }
  const bool object = v.is(Value::Kind::object);
  const size_t count = object ? v.members().size() : v.items().size();
  const auto new_line = [&](int level) {
    if (indent >= 0 && count > 0) out.append(1, '\n').append(size_t(indent) * size_t(level), ' ');
  };
  out += object ? '{' : '[';
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) out += ',';
    new_line(depth + 1);
    if (object) out += '"' + escaped(v.members()[i].first) + (indent >= 0 ? "\": " : "\":");
    append_json(out, object ? v.members()[i].second : v.items()[i], indent, depth + 1);
  }
  new_line(depth);
  out += object ? '}' : ']';
}

// What messages say of a value: "integer 3", "string "adam"", "an array".
std::string describe(const Value& v) {
  constexpr const char* kNames[] = {"null",   "boolean",  "integer",  "real",
                                    "string", "an array", "an object"};
  const std::string name = kNames[int(v.kind())];
  if (v.is(Value::Kind::string)) return name + " \"" + printable(v.as_string()) + '"';
  const bool named_only = v.is_null() || v.kind() > Value::Kind::string;
  return named_only ? name : name + ' ' + v.json();
}

std::string prefix(const Value& v) { return v.where().empty() ? "" : v.where() + ": "; }

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  return escaped(text.substr(0, limit)) + (text.size() > limit ? "..." : "");
}

Value Value::array(std::vector<Value> items) {
  Value v;
  v.kind_ = Kind::array;
  v.items_ = std::move(items);
  return v;
}

Value Value::object(std::vector<Member> members) {
  Value v;
  v.kind_ = Kind::object;
  v.members_ = std::move(members);
  return v;
}

void Value::reject(const std::string& expected) const {
  fail_input("{}expected {}, got {}", prefix(*this), expected, describe(*this));
}

bool Value::as_bool() const {
  if (kind_ != Kind::boolean) reject("a boolean");
  return integer_ != 0;
}

int64_t Value::as_int() const {
  if (kind_ == Kind::integer) return integer_;
  const bool fits = kind_ == Kind::real && real_ >= -0x1p63 && real_ < 0x1p63;
  if (!fits || std::trunc(real_) != real_) reject("an integer");
  return int64_t(real_);
}

double Value::as_real() const {
  if (kind_ == Kind::integer) return double(integer_);
  if (kind_ != Kind::real) reject("a number");
  return real_;
}

const std::string& Value::as_string() const {
  if (kind_ != Kind::string) reject("a string");
  return string_;
}

const std::vector<Value>& Value::items() const {
  if (kind_ != Kind::array) reject("an array");
  return items_;
}

const std::vector<Value::Member>& Value::members() const {
  if (kind_ != Kind::object) reject("an object");
  return members_;
}

const Value* Value::find(std::string_view key) const {
  for (const auto& [name, value] : members()) {
    if (name == key) return &value;
  }
  return nullptr;
}

const Value& Value::at(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) fail_input("{}missing key \"{}\"", prefix(*this), printable(key));
  return *v;
}

Value& Value::operator[](const std::string& key) {
  if (kind_ == Kind::null) kind_ = Kind::object;
  if (const Value* v = find(key)) return const_cast<Value&>(*v);
  return members_.emplace_back(key, Value()).second;
}

void Value::push_back(Value v) {
  if (kind_ == Kind::null) kind_ = Kind::array;
  if (kind_ != Kind::array) reject("an array");
  items_.push_back(std::move(v));
}

std::string Value::json(int indent) const {
  std::string out;
  append_json(out, *this, indent, 0);
  return out;
}

}  // namespace pith
