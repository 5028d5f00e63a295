#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>
#include <unordered_set>

#include "core/error.h"
#include "core/value.h"

namespace pith {
namespace {

using Json = nlohmann::ordered_json;
constexpr size_t kMaxDepth = 100;

// Builds the tree from the parser's events; what it refuses, it throws, with the place the parser
// has reached.
struct Builder {
  struct Level {
    Value* value;  // stays in place: what holds it does not grow before it is closed
    std::unordered_set<std::string> keys;
  };
  std::string_view text;
  const std::string& name;
  std::istringstream input{std::string(text)};
  Value root = {};
  std::vector<Level> levels = {};  // the arrays and objects that are open
  std::string next_key = {};

  bool null() { return put(Value()); }
  bool boolean(bool v) { return put(v); }
  bool number_integer(int64_t v) { return put(v); }
  bool number_unsigned(uint64_t v) {
    return put(v <= uint64_t(INT64_MAX) ? Value(int64_t(v)) : Value(double(v)));
  }
  bool number_float(double v, const std::string&) { return put(v); }
  bool string(std::string& v) { return put(std::move(v)); }
  bool binary(Json::binary_t&) { return false; }
  bool start_object(size_t) { return open(Value::object()); }
  bool start_array(size_t) { return open(Value::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }

  bool key(std::string& v) {
    const bool is_new = levels.back().keys.insert(v).second;
    if (!is_new) refuse(fmt::format("duplicate key \"{}\"", printable(v)));
    next_key = std::move(v);
    return true;
  }

  bool parse_error(size_t, const std::string&, const Json::exception& e) {
    // "[json.exception.X] parse error at line 3, column 17: syntax error while parsing value -
    // unexpected '}'; last read: ..."
    std::string_view what = e.what();
    what.remove_prefix(std::max(what.find("] ") + 2, what.find(" - ") + 3));  // npos + 3 is 2
    refuse(printable(what.substr(0, what.find("; last read")), 160));
  }

  [[noreturn]] void refuse(const std::string& why) {
    const auto at = input.tellg();  // -1 at the end
    const std::string_view read = text.substr(0, at < 0 ? text.size() : size_t(at));
    const size_t column = read.size() - (read.find_last_of('\n') + 1);  // npos + 1 is 0
    fail_input("{}:{}:{}: {}", name, std::count(read.begin(), read.end(), '\n') + 1,
               std::max<size_t>(column, 1), why);
  }

  // Puts `v` where it belongs and says where it came from: "file: a.b[3]".
  Value* place(Value v) {
    if (levels.empty()) {
      root = std::move(v);
      root.set_where(name);
      return &root;
    }
    Value& parent = *levels.back().value;
    const bool top = levels.size() == 1, list = parent.is(Value::Kind::array);
    const std::string step =
        list ? fmt::format("[{}]", parent.items().size()) : printable(next_key);
    v.set_where(parent.where() + (top ? ": " : list ? "" : ".") + step);
    return list ? &parent.push_back(std::move(v)) : &parent.add(std::move(next_key), std::move(v));
  }

  bool put(Value v) { return place(std::move(v)) != nullptr; }
  bool open(Value v) {
    if (levels.size() == kMaxDepth) refuse(fmt::format("nested deeper than {}", kMaxDepth));
    levels.push_back({place(std::move(v)), {}});
    return true;
  }
  bool close() {
    levels.pop_back();
    return true;
  }
};

Json tree_of(const Value& v) {
  Json tree;
  switch (v.kind()) {
    case Value::Kind::null: break;
    case Value::Kind::boolean: tree = v.as_bool(); break;
    case Value::Kind::integer: tree = v.as_int(); break;
    case Value::Kind::real: tree = v.as_real(); break;
    case Value::Kind::string: tree = v.as_string(); break;
    case Value::Kind::array:
      tree = Json::array();
      for (const Value& item : v.items()) tree.push_back(tree_of(item));
      break;
    case Value::Kind::object:
      Json::object_t members;  // as a vector: its own emplace compares with every key before
      for (const auto& [key, item] : v.members()) members.emplace_back(key, tree_of(item));
      tree = std::move(members);
  }
  return tree;
}

}  // namespace

Value parse_json(std::string_view text, const std::string& name) {
  Builder builder{text, name};
  Json::sax_parse(builder.input, &builder);
  return std::move(builder.root);
}

std::string Value::json(int indent) const {
  return tree_of(*this).dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace pith
