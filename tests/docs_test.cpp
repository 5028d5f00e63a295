// AGENTS.md is checked: every `file:function` of its table exists.

#include <gtest/gtest.h>

#include <algorithm>
#include <regex>

#include "core/file.h"

namespace pith {
namespace {

TEST(Agents, EveryPlaceInTheTableExists) {
  const std::string root = PITH_SOURCE_DIR, text = read_file(root + "/AGENTS.md");
  const std::regex place("`((?:src|tests)/[a-z0-9_/]+\\.(?:h|cpp)):([a-z0-9_]+)`");
  int places = 0;
  for (std::sregex_iterator it(text.begin(), text.end(), place), end; it != end; ++it, ++places) {
    const std::string file = read_file(root + "/" + (*it)[1].str());
    const std::regex name("\\b" + (*it)[2].str() + "\\b");
    EXPECT_TRUE(std::regex_search(file, name)) << (*it)[0];
  }
  EXPECT_GT(places, 30);
}

TEST(Agents, IsShort) {
  const std::string text = read_file(std::string(PITH_SOURCE_DIR) + "/AGENTS.md");
  EXPECT_LE(std::count(text.begin(), text.end(), '\n'), 150);
}

}  // namespace
}  // namespace pith
