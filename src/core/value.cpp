#include "core/value.h"

#include <nlohmann/json.hpp>
#include <sstream>
#include <unordered_set>

namespace pith {

static std::string prefix(const Value& v) { return v.where().empty() ? "" : v.where() + ": "; }

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

namespace {

using Json = nlohmann::ordered_json;
constexpr size_t kMaxDepth = 100;

// Builds the tree from the parser's events, since a tree of nlohmann-json would compare every key
// with all before it. What it refuses, it throws, with the place the parser has reached.
struct Builder {
  struct Level {
    Value* value;  // stays in place: what holds it does not grow before it is closed
    std::unordered_set<std::string> keys;
  };
  std::string_view text;
  const std::string& name;
  std::istringstream input{std::string(text)};
  Value root = {};
  Value* next = &root;             // of an object: the member whose key was read
  std::vector<Level> levels = {};  // the arrays and objects that are open

  bool null() { return put({}); }
  bool boolean(bool v) { return put(v); }
  bool number_integer(int64_t v) { return put(v); }
  bool number_unsigned(uint64_t v) {
    return put(v <= uint64_t(INT64_MAX) ? Value(int64_t(v)) : Value(double(v)));
  }
  bool number_float(double v, const std::string&) { return put(v); }
  bool string(std::string& v) { return put(std::move(v)); }
  bool binary(Json::binary_t&) { return false; }
  bool start_object(size_t) { return put(Value::object(), true); }
  bool start_array(size_t) { return put(Value::array(), true); }
  bool end_object() { return end_array(); }
  bool end_array() {
    levels.pop_back();
    return true;
  }

  bool key(std::string& v) {
    Level& in = levels.back();
    if (!in.keys.insert(v).second) refuse(fmt::format("duplicate key \"{}\"", printable(v)));
    next = &in.value->add(v, {});
    next->set_where(in.value->where() + (levels.size() == 1 ? ": " : ".") + printable(v));
    return true;
  }

  // The next value; `opens` says that more come inside it.
  bool put(Value v, bool opens = false) {
    if (opens && levels.size() == kMaxDepth)
      refuse(fmt::format("nested deeper than {}", kMaxDepth));
    if (!levels.empty() && levels.back().value->is(Value::Kind::array)) {
      Value& list = *levels.back().value;
      const size_t index = list.items().size();
      next = &list.push_back({});
      next->set_where(fmt::format("{}{}[{}]", list.where(), levels.size() == 1 ? ": " : "", index));
    }
    v.set_where(next->where());
    *next = std::move(v);
    if (opens) levels.push_back({next, {}});
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
    const std::string_view read = text.substr(0, at < 0 ? text.npos : size_t(at));
    const size_t column = read.size() - (read.rfind('\n') + 1);  // npos + 1 is 0
    fail_input("{}:{}:{}: {}", name, std::ranges::count(read, '\n') + 1,
               std::max<size_t>(column, 1), why);
  }
};

}  // namespace

// Found by nlohmann-json, which applies it to the items of arrays too.
static void to_json(Json& tree, const Value& v) {
  std::visit(
      [&](const auto& content) {
        if constexpr (std::is_same_v<decltype(content), const std::vector<Value::Member>&>)
          tree = Json::object_t(content.begin(), content.end());
        else
          tree = content;
      },
      v.content());
}

Value parse_json(std::string_view text, const std::string& name) {
  Builder builder{text, name};
  builder.root.set_where(name);
  Json::sax_parse(builder.input, &builder);
  return std::move(builder.root);
}

std::string Value::json(int indent) const {
  return Json(*this).dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace pith
