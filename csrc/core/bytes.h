// Addresses by bytes. Torch-free.
#pragma once

#include <cstddef>

namespace tpk {

inline const char* at(const void* base, size_t bytes) { return static_cast<const char*>(base) + bytes; }
inline char* at(void* base, size_t bytes) { return static_cast<char*>(base) + bytes; }

}  // namespace tpk
