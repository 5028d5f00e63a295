#include "core/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <functional>

#include "core/error.h"
#include "testing.h"

namespace pith {
namespace {

std::string text_of(const MappedFile& m) {
  return {reinterpret_cast<const char*>(m.bytes().data()), m.bytes().size()};
}

TEST(File, ReadsWhatIsWritten) {
  const TempDir dir;
  std::string bytes(100'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = char(i * 131);
  for (const size_t n : {size_t(0), size_t(1), bytes.size()}) {
    write_file_atomic(dir / "f", std::string_view(bytes).substr(0, n));
    EXPECT_EQ(read_file(dir / "f"), bytes.substr(0, n));
    EXPECT_FALSE(exists(dir / "f.tmp"));
    EXPECT_EQ(text_of(MappedFile(dir / "f")), bytes.substr(0, n));
  }
  EXPECT_NE(read_file("/proc/self/status").find("Pid:"), std::string::npos);  // fstat says 0 bytes
}

TEST(File, ErrorsNameThePath) {
  const TempDir dir;
  const std::string missing = dir / "missing", below = dir / "no/file";
  EXPECT_EQ(error_of([&] { read_file(missing); }), missing + ": No such file or directory");
  EXPECT_EQ(error_of([&] { read_file(dir.path); }), dir.path + ": Is a directory");
  EXPECT_EQ(error_of([&] { MappedFile m(missing); }), missing + ": No such file or directory");
  EXPECT_EQ(error_of([&] { MappedFile m(dir.path); }), dir.path + ": not a regular file");
  EXPECT_EQ(error_of([&] { MappedFile m("/dev/null"); }), "/dev/null: not a regular file");
  EXPECT_EQ(error_of([&] { write_file_atomic(below, "x"); }),
            below + ".tmp: No such file or directory");
  EXPECT_EQ(error_of([&] { OutputFile f(dir.path); }), dir.path + ": Is a directory");
  EXPECT_EQ(error_of([&] { fsync_directory(missing); }), missing + ": No such file or directory");
}

TEST(File, FullDisk) {
  const std::string full = "/dev/full: No space left on device";
  OutputFile f("/dev/full");
  EXPECT_EQ(error_of([&] { f.write("x", 1); }), full);
  EXPECT_EQ(error_of([&] { f.write_at("x", 1, 5); }), full);
}

TEST(File, FailedAtomicWriteLeavesTheOldFileAndNoTemporary) {
  const TempDir dir;
  // A full disk under PATH.tmp: a link to /dev/full stands where the temporary is written.
  write_file_atomic(dir / "f", "old");
  ASSERT_EQ(::symlink("/dev/full", (dir / "f.tmp").c_str()), 0);
  EXPECT_EQ(error_of([&] { write_file_atomic(dir / "f", "new"); }),
            (dir / "f.tmp") + ": No space left on device");
  EXPECT_EQ(read_file(dir / "f"), "old");
  EXPECT_FALSE(exists(dir / "f.tmp"));
  // A rename that fails: the target is a directory.
  ASSERT_EQ(::mkdir((dir / "d").c_str(), 0777), 0);
  EXPECT_EQ(error_of([&] { write_file_atomic(dir / "d", "x"); }), (dir / "d") + ": Is a directory");
  EXPECT_FALSE(exists(dir / "d.tmp"));
  EXPECT_TRUE(exists(dir / "d"));
}

TEST(File, NoPermission) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  const TempDir dir;
  ASSERT_EQ(::chmod(dir.path.c_str(), 0555), 0);
  EXPECT_EQ(error_of([&] { write_file_atomic(dir / "f", "x"); }),
            (dir / "f.tmp") + ": Permission denied");
  ::chmod(dir.path.c_str(), 0777);
}

TEST(File, OutputFile) {
  const TempDir dir;
  {
    OutputFile f(dir / "f");
    f.write("abcdef", 6);
    f.write_at("XY", 2, 2);
    f.write_at("end", 3, 8);
    f.close();
    f.close();
  }
  EXPECT_EQ(read_file(dir / "f"), std::string("abXYef\0\0end", 11));
  {
    OutputFile f(dir / "f", true);
    f.write("!", 1);
    f.flush_to_disk();
    f.resize(14);
  }
  EXPECT_EQ(read_file(dir / "f"), std::string("abXYef\0\0end!\0\0", 14));
  OutputFile(dir / "f").close();
  EXPECT_EQ(read_file(dir / "f"), "");
}

TEST(File, MappedFileMoves) {
  const TempDir dir;
  write_file_atomic(dir / "a", "aaa");
  write_file_atomic(dir / "b", "bb");
  MappedFile a(dir / "a"), b(dir / "b");
  MappedFile c(std::move(a));
  EXPECT_EQ(text_of(c), "aaa");
  b = std::move(c);
  EXPECT_EQ(text_of(b), "aaa");
  EXPECT_TRUE(MappedFile().bytes().empty());
}

}  // namespace
}  // namespace pith
