// The inner loops of every collective on the CPU: pack, unpack, and sum R wires in the order given. Torch-free.
//
// Sums are float (double for double; integers wrap as unsigned) and are rounded once, so the result depends neither on
// how a message was cut nor on which rank computes it. max and min keep a NaN of any input.
#pragma once

#include <cstddef>

#include "core/codec/half.h"
#include "types.h"

namespace tpk {

template <class T, ReduceOp op>
void reduce_plain(const T* const* inputs, int num_inputs, T* const* outputs, int num_outputs, size_t n);

template <class C, class T>
void encode(const T* values, char* wire, size_t n);

template <class C, class T>
void decode(const char* wire, T* values, size_t n);

template <class C, ReduceOp op>
void reduce_coded(const char* const* inputs, int num_inputs, char* const* outputs, int num_outputs, size_t n);

template <class C, class T, ReduceOp op>
void reduce_coded_to_values(const char* const* inputs, int num_inputs, T* values, size_t n);

}  // namespace tpk
