#pragma once
// One small tree for JSON and TOML. The parsers (nlohmann-json, toml++) are each in one translation
// unit, value_json.cpp and value_toml.cpp; everybody else sees only this type.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pith {

class Value {
 public:
  enum class Kind { null, boolean, integer, real, string, array, object };
  using Member = std::pair<std::string, Value>;

  Value() = default;
  Value(bool v) : kind_(Kind::boolean), integer_(v) {}
  Value(int v) : Value(int64_t(v)) {}
  Value(int64_t v) : kind_(Kind::integer), integer_(v) {}
  Value(double v) : kind_(Kind::real), real_(v) {}
  Value(const char* v) : Value(std::string(v)) {}
  Value(std::string v) : kind_(Kind::string), string_(std::move(v)) {}
  static Value array(std::vector<Value> items = {}) { return {Kind::array, std::move(items), {}}; }
  static Value object(std::vector<Member> members = {}) {
    return {Kind::object, {}, std::move(members)};
  }

  Kind kind() const { return kind_; }
  bool is(Kind k) const { return kind_ == k; }
  bool is_null() const { return is(Kind::null); }

  // Checked access. A wrong kind throws InputError: "<where>: expected a string, got integer 3",
  // where `where` is the file (with the line for TOML) and the dotted path of this value
  // ("run.toml:12: train.steps").
  bool as_bool() const { return check(Kind::boolean, integer_, "a boolean") != 0; }
  int64_t as_int() const;  // an integer, or a real without a fraction
  double as_real() const;  // an integer or a real
  const std::string& as_string() const { return check(Kind::string, string_, "a string"); }
  const std::vector<Value>& items() const { return check(Kind::array, items_, "an array"); }
  // In the order of the file.
  const std::vector<Member>& members() const { return check(Kind::object, members_, "an object"); }

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
  Value(Kind kind, std::vector<Value> items, std::vector<Member> members)
      : kind_(kind), items_(std::move(items)), members_(std::move(members)) {}
  template <class T> const T& check(Kind kind, const T& content, const char* expected) const {
    if (!is(kind)) reject(expected);
    return content;
  }

  Kind kind_ = Kind::null;
  int64_t integer_ = 0;
  double real_ = 0;
  std::string string_, where_;
  std::vector<Value> items_;
  std::vector<Member> members_;
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
