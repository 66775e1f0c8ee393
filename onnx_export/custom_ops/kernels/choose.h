// Which kernels run, and what else the environment chooses, once a session.
#pragma once

#include "kernels/kernels.h"
#include "runtime/status.h"

namespace nsq {

// The best kernels that this processor can run, or those that the variable NSQ_CPU names (portable,
// avx2, avx512); an error if it names what cannot run.
Status choose_kernels(const Kernels** kernels);

// True if the variable NSQ_EXACT is set and not 0: codes are then decoded and all arithmetic of
// attention is float32.
bool exact_attention();

}  // namespace nsq
