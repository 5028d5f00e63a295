#pragma once
#include "core/tape.h"

namespace pith {

// Op events as a Chrome trace (chrome://tracing, Perfetto): name, source line, FLOPs and bytes of
// every run.
void write_chrome_trace(const std::string& path, const std::vector<OpEvent>& events);

}  // namespace pith
