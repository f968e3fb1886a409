// An all_reduce of a few KiB between two cores takes a microsecond; to find out from Python that no layer of torch has
// work between the call and its kernel takes longer. Here C code queries the same state, gets all of a tensor in one
// call (DLPack's exchange interface, plain C, in torch from 2.10 on), and runs the collective on the tensor's pointer.
#include "fast_path.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <utility>

#include "core/check.h"
#include "core/communicator.h"
#include "core/specs.h"
#include "new_tensor.h"

namespace py = pybind11;

namespace tpk {
namespace {

using Translate = void (*)(std::exception_ptr);
Translate translate_error = nullptr;

// The state of torch that decides. Strong references, never released.
#define TPK_TORCH_STATE(X)    \
  X(tensor_type)              \
  X(parameter_type)           \
  X(is_grad_enabled)          \
  X(len_dispatch_modes)       \
  X(is_function_mode_enabled) \
  X(peek_transforms)          \
  X(is_profiler_enabled)      \
  X(tracing_state)            \
  X(forward_ad)               \
  X(increment_version)        \
  X(handle_of_tensor)         \
  X(tensors_of_handles)       \
  X(linear)                   \
  X(mm)                       \
  X(float32)                  \
  X(float16)                  \
  X(bfloat16)

struct TorchState {
#define TPK_TORCH_STATE_FIELD(name) PyObject* name = nullptr;
  TPK_TORCH_STATE(TPK_TORCH_STATE_FIELD)
#undef TPK_TORCH_STATE_FIELD
  const dlpack::ExchangeApi* exchange = nullptr;  // nullptr until set_fast_path: no tensor is plain
} torch_state;

bool method_is(PyObject* of, PyObject* name, PyObject* what) {
  return steal(PyObject_CallMethodNoArgs(of, name)).ptr() == what;
}
bool call_is(PyObject* function, PyObject* what) { return steal(PyObject_CallNoArgs(function)).ptr() == what; }

int64_t integer(const py::object& value) {
  const long long found = PyLong_AsLongLong(value.ptr());
  if (found == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found;
}

}  // namespace

const Names& names() {
  static const Names* instance = new Names;
  return *instance;
}

// No mode, no transform, no profiler, no tracing.
bool is_unobserved() {
  return integer(steal(PyObject_CallNoArgs(torch_state.len_dispatch_modes))) == 0 &&
         call_is(torch_state.is_function_mode_enabled, Py_False) && call_is(torch_state.peek_transforms, Py_None) &&
         call_is(torch_state.is_profiler_enabled, Py_False) && call_is(torch_state.tracing_state, Py_None) &&
         integer(steal(PyObject_GetAttr(torch_state.forward_ad, names().current_level))) < 0;
}

namespace {

// A ZeroTensor (such as the gradient of torch.sgn) has values and no memory: the dispatcher makes it one of zeros.
bool has_memory(const dlpack::View& view) {
  return view.data != nullptr || std::find(view.shape, view.shape + view.ndim, 0) != view.shape + view.ndim;
}

// The wire of a reduction, or nullptr when there is none (the op's checks then raise the reason).
const Wire* wire_named(DType dtype, PyObject* op, PyObject* codec) {
  if (op == names().sum && codec == names().none) return find_wire(dtype, Codec::None, ReduceOp::Sum);
  if (!PyUnicode_Check(op)) return nullptr;
  const Codec packing = codec_named(codec);
  for (ReduceOp reduction : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min}) {
    if (PyUnicode_CompareWithASCIIString(op, name_of(reduction)) == 0) return find_wire(dtype, packing, reduction);
  }
  return nullptr;
}

// A plain, contiguous tensor under a reduction that exists.
struct FastCall {
  Communicator& comm;
  const Wire& wire;
  dlpack::View view;
  size_t numel;

  const char* data() const { return static_cast<const char*>(view.data) + view.byte_offset; }
  size_t num_dims() const { return static_cast<size_t>(view.ndim); }
};

std::optional<FastCall> fast_call(PyObject* x, PyObject* address, PyObject* op, PyObject* codec) {
  auto* const comm = static_cast<Communicator*>(PyLong_AsVoidPtr(address));
  dlpack::View view;
  if (comm == nullptr || !plain_view_of(x, &view) || !is_contiguous(view)) return {};
  const Wire* const wire = wire_named(dtype_of(view.dtype), op, codec);
  if (wire == nullptr) return {};
  size_t numel = 1;
  for (int i = 0; i < view.ndim; ++i) numel *= static_cast<size_t>(view.shape[i]);
  return FastCall{*comm, *wire, view, numel};
}

CallSpec reduction_spec(const FastCall& call, Op op) {
  const Wire& wire = call.wire;
  return {op, wire.dtype, wire.op, wire.codec, call.numel, hash_of(call.view.shape, call.num_dims()), 0};
}

// Up to this size the dispatcher costs more than the collective; beyond, outputs are torch's own.
constexpr size_t kMostBytes = size_t{1} << 18;
constexpr int64_t kMostRows = int64_t{1} << 18;  // so that no product of sizes overflows
bool is_large(size_t numel, const Wire& wire) { return numel * wire.value_bytes > kMostBytes; }

enum Plainness : long { kObserved, kRecorded, kPlain };

// Of a call with these tensors.
Plainness plainness_of(Arguments args, Py_ssize_t count) {
  Plainness found = kPlain;
  for (Py_ssize_t i = 0; i < count; ++i) {
    dlpack::View view;
    if (!view_of(args[i], &view) || (i == 0 && !is_unobserved())) return kObserved;
    if (records_gradient(args[i])) found = kRecorded;
  }
  return count > 0 ? found : kObserved;
}

PyObject* plainness(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, count, [&] { return PyLong_FromLong(plainness_of(args, count)); });
}

// (x, address, op, codec) -> whether it was done
PyObject* fast_all_reduce_inplace(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&] {
    const std::optional<FastCall> call = fast_call(args[0], args[1], args[2], args[3]);
    if (!call.has_value()) return PyBool_FromLong(0);
    {
      py::gil_scoped_release no_gil;
      void* const data = const_cast<char*>(call->data());
      call->comm.all_reduce(reduction_spec(*call, Op::AllReduceInplace), call->wire, data, data, call->numel);
    }
    mark_modified(args[0]);
    return PyBool_FromLong(1);
  });
}

// (x, address, op, codec) -> the new tensor, or None where the call is not one for the fast path
PyObject* fast_all_reduce(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    const std::optional<FastCall> call = fast_call(args[0], args[1], args[2], args[3]);
    if (!call.has_value() || is_large(call->numel, call->wire)) return none();
    NewTensor out(call->view, 0, call->view.ndim > 0 ? call->view.shape[0] : 1, call->numel * call->wire.value_bytes);
    {
      py::gil_scoped_release no_gil;
      call->comm.all_reduce(reduction_spec(*call, Op::AllReduce), call->wire, call->data(), out.data(), call->numel);
    }
    return out.release();
  });
}

// (x, address, op, codec): along dimension 0
PyObject* fast_reduce_scatter(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    const std::optional<FastCall> call = fast_call(args[0], args[1], args[2], args[3]);
    if (!call.has_value() || call->view.ndim == 0 || is_large(call->numel, call->wire)) return none();
    const CutCall cut =
        reduce_scatter_call(Op::ReduceScatter, call->wire, call->view.shape, call->num_dims(), 0, call->comm);
    NewTensor out(call->view, 0, cut.rows, static_cast<size_t>(cut.rows) * cut.row * call->wire.value_bytes);
    {
      py::gil_scoped_release no_gil;
      call->comm.reduce_scatter(cut.spec, call->wire, call->data(), out.data(), cut.cut);
    }
    return out.release();
  });
}

// (x_shard, address, dim_size, codec): along dimension 0
PyObject* fast_all_gather(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    if (!PyLong_CheckExact(args[2])) return none();  // the ranks exchange their sizes first
    const std::optional<FastCall> call = fast_call(args[0], args[1], names().sum, args[3]);
    int overflow = 0;
    const int64_t dim_size = PyLong_AsLongLongAndOverflow(args[2], &overflow);  // -1 where it overflows
    if (!call.has_value() || call->view.ndim == 0 || dim_size < 0 || dim_size > kMostRows) return none();
    const size_t row = row_values(call->view.shape, call->num_dims());
    if (is_large(static_cast<size_t>(dim_size) * row, call->wire)) return none();
    const CutCall cut = all_gather_call(Op::AllGather, call->wire, call->view.shape, call->num_dims(), 0,
                                        Cut::even(static_cast<size_t>(dim_size), call->comm.world_size()));
    NewTensor out(call->view, 0, dim_size, static_cast<size_t>(dim_size) * row * call->wire.value_bytes);
    {
      py::gil_scoped_release no_gil;
      call->comm.all_gather(cut.spec, call->wire, call->data(), out.data(), cut.cut);
    }
    return out.release();
  });
}

PyMethodDef methods[] = {
    {"plainness", fast(plainness), METH_FASTCALL, "Who observes a call with tensors: see tpkernels/ops/_op.py."},
    {"fast_all_reduce_", fast(fast_all_reduce_inplace), METH_FASTCALL, "all_reduce_ of a plain tensor, if it is one."},
    {"fast_all_reduce", fast(fast_all_reduce), METH_FASTCALL, "all_reduce of a small plain tensor, or None."},
    {"fast_reduce_scatter", fast(fast_reduce_scatter), METH_FASTCALL, "reduce_scatter likewise, along dim 0."},
    {"fast_all_gather", fast(fast_all_gather), METH_FASTCALL, "all_gather likewise, along dim 0."},
    {nullptr, nullptr, 0, nullptr}};

void set_fast_path(const py::dict& given, const py::capsule& exchange) {
#define TPK_TORCH_STATE_SET(name) torch_state.name = py::object(given[#name]).release().ptr();
  TPK_TORCH_STATE(TPK_TORCH_STATE_SET)
#undef TPK_TORCH_STATE_SET
  const auto* const found = static_cast<const dlpack::ExchangeApi*>(exchange.get_pointer());
  if (found->version.major == dlpack::kMajor) torch_state.exchange = found;
}

}  // namespace

DType dtype_of(const dlpack::DataType& type) {
  const int bytes = type.bits / 8;
  const auto by_size = [bytes](DType one, DType two, DType four, DType eight) {
    return bytes == 1 ? one : bytes == 2 ? two : bytes == 4 ? four : bytes == 8 ? eight : DType::Count;
  };
  if (type.lanes != 1) return DType::Count;
  switch (type.code) {
    case dlpack::kFloat: return by_size(DType::Count, DType::F16, DType::F32, DType::F64);
    case dlpack::kBfloat: return bytes == 2 ? DType::BF16 : DType::Count;
    case dlpack::kInt: return by_size(DType::I8, DType::I16, DType::I32, DType::I64);
    case dlpack::kUInt: return bytes == 1 ? DType::U8 : DType::Count;
    default: return DType::Count;
  }
}

Codec codec_named(PyObject* codec) {
  if (codec == names().none) return Codec::None;
  const char* const name = PyUnicode_Check(codec) ? PyUnicode_AsUTF8(codec) : nullptr;
  if (name != nullptr) return codec_of(name);
  PyErr_Clear();
  return Codec::Count;
}

dlpack::DataType data_type_of(PyObject* dtype) {
  if (dtype == torch_state.float32) return {dlpack::kFloat, 32, 1};
  if (dtype == torch_state.float16) return {dlpack::kFloat, 16, 1};
  if (dtype == torch_state.bfloat16) return {dlpack::kBfloat, 16, 1};
  return {};
}

void mark_modified(PyObject* x) {
  const py::object one = steal(PyTuple_Pack(1, x));
  steal(PyObject_CallOneArg(torch_state.increment_version, one.ptr()));
}

bool records_gradient(PyObject* x) {
  return steal(PyObject_GetAttr(x, names().requires_grad)).ptr() == Py_True && grad_is_enabled();
}

bool plain_view_of(PyObject* x, dlpack::View* view) {
  return view_of(x, view) && !records_gradient(x) && is_unobserved();
}

PyObject* object_of(dlpack::Managed* tensor) {
  void* object = nullptr;
  if (torch_state.exchange->to_object(tensor, &object) != 0) throw py::error_already_set();
  return static_cast<PyObject*>(object);
}

Tensor tensor_of(PyObject* x) {
  const py::object handle = steal(PyObject_CallOneArg(torch_state.handle_of_tensor, x));
  void* const tensor = PyCapsule_GetPointer(handle.ptr(), nullptr);
  if (tensor == nullptr) throw py::error_already_set();
  return Tensor(static_cast<AtenTensorHandle>(tensor));
}

py::list objects_of(std::initializer_list<Tensor> tensors) {
  py::list handles(tensors.size());
  size_t i = 0;
  for (const Tensor& x : tensors) {
    AtenTensorHandle own = nullptr;  // which the call takes over
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x.get(), &own));
    handles[i++] = steal(PyCapsule_New(own, nullptr, nullptr));
  }
  return steal(PyObject_CallOneArg(torch_state.tensors_of_handles, handles.ptr()));
}

bool grad_is_enabled() { return call_is(torch_state.is_grad_enabled, Py_True); }

py::object torch_mm(PyObject* x, PyObject* w) {
  PyObject* const args[] = {x, w};
  return steal(PyObject_Vectorcall(torch_state.mm, args, 2, nullptr));
}

PyObject* torch_linear(PyObject* x, PyObject* w, PyObject* bias) {
  PyObject* const args[] = {x, w, bias};
  PyObject* const y = PyObject_Vectorcall(torch_state.linear, args, 3, nullptr);
  if (y == nullptr) throw py::error_already_set();
  return y;
}

void raise_in_python() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (...) {
    try {
      translate_error(std::current_exception());  // throws what is none of errors.h
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
      PyErr_SetString(PyExc_RuntimeError, "unknown error in an op");
    }
  }
}

bool view_of(PyObject* x, dlpack::View* view) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  if (torch_state.exchange == nullptr || (type != torch_state.tensor_type && type != torch_state.parameter_type))
    return false;
  if (torch_state.exchange->view_of_object(x, view) != 0) {  // sparse, meta, a dtype that DLPack lacks
    PyErr_Clear();
    return false;
  }
  return view->device.type == dlpack::kCpu && has_memory(*view) && method_is(x, names().is_neg, Py_False) &&
         (view->dtype.code != dlpack::kComplex || method_is(x, names().is_conj, Py_False));
}

bool is_contiguous(const dlpack::View& x) {
  int64_t expected = 1;
  for (int i = x.ndim; i-- > 0;) {
    if (x.shape[i] == 0) return true;
    if (x.shape[i] != 1 && x.strides[i] != expected) return false;
    expected *= x.shape[i];
  }
  return true;
}

void add_fast_path(py::module_& m, Translate translate) {
  translate_error = translate;
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("method", [](const py::object& function) { return steal(PyInstanceMethod_New(function.ptr())); });
  m.def("set_fast_path", &set_fast_path, py::arg("state"), py::arg("exchange"));
}

}  // namespace tpk
