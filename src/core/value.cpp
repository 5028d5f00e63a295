#include "core/value.h"

namespace pith {
namespace {

std::string prefix(const Value& v) { return v.where().empty() ? "" : v.where() + ": "; }

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  const std::string quoted = Value(std::string(text.substr(0, limit))).json();
  return quoted.substr(1, quoted.size() - 2) + (text.size() > limit ? "..." : "");
}

void Value::reject(const std::string& expected) const {
  constexpr const char* kNames[] = {"null",   "boolean",  "integer",  "real",
                                    "string", "an array", "an object"};
  std::string got = kNames[int(kind())];
  if (is(Kind::string))
    got += " \"" + printable(as_string()) + '"';
  else if (!is_null() && kind() < Kind::string)
    got += ' ' + json();
  fail_input("{}expected {}, got {}", prefix(*this), expected, got);
}

int64_t Value::as_int() const {
  const double* v = std::get_if<double>(&content_);
  const bool whole = v && *v >= -0x1p63 && *v < 0x1p63 && std::trunc(*v) == *v;
  return whole ? int64_t(*v) : get<int64_t>("an integer");
}

double Value::as_real() const {
  return is(Kind::integer) ? double(as_int()) : get<double>("a number");
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
  for (auto& [name, value] : become<std::vector<Member>>("an object"))
    if (name == key) return value;
  return add(key, {});
}

Value& Value::push_back(Value v) {
  return become<std::vector<Value>>("an array").emplace_back(std::move(v));
}

Value& Value::add(std::string key, Value v) {
  auto& members = become<std::vector<Member>>("an object");
  return members.emplace_back(std::move(key), std::move(v)).second;
}

}  // namespace pith
