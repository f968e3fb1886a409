// A string argument of an op.
//
// A std::string in its place would be lost in memory at each call: torch 2.10 to 2.13 unpack one with a `new` that
// nothing deletes (pytorch/pytorch#191340, mended in 2.14). The 48 bytes are not all: they come to lie between tensors
// and keep malloc from joining what is free around them, so that a training of 120 MiB of tensors grew to 1.5 GiB.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

namespace tpk {

struct Text : std::string {
  using std::string::string;
  Text(std::string text) : std::string(std::move(text)) {}  // NOLINT: where one op calls another
};

}  // namespace tpk

namespace torch::stable::detail {

template <>
struct ToImpl<tpk::Text> {
  static tpk::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    tpk::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
