#include "core/value.h"

#include <cmath>

#include "core/error.h"

namespace pith {
namespace {

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
  const std::string quoted = Value(std::string(text.substr(0, limit))).json();
  return quoted.substr(1, quoted.size() - 2) + (text.size() > limit ? "..." : "");
}

void Value::reject(const std::string& expected) const {
  fail_input("{}expected {}, got {}", prefix(*this), expected, describe(*this));
}

int64_t Value::as_int() const {
  const bool fits = is(Kind::real) && real_ >= -0x1p63 && real_ < 0x1p63;
  if (fits && std::trunc(real_) == real_) return int64_t(real_);
  return check(Kind::integer, integer_, "an integer");
}

double Value::as_real() const {
  return is(Kind::integer) ? double(integer_) : check(Kind::real, real_, "a number");
}

const Value* Value::find(std::string_view key) const {
  for (const auto& [name, value] : members())
    if (name == key) return &value;
  return nullptr;
}

const Value& Value::at(std::string_view key) const {
  const Value* v = find(key);
  if (v == nullptr) fail_input("{}missing key \"{}\"", prefix(*this), printable(key));
  return *v;
}

Value& Value::operator[](const std::string& key) {
  const Value* v = is_null() ? nullptr : find(key);
  return v ? const_cast<Value&>(*v) : add(key, Value());
}

Value& Value::push_back(Value v) {
  if (is_null()) kind_ = Kind::array;
  if (!is(Kind::array)) reject("an array");
  return items_.emplace_back(std::move(v));
}

Value& Value::add(std::string key, Value v) {
  if (is_null()) kind_ = Kind::object;
  if (!is(Kind::object)) reject("an object");
  return members_.emplace_back(std::move(key), std::move(v)).second;
}

}  // namespace pith
