#pragma once
// One small tree for JSON and TOML. The parsers (nlohmann-json, toml++) are each in one translation unit,
// value_json.cpp and value_toml.cpp; everybody else sees only this type.

#include <cstdint>
#include <string>
#include <string_view>
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
  static Value array(std::vector<Value> items = {});
  static Value object(std::vector<Member> members = {});

  Kind kind() const { return kind_; }
  bool is(Kind k) const { return kind_ == k; }
  bool is_null() const { return kind_ == Kind::null; }

  // Checked access. A wrong kind throws InputError: "<where>: expected a string, got integer 3", where `where` is
  // the file (with the line for TOML) and the dotted path of this value ("run.toml:12: train.steps").
  bool as_bool() const;
  int64_t as_int() const;      // an integer, or a real without a fraction
  double as_real() const;      // an integer or a real
  const std::string& as_string() const;
  const std::vector<Value>& items() const;      // array
  const std::vector<Member>& members() const;   // object, in file order

  const Value* find(std::string_view key) const;      // object member or nullptr
  const Value& at(std::string_view key) const;        // object member or InputError naming the missing key
  Value& operator[](const std::string& key);          // object: inserts null; a null value becomes an object
  void push_back(Value v);                            // array; a null value becomes an array

  const std::string& where() const { return where_; }
  void set_where(std::string where) { where_ = std::move(where); }
  [[noreturn]] void reject(const std::string& expected) const;  // InputError "<where>: expected ..., got ..."

  // Compact JSON on one line (indent < 0) or pretty-printed. Reals print with the digits that round-trip; a
  // non-finite real prints as null. Invalid UTF-8 in a string is replaced by U+FFFD, never an exception.
  std::string json(int indent = -1) const;

 private:
  Kind kind_ = Kind::null;
  int64_t integer_ = 0;
  double real_ = 0;
  std::string string_, where_;
  std::vector<Value> items_;
  std::vector<Member> members_;
};

// `name` is what messages call the text (a file name). Malformed text, duplicate keys, invalid UTF-8 and nesting
// deeper than 100 throw InputError with line and column. JSON: integers beyond int64 become reals.
Value parse_json(std::string_view text, const std::string& name);
Value parse_toml(std::string_view text, const std::string& name);

// `text` for a one-line message: escaped as in JSON, without the quotes, and cut after `limit` bytes with "...".
std::string printable(std::string_view text, size_t limit = 80);

}  // namespace pith
