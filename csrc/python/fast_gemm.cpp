// The fused GEMMs of plain tensors, past torch's dispatcher: the product by the engine that the chooser names, on the
// tensors' pointers or by torch's own linear, and the sum over the ranks. Between Python and an op's kernel lie about
// four microseconds, more than a small product takes.
#include "fast_gemm.h"

#include <optional>

#include "core/communicator.h"
#include "core/specs.h"
#include "cpu/choose.h"
#include "cpu/chunks.h"
#include "cpu/gemm.h"
#include "new_tensor.h"

namespace py = pybind11;

namespace tpk {
namespace {

char* data_of(const dlpack::View& x) { return static_cast<char*>(x.data) + x.byte_offset; }

// x[..., K], w[N, K] and bias[N] that fit each other; where they do not, the checks of the op give the reason.
struct Operands {
  PyObject *x_object, *w_object, *bias_object;
  dlpack::View x, w, bias;
  GemmShape shape;

  static std::optional<Operands> of(PyObject* x, PyObject* w, PyObject* bias) {
    Operands found{x, w, bias, {}, {}, {}, {}};
    if (!plain_view_of(x, &found.x) || !view_of(w, &found.w) || records_gradient(w)) return {};
    const DType dtype = dtype_of(found.x.dtype);
    if (dtype > DType::F16 || found.x.ndim < 2 || found.w.ndim != 2 || dtype_of(found.w.dtype) != dtype) return {};
    int64_t rows = 1;
    for (int i = 0; i + 1 < found.x.ndim; ++i) rows *= found.x.shape[i];
    found.shape = {dtype, rows, found.w.shape[0], found.w.shape[1]};
    if (found.shape.is_empty() || found.x.shape[found.x.ndim - 1] != found.shape.K) return {};
    return bias == Py_None || found.take_bias() ? std::optional<Operands>(found) : std::nullopt;
  }

  bool take_bias() {
    return view_of(bias_object, &bias) && !records_gradient(bias_object) && bias.ndim == 1 &&
           bias.shape[0] == shape.N && dtype_of(bias.dtype) == shape.dtype && is_contiguous(bias);
  }
  bool fit_gemv() const { return is_contiguous(x) && (shape.K == 1 || w.strides[1] == 1); }
  size_t numel() const { return static_cast<size_t>(shape.M * shape.N); }
};

// Between hosts the op sends large products in chunks.
bool is_chunked(const Communicator& comm, const Wire& wire, const GemmShape& y) {
  return chunks_of_sum(comm, wire, static_cast<size_t>(y.M), static_cast<size_t>(y.N), 2).ends.size() > 1;
}

// y[..., N]: memory of its own, or an object of torch; and where its values are.
struct Product {
  std::optional<NewTensor> memory;
  py::object object;
  void* data = nullptr;

  PyObject* release() { return memory.has_value() ? memory->release() : object.release().ptr(); }
};

// Returns false where the product is one for the op: by oneDNN, or of more than two dims by ATen, which makes a view of
// rows.
bool multiply(const Communicator& comm, const Operands& from, bool add_bias, Product& y) {
  const GemmShape& shape = from.shape;
  const Engine engine = choose_engine(comm.measured_engines(), shape).engine;
  if (engine == Engine::Gemv && from.fit_gemv()) {
    y.memory.emplace(from.x, static_cast<size_t>(from.x.ndim - 1), shape.N, from.numel() * size_of(shape.dtype));
    y.data = y.memory->data();
    const Gemv product{data_of(from.x),
                       data_of(from.w),
                       from.w.strides[0],
                       add_bias ? data_of(from.bias) : nullptr,
                       y.data,
                       static_cast<size_t>(shape.M),
                       static_cast<size_t>(shape.N),
                       static_cast<size_t>(shape.K)};
    py::gil_scoped_release no_gil;
    multiply_few_rows(shape.dtype, product);
    return true;
  }
  if (engine != Engine::Aten || from.x.ndim != 2) return false;
  y.object = py::reinterpret_steal<py::object>(
      torch_linear(from.x_object, from.w_object, add_bias ? from.bias_object : Py_None));
  dlpack::View view;
  if (!view_of(y.object.ptr(), &view) || !is_contiguous(view)) return false;
  y.data = data_of(view);
  return true;
}

// (x, w, bias, address) -> x @ w.T + bias, or None where the call is one for the op
PyObject* fast_linear(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    const auto* const comm = static_cast<Communicator*>(PyLong_AsVoidPtr(args[3]));
    if (comm == nullptr || !comm->is_open()) return none();
    const std::optional<Operands> from = Operands::of(args[0], args[1], args[2]);
    Product y;
    return from.has_value() && multiply(*comm, *from, args[2] != Py_None, y) ? y.release() : none();
  });
}

// (x, w, bias, address, codec) -> the sum over the ranks, or None
PyObject* fast_gemm_all_reduce(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 5, [&]() -> PyObject* {
    auto* const comm = static_cast<Communicator*>(PyLong_AsVoidPtr(args[3]));
    if (comm == nullptr || !comm->is_open() || !PyUnicode_Check(args[4])) return none();
    const std::optional<Operands> from = Operands::of(args[0], args[1], args[2]);
    if (!from.has_value()) return none();
    const Wire* const wire = find_wire(from->shape.dtype, codec_of(PyUnicode_AsUTF8(args[4])), ReduceOp::Sum);
    if (wire == nullptr || is_chunked(*comm, *wire, from->shape)) return none();
    Product y;
    if (!multiply(*comm, *from, args[2] != Py_None && comm->rank() == 0, y)) return none();
    // As the op's own: ranks whose tensors are not plain make the same call.
    Shape shape(from->x.shape, from->x.shape + from->x.ndim);
    shape.back() = from->shape.N;
    const CallSpec spec{
        Op::GemmAllReduce, wire->dtype, wire->op, wire->codec, from->numel(), hash_of(shape.data(), shape.size()), 0};
    {
      py::gil_scoped_release no_gil;
      comm->all_reduce(spec, *wire, y.data, y.data, from->numel());
    }
    return y.release();
  });
}

PyMethodDef methods[] = {
    {"fast_linear", fast(fast_linear), METH_FASTCALL, "replicated_gemm of plain tensors, or None."},
    {"fast_gemm_all_reduce", fast(fast_gemm_all_reduce), METH_FASTCALL, "gemm_all_reduce of plain tensors, or None."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_fast_gemm(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace tpk
