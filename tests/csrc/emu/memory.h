// Memory that the emulator knows: whose it is, and where it ends.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>

namespace tpk::emu {

constexpr int kPoison = 0xff;  // fresh memory: NaN in every float type
constexpr int kHost = -1;      // the owner of pinned host memory

// What the race detector keeps of an allocation.
class Shadow {
 public:
  virtual ~Shadow() = default;
};

struct Allocation {
  char* base = nullptr;
  size_t bytes = 0;
  int owner = kHost;
  bool foreign = false;  // allocated by others
  std::once_flag shadow_made;
  std::unique_ptr<Shadow> shadow;
};

// nullptr when there is no memory.
void* allocate(size_t bytes, int owner);
// False when nothing was allocated there.
bool release(void* memory);
void release_all();

// The allocation in which an address lies, or nullptr. It stays valid until it is released.
Allocation* find_allocation(const void* address);
std::string describe_address(const void* address);  // "0x7f..40 (memory of rank 1, byte 64)"

}  // namespace tpk::emu
