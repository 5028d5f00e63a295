#include "core/profile.h"

#include "core/file.h"

namespace pith {

void write_chrome_trace(const std::string& path, const std::vector<OpEvent>& events) {
  std::string out = "{\"traceEvents\":[\n";
  for (const OpEvent& e : events)
    out += fmt::format(
        "{}{{\"name\":\"{}{}\",\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":{:.3f},\"dur\":{:.3f},"
        "\"args\":{{\"at\":\"{}\",\"gflop\":{:.6f},\"mb\":{:.6f}}}}}",
        &e == events.data() ? "" : ",\n", e.name, e.backward ? " backward" : "",
        (e.begin - events.front().begin) * 1e6, (e.end - e.begin) * 1e6, e.at.str(),
        e.cost.flops / 1e9, e.cost.bytes / 1e6);
  write_file_atomic(path, out + "\n]}\n");
}

}  // namespace pith
