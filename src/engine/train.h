#pragma once
#include "engine/run_config.h"

namespace pith {

// Trains as the run file says, continuing from OUT/latest if there is one. SIGTERM, SIGUSR1 and
// SIGINT set a flag: the step under way is finished, a checkpoint written, and train returns.
void train(const RunConfig& run);

}  // namespace pith
