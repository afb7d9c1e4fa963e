// The one-shot kernel for virtual ranks (skew.cuh). FW_* as in one_shot.cu.

#include "one_shot.cuh"
#include "skew.cuh"

using namespace fusewise;

extern "C" __global__ void __launch_bounds__(FW_MAX_THREADS, FW_MIN_BLOCKS)
    fusewise_one_shot(const __grid_constant__ VirtualParams<OneShotParams> params) {
  __shared__ RowShared<FW_BLOCKS> shared;
  one_shot<OneShotConfig<FW_TYPE, FW_WORLD, FW_VECTORS, FW_BLOCKS, Output::FW_OUTPUT,
                         FW_EARLY_TRIGGER, FW_ONE_PASS, FW_ROW_VECTORS>,
           RandomSkew>(params.ranks[blockIdx.y], shared);
}
