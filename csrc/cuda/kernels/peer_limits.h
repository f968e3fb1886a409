// What the signals of an arena have room for. Apart from kernels.h because it needs no CUDA headers.
#pragma once

namespace tpk::cuda {

constexpr int kMaxPeers = 8;
constexpr int kMaxBlocks = 64;  // of a kernel that talks to peers

}  // namespace tpk::cuda
