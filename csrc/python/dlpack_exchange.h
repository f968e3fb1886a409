// The part of DLPack's C interface, version 1, by which torch describes a tensor and takes one over; layouts as the
// standard fixes them. torch's own copy of the header refuses to be included beside the stable ABI.
#pragma once

#include <cstdint>

namespace tpk::dlpack {

constexpr uint32_t kMajor = 1, kMinor = 0;
constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5 };

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {  // DLTensor
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct Managed {  // DLManagedTensorVersioned
  Version version;
  void* context;
  void (*deleter)(Managed* self);
  uint64_t flags;
  View view;
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* from_object;
  int (*to_object)(Managed* tensor, void** object);  // takes the tensor over
  int (*view_of_object)(void* object, View* view);   // borrows; 0, or -1 with a Python error set
  void* current_stream;
};

}  // namespace tpk::dlpack
