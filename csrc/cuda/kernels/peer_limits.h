// What the signals of an arena have room for. Apart from kernels.h because it needs no CUDA headers.
#pragma once

namespace tpk::cuda {

constexpr int kMaxPeers = 8;
constexpr int kMaxBlocks = 64;   // of a kernel that exchanges with peers block by block
constexpr int kMaxTiles = 1024;  // of a rank's part of one launch that talks tile by tile

}  // namespace tpk::cuda
