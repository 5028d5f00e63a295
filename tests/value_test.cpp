#include "core/value.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "core/error.h"
#include "testing.h"

namespace pith {
namespace {

TEST(Value, JsonKeepsOrderKindsAndPlaces) {
  const Value v =
      parse_json(R"({"z": 1, "a": [true, null, {"b": -2.5}], "s": "é\u0041\n"})", "c.json");
  ASSERT_EQ(v.members().size(), 3u);
  EXPECT_EQ(v.members()[0].first, "z");
  EXPECT_EQ(v.members()[1].first, "a");
  EXPECT_EQ(v.where(), "c.json");
  EXPECT_EQ(v.at("z").as_int(), 1);
  EXPECT_EQ(v.at("z").as_real(), 1.0);
  EXPECT_TRUE(v.at("a").items()[0].as_bool());
  EXPECT_TRUE(v.at("a").items()[1].is_null());
  const Value& b = v.at("a").items()[2].at("b");
  EXPECT_EQ(b.where(), "c.json: a[2].b");
  EXPECT_EQ(b.as_real(), -2.5);
  EXPECT_EQ(v.at("s").as_string(),
            "\xc3\xa9"
            "A\n");
}

TEST(Value, JsonNumbers) {
  const Value v = parse_json(
      "[9223372036854775807, -9223372036854775808, 9223372036854775808, 18446744073709551616, 4.0, "
      "1e300, 0.1]",
      "n");
  EXPECT_EQ(v.items()[0].as_int(), INT64_MAX);
  EXPECT_EQ(v.items()[1].as_int(), INT64_MIN);
  EXPECT_EQ(v.items()[2].kind(), Value::Kind::real);
  EXPECT_EQ(v.items()[2].as_real(), 0x1p63);
  EXPECT_EQ(v.items()[3].as_real(), 0x1p64);
  EXPECT_EQ(v.items()[4].as_int(), 4);
  for (const size_t i : {2, 5, 6}) EXPECT_THROW((void)v.items()[i].as_int(), InputError) << i;
}

TEST(Value, WrongKindsAndMissingKeysNameThePlace) {
  const Value v = parse_json(R"({"a": {"b": 3, "s": "x"}})", "c.json");
  EXPECT_EQ(error_of([&] { (void)v.at("a").at("b").as_string(); }),
            "c.json: a.b: expected a string, got integer 3");
  EXPECT_EQ(error_of([&] { (void)v.at("a").at("s").as_bool(); }),
            "c.json: a.s: expected a boolean, got string \"x\"");
  EXPECT_EQ(error_of([&] { (void)v.at("a").items(); }),
            "c.json: a: expected an array, got an object");
  EXPECT_EQ(error_of([&] { (void)v.at("a").at("c"); }), "c.json: a: missing key \"c\"");
  EXPECT_EQ(error_of([&] { (void)Value(2.5).as_int(); }), "expected an integer, got real 2.5");
}

TEST(Value, MalformedJsonIsOneLineWithThePlace) {
  const std::string deep(101, '[');
  const struct {
    std::string text, place, why;
  } cases[] = {
      {"", "c.json:1:1: ", "end of input"},
      {"{\"a\": 1,\n  }", "c.json:2:3: ", "unexpected '}'"},
      {"{\"a\": 1,\n \"a\": 2}", "c.json:2:4: ", "duplicate key \"a\""},
      {"{\"x\": {\"a\": 1, \"b\": 2, \"a\": 3}}", "c.json:1:26: ", "duplicate key \"a\""},
      {"[1] 2", "c.json:1:5: ", "expected end of input"},
      {"[tru]", "c.json:1:5: ", "invalid literal"},
      {"[01]", "c.json:1:", "unexpected number literal"},
      {"[\"a\nb\"]", "c.json:2:", "control character"},
      {"[\"\xff\"]", "c.json:1:3: ", "UTF-8"},
      {"[\"\xc0\xaf\"]", "c.json:1:3: ", "UTF-8"},
      {"[\"\xed\xa0\x80\"]", "c.json:1:", "UTF-8"},
      {"[\"\\ud800\"]", "c.json:1:9: ", "surrogate"},
      {"[1e999]", "c.json:1:", "overflow"},
      {"[NaN]", "c.json:1:2: ", "invalid literal"},
      {deep, "c.json:1:101: ", "nested deeper than 100"},
      {"\"" + std::string(5000, 'x'), "c.json:1:5001: ", "missing closing quote"},
  };
  for (const auto& c : cases) {
    const std::string e = error_of([&] { parse_json(c.text, "c.json"); });
    EXPECT_EQ(e.substr(0, c.place.size()), c.place) << e;
    EXPECT_NE(e.find(c.why), e.npos) << e;
    EXPECT_EQ(e.find('\n'), e.npos) << e;
    EXPECT_LT(e.size(), 250u);
  }
  EXPECT_NO_THROW(parse_json(std::string(100, '[') + std::string(100, ']'), "c.json"));
}

TEST(Value, JsonOutRoundTrips) {
  const double reals[] = {0.1, 1.0, -0.0, 5e-324, 1.7976931348623157e308, 3e-4, 1e21, 1.0 / 3};
  Value v;
  for (const double x : reals) v["reals"].push_back(x);
  v["text"] = Value(std::string("\0\x1f\"\\/\n\t\r\x7f\xf0\x9f\x98\x80", 13));
  v["int"] = INT64_MIN;
  v["flag"] = true;
  v["empty"] = Value::object({{"list", Value::array()}, {"none", Value()}});
  for (const int indent : {-1, 0, 2}) {
    const std::string text = v.json(indent);
    const Value w = parse_json(text, "w");
    EXPECT_EQ(w.json(indent), text);
    for (size_t i = 0; i < std::size(reals); ++i) {
      EXPECT_EQ(w.at("reals").items()[i].kind(), Value::Kind::real);
      EXPECT_EQ(w.at("reals").items()[i].as_real(), reals[i]);
      EXPECT_EQ(std::signbit(w.at("reals").items()[i].as_real()), std::signbit(reals[i]));
    }
    EXPECT_EQ(w.at("text").as_string(), v.at("text").as_string());
    EXPECT_EQ(w.at("int").as_int(), INT64_MIN);
  }
  EXPECT_EQ(v.at("empty").json(), R"({"list":[],"none":null})");
  EXPECT_EQ(v.at("empty").json(2), "{\n  \"list\": [],\n  \"none\": null\n}");
}

TEST(Value, JsonOutNeverFails) {
  EXPECT_EQ(Value("a\xff"
                  "b\xc3")
                .json(),
            "\"a\xef\xbf\xbd"
            "b\xef\xbf\xbd\"");
  EXPECT_EQ(Value("\xed\xa0\x80").json(), "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\"");
  EXPECT_EQ(Value(std::numeric_limits<double>::infinity()).json(), "null");
  EXPECT_EQ(Value(std::nan("")).json(), "null");
  EXPECT_EQ(printable("a\n\"" + std::string(100, 'x'), 5), "a\\n\\\"xx...");
}

TEST(Value, TomlKeepsOrderAndLines) {
  const Value v = parse_toml(
      "model = \"m\"\nb.c = 1_000\n[train]\nsteps = 5\nlr=3e-4 # rate\n"
      "train = [[\"a\", 0.7],\n  [\"b\", 1]]\n[[x]]\ny = {q = true, p = inf}\n[[x]]\n[a]\n",
      "run.toml");
  std::vector<std::string> keys;
  for (const auto& [key, value] : v.members()) keys.push_back(key);
  EXPECT_EQ(keys, (std::vector<std::string>{"model", "b", "train", "x", "a"}));
  EXPECT_EQ(v.where(), "run.toml");
  EXPECT_EQ(v.at("b").at("c").as_int(), 1000);
  EXPECT_EQ(v.at("train").at("steps").where(), "run.toml:4: train.steps");
  EXPECT_EQ(v.at("train").at("lr").as_real(), 3e-4);
  EXPECT_EQ(v.at("train").at("train").items()[1].items()[0].where(),
            "run.toml:7: train.train[1][0]");
  EXPECT_EQ(v.at("x").items().size(), 2u);
  const Value& y = v.at("x").items()[0].at("y");
  EXPECT_EQ(y.members()[0].first, "q");
  EXPECT_TRUE(std::isinf(y.at("p").as_real()));
  EXPECT_EQ(error_of([&] { (void)v.at("train").at("steps").as_string(); }),
            "run.toml:4: train.steps: expected a string, got integer 5");
}

TEST(Value, MalformedTomlIsOneLineWithThePlace) {
  std::string dots = "a";
  for (int i = 0; i < 120; ++i) dots += ".a";
  std::string many_dots;
  for (int i = 0; i < 20000; ++i) many_dots += "a.";
  const struct {
    std::string text, place, why;
  } cases[] = {
      {"a = 1\na = 2", "run.toml:2:", "redefine"},
      {"a = 1\n[b\n", "run.toml:2:", ""},
      {"a = ", "run.toml:1:", ""},
      {"[=]", "run.toml:1:2: ", "saw '='"},
      {"\xc3\xa9 = 1", "run.toml:1:1: ", ""},
      {"a \xd0\xba = 1", "run.toml:1:3: ", ""},
      {"a = \"x\ny\"", "run.toml:1:", ""},
      {"a = \"\xff\"", "run.toml:1:", "utf-8"},
      {"x = 1\nday = 1979-05-27", "run.toml:2: day: ", "dates"},
      {"a = 99999999999999999999", "run.toml:1:", ""},
      {dots + " = 1", "run.toml:1: ", "nested deeper than 100"},
      {many_dots + "a = 1", "run.toml: ", "dots"},
      {"a = " + std::string(5000, '['), "run.toml:1:", ""},
  };
  for (const auto& c : cases) {
    const std::string e = error_of([&] { parse_toml(c.text, "run.toml"); });
    EXPECT_EQ(e.substr(0, c.place.size()), c.place) << e;
    EXPECT_NE(e.find(c.why), e.npos) << e;
    EXPECT_EQ(e.find('\n'), e.npos) << e;
  }
}

TEST(Value, Building) {
  Value v;
  v["b"]["c"] = 1;
  v["a"].push_back("x");
  v["b"]["c"] = 2;
  EXPECT_EQ(v.json(), R"({"b":{"c":2},"a":["x"]})");
  EXPECT_EQ(v.find("z"), nullptr);
  EXPECT_THROW(v["b"].push_back(1), InputError);
  EXPECT_THROW(v["a"]["k"], InputError);
}

}  // namespace
}  // namespace pith
