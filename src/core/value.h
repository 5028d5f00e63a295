#pragma once
// One small tree for JSON and TOML. The parsers (nlohmann-json, toml++) are each in one translation
// unit, value.cpp and value_toml.cpp; everybody else sees only this type.

#include <variant>

#include "core/error.h"

namespace pith {

class Value {
 public:
  enum class Kind { null, boolean, integer, real, string, array, object };
  using Member = std::pair<std::string, Value>;
  using Content = std::variant<std::nullptr_t, bool, int64_t, double, std::string,
                               std::vector<Value>, std::vector<Member>>;  // in the order of Kind

  Value() = default;
  Value(bool v) : content_(v) {}
  Value(int v) : content_(int64_t(v)) {}
  Value(int64_t v) : content_(v) {}
  Value(double v) : content_(v) {}
  Value(const char* v) : content_(std::string(v)) {}
  Value(std::string v) : content_(std::move(v)) {}
  static Value array(std::vector<Value> v = {}) { return Value(Content(std::move(v))); }
  static Value object(std::vector<Member> v = {}) { return Value(Content(std::move(v))); }

  const Content& content() const { return content_; }
  Kind kind() const { return Kind(content_.index()); }
  bool is(Kind k) const { return kind() == k; }
  bool is_null() const { return is(Kind::null); }

  // Checked access. A wrong kind throws InputError: "<where>: expected a string, got integer 3",
  // where `where` is the file (with the line for TOML) and the dotted path of this value
  // ("run.toml:12: train.steps").
  bool as_bool() const { return get<bool>("a boolean"); }
  int64_t as_int() const;  // an integer, or a real without a fraction
  double as_real() const;  // an integer or a real
  const std::string& as_string() const { return get<std::string>("a string"); }
  const std::vector<Value>& items() const { return get<std::vector<Value>>("an array"); }
  // In the order of the file.
  const std::vector<Member>& members() const { return get<std::vector<Member>>("an object"); }

  // Object member: nullptr, or InputError naming the missing key, where there is none.
  const Value* find(std::string_view key) const;
  const Value& at(std::string_view key) const;
  // Building; a null value becomes the object or array it is used as.
  Value& operator[](const std::string& key);  // object: inserts null
  Value& add(std::string key, Value v);       // object: `key` must be new
  Value& push_back(Value v);                  // array

  const std::string& where() const { return where_; }
  void set_where(std::string where) { where_ = std::move(where); }
  // InputError "<where>: expected ..., got ..."
  [[noreturn]] void reject(const std::string& expected) const;

  // Compact JSON on one line (indent < 0) or pretty-printed. Reals print with the digits that
  // round-trip; a non-finite real prints as null. Invalid UTF-8 in a string is replaced by U+FFFD,
  // never an exception.
  std::string json(int indent = -1) const;

 private:
  explicit Value(Content content) : content_(std::move(content)) {}
  template <class T> const T& get(const char* expected) const {
    if (const T* v = std::get_if<T>(&content_)) return *v;
    reject(expected);
  }
  template <class T> T& become(const char* expected) {
    if (is_null()) content_ = T();
    return const_cast<T&>(get<T>(expected));
  }

  Content content_;
  std::string where_;
};

// `name` is what messages call the text (a file name). Malformed text, duplicate keys, invalid
// UTF-8 and nesting deeper than 100 throw InputError with line and column. JSON: integers beyond
// int64 become reals.
Value parse_json(std::string_view text, const std::string& name);
Value parse_toml(std::string_view text, const std::string& name);

// `text` for a one-line message: escaped as in JSON, without the quotes, and cut after `limit`
// bytes with "...".
std::string printable(std::string_view text, size_t limit = 80);

}  // namespace pith
