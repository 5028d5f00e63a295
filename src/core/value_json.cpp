#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>
#include <unordered_set>

#include "core/error.h"
#include "core/value.h"

namespace pith {
namespace {

constexpr size_t kMaxDepth = 100;

// Builds the tree from the parser's events; what it refuses, it throws, with the place the parser
// has reached.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  Builder(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  Value parse() {
    nlohmann::json::sax_parse(input_, this);
    return std::move(root_);
  }

  bool null() override { return put(Value()); }
  bool boolean(bool v) override { return put(Value(v)); }
  bool number_integer(number_integer_t v) override { return put(Value(int64_t(v))); }
  bool number_unsigned(number_unsigned_t v) override {
    return put(v <= uint64_t(INT64_MAX) ? Value(int64_t(v)) : Value(double(v)));
  }
  bool number_float(number_float_t v, const string_t&) override { return put(Value(v)); }
  bool string(string_t& v) override { return put(Value(std::move(v))); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return open(false); }
  bool start_array(size_t) override { return open(true); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& v) override {
    Level& level = stack_.back();
    if (!level.keys.insert(v).second) refuse(fmt::format("duplicate key \"{}\"", printable(v)));
    level.key = std::move(v);
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& e) override {
    // "[json.exception.X] parse error at line 3, column 17: syntax error while parsing value -
    // unexpected '}'; last read: ..."
    std::string_view what = e.what();
    for (const std::string_view mark : {"] ", ", column ", ": ", " - "}) {
      const size_t i = what.find(mark);
      if (i != what.npos) what.remove_prefix(i + mark.size());
    }
    refuse(printable(what.substr(0, what.find("; last read")), 160));
  }

 private:
  struct Level {
    bool is_array;
    std::string where, path, key;
    std::unordered_set<std::string> keys;
    std::vector<Value> items;
    std::vector<Value::Member> members;
  };

  [[noreturn]] void refuse(const std::string& why) {
    const auto at = input_.tellg();  // -1 at the end
    const std::string_view read = text_.substr(0, at < 0 ? text_.size() : size_t(at));
    const size_t column = read.size() - (read.find_last_of('\n') + 1);  // npos + 1 is 0
    fail_input("{}:{}:{}: {}", name_, std::count(read.begin(), read.end(), '\n') + 1,
               std::max<size_t>(column, 1), why);
  }

  // Path of the value that comes next: "a.b[3]".
  std::string path() const {
    if (stack_.empty()) return {};
    const Level& level = stack_.back();
    if (level.is_array) return fmt::format("{}[{}]", level.path, level.items.size());
    return level.path + (level.path.empty() ? "" : ".") + printable(level.key);
  }
  std::string where() const { return stack_.empty() ? name_ : name_ + ": " + path(); }

  bool put(Value v) {
    v.set_where(where());
    return place(std::move(v));
  }

  bool place(Value v) {
    if (stack_.empty()) {
      root_ = std::move(v);
    } else if (Level& level = stack_.back(); level.is_array) {
      level.items.push_back(std::move(v));
    } else {
      level.members.emplace_back(std::move(level.key), std::move(v));
    }
    return true;
  }

  bool open(bool is_array) {
    if (stack_.size() == kMaxDepth) refuse(fmt::format("nested deeper than {}", kMaxDepth));
    stack_.push_back({is_array, where(), path(), {}, {}, {}, {}});
    return true;
  }

  bool close() {
    Level level = std::move(stack_.back());
    stack_.pop_back();
    Value v = level.is_array ? Value::array(std::move(level.items))
                             : Value::object(std::move(level.members));
    v.set_where(std::move(level.where));
    return place(std::move(v));
  }

  std::string_view text_;
  const std::string& name_;
  std::istringstream input_{std::string(text_)};
  Value root_;
  std::vector<Level> stack_;
};

}  // namespace

Value parse_json(std::string_view text, const std::string& name) {
  return Builder(text, name).parse();
}

}  // namespace pith
