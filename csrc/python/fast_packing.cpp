// Packing of plain tensors, past torch's dispatcher: with the checks of the public functions that takes 4 to 8 us, more
// than the packing of 64 Ki values. None has a gradient, so that a tensor which requires one is plain here.
#include "fast_packing.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/communicator.h"
#include "cpu/compress.h"
#include "new_tensor.h"

namespace py = pybind11;

namespace tpk {
namespace {

size_t numel_of(const dlpack::View& x) {
  size_t numel = 1;
  for (int i = 0; i < x.ndim; ++i) numel *= static_cast<size_t>(x.shape[i]);
  return numel;
}
bool is_plain(PyObject* x, dlpack::View* view) { return view_of(x, view) && is_contiguous(*view); }

// nullptr where the codec does not pack the dtype; the op's checks then give the reason.
const Wire* packing_of(const dlpack::DataType& dtype, PyObject* codec) {
  const Wire* const wire = find_wire(dtype_of(dtype), codec_named(codec), ReduceOp::Sum);
  return wire == nullptr || wire->is_plain() ? nullptr : wire;
}

// uint8 [bytes]
NewTensor new_wire(const dlpack::View& like, size_t bytes) {
  dlpack::View flat = like;
  flat.ndim = 1;
  flat.dtype = {dlpack::kUInt, 8, 1};
  return NewTensor(flat, 0, static_cast<int64_t>(bytes), bytes);
}

// (x, codec) -> the wire, or None where the call is one for the op
PyObject* fast_compress(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 2, [&]() -> PyObject* {
    dlpack::View x;
    const Wire* const wire = is_plain(args[0], &x) && is_unobserved() ? packing_of(x.dtype, args[1]) : nullptr;
    if (wire == nullptr) return none();
    const size_t numel = numel_of(x);
    NewTensor out = new_wire(x, wire->bytes(numel));
    {
      py::gil_scoped_release no_gil;
      pack(*wire, data_of(x), out.data(), numel);
    }
    return out.release();
  });
}

// The sizes of a tuple or list of plain numbers, and their product, of which no number of bytes overflows.
struct Sizes {
  static constexpr size_t kMostValues = SIZE_MAX / 16;
  std::vector<int64_t> sizes;
  size_t numel = 1;

  static std::optional<Sizes> of(PyObject* shape) {
    if (!PyTuple_Check(shape) && !PyList_Check(shape)) return {};
    Sizes found;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(shape); ++i) {
      PyObject* const item = PySequence_Fast_GET_ITEM(shape, i);
      int overflow = 0;
      const long long size = PyLong_CheckExact(item) ? PyLong_AsLongLongAndOverflow(item, &overflow) : -1;
      if (size < 0 || __builtin_mul_overflow(found.numel, static_cast<size_t>(size), &found.numel)) return {};
      if (found.numel > kMostValues) return {};
      found.sizes.push_back(size);
    }
    return found;
  }
};

// (wire, shape, dtype, codec) -> the values, or None
PyObject* fast_decompress(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    dlpack::View packed;
    if (!is_plain(args[0], &packed) || packed.ndim != 1 || dtype_of(packed.dtype) != DType::U8) return none();
    std::optional<Sizes> shape = Sizes::of(args[1]);
    const dlpack::DataType dtype = data_type_of(args[2]);
    const Wire* const wire = shape.has_value() && is_unobserved() ? packing_of(dtype, args[3]) : nullptr;
    if (wire == nullptr || static_cast<size_t>(packed.shape[0]) != wire->bytes(shape->numel)) return none();
    const int32_t ndim = static_cast<int32_t>(shape->sizes.size());
    const dlpack::View like{nullptr, packed.device, ndim, dtype, shape->sizes.data(), nullptr, 0};
    NewTensor out(like, shape->sizes.size(), 0, shape->numel * wire->value_bytes);
    {
      py::gil_scoped_release no_gil;
      unpack(*wire, data_of(packed), out.data(), shape->numel);
    }
    return out.release();
  });
}

// (x, residual, codec, scale) -> the wire, or None
PyObject* fast_compress_with_feedback(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    dlpack::View x, residual;
    if (!is_plain(args[0], &x) || !is_plain(args[1], &residual) || !is_unobserved()) return none();
    const Wire* const wire = packing_of(x.dtype, args[2]);
    const bool fits = dtype_of(residual.dtype) == DType::F32 && residual.ndim == x.ndim &&
                      std::equal(x.shape, x.shape + x.ndim, residual.shape);
    if (wire == nullptr || !fits || records_gradient(args[1]) || !PyFloat_CheckExact(args[3])) return none();
    const size_t numel = numel_of(x);
    const float scale = static_cast<float>(PyFloat_AS_DOUBLE(args[3]));
    NewTensor out = new_wire(x, wire->bytes(numel));
    {
      py::gil_scoped_release no_gil;
      pack_with_feedback(*wire, data_of(x), reinterpret_cast<float*>(data_of(residual)), out.data(), scale, numel);
    }
    mark_modified(args[1]);
    return out.release();
  });
}

// (flat, residual, codec, group's name) -> the average, or None where the group has no stream for it: as on all ranks,
// because what observes the call on one of them does not count.
PyObject* average_with_feedback(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    constexpr Op op = Op::AverageWithFeedback;
    const char* const name = PyUnicode_AsUTF8(args[3]);
    if (name == nullptr) throw py::error_already_set();
    const std::shared_ptr<Communicator> comm = find_communicator(name, name_of(op));
    if (!comm->averages_with_feedback()) return none();
    dlpack::View x, residual;
    TPK_CHECK(is_plain(args[0], &x) && is_plain(args[1], &residual), name_of(op),
              ": flat and residual must be contiguous tensors on the CPU");
    TPK_CHECK(x.ndim == 1 && residual.ndim == 1 && numel_of(x) == numel_of(residual), name_of(op),
              ": flat and residual must have one dim and equally many values, got ", x.ndim, " dims with ", numel_of(x),
              " values and ", residual.ndim, " with ", numel_of(residual));
    TPK_CHECK(dtype_of(residual.dtype) == DType::F32, name_of(op), ": residual must be float32, got ",
              name_of(dtype_of(residual.dtype)));
    const Wire* const wire = packing_of(x.dtype, args[2]);
    TPK_CHECK(wire != nullptr, name_of(op),
              ": flat must have a dtype that the codec packs (float32, bfloat16, float16; ",
              "none packs nothing), got ", name_of(dtype_of(x.dtype)), " and codec ",
              py::repr(py::handle(args[2])).cast<std::string>());
    const size_t numel = numel_of(x);
    NewTensor out(x, 0, x.shape[0], numel * wire->value_bytes);
    const FeedbackAverage call{data_of(x), reinterpret_cast<float*>(data_of(residual)),
                               static_cast<float>(1.0 / comm->world_size()), out.data(),
                               Cut::even(numel, comm->world_size())};
    {
      py::gil_scoped_release no_gil;
      comm->average_with_feedback({op, wire->dtype, wire->op, wire->codec, numel, 0, 0}, *wire, call);
    }
    mark_modified(args[1]);
    return out.release();
  });
}

PyMethodDef packing_methods[] = {
    {"fast_compress", fast(fast_compress), METH_FASTCALL, "compress of a plain tensor, or None."},
    {"fast_decompress", fast(fast_decompress), METH_FASTCALL, "decompress of a plain tensor, or None."},
    {"fast_compress_with_feedback", fast(fast_compress_with_feedback), METH_FASTCALL, "The same, or None."},
    {"average_with_feedback", fast(average_with_feedback), METH_FASTCALL, "The average over the ranks, or None."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_fast_packing(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), packing_methods) != 0) throw py::error_already_set();
}

}  // namespace tpk
