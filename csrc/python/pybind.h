// pybind11, as torch ships it. Only files that make Python modules include this.
//
// torch 2.11 refuses its own copy where TORCH_TARGET_VERSION is defined, because extensions of the stable ABI are meant
// to do without. Ours bind runtime objects with it and keep tensors to the stable ABI, so these headers do not see it.
#pragma once

#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
