// The fused GEMMs of plain tensors, past torch's dispatcher: the product by the engine that the chooser names, on the
// tensors' pointers or by torch's own linear, and the sum over the ranks. Between Python and an op's kernel lie about
// four microseconds, more than a small product takes. Where autograd records the call and nothing else observes it, one
// autograd.Function (tpkernels/ops/fused_gemm.py) has the functions of this file as its forward and its backward.
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

// x[..., K], w[N, K] and bias[N] that fit each other; where they do not, the checks of the op give the reason.
struct Operands {
  PyObject *x_object, *w_object, *bias_object;
  dlpack::View x, w, bias;
  GemmShape shape;
  bool recorded;  // by autograd

  static std::optional<Operands> of(PyObject* x, PyObject* w, PyObject* bias) {
    Operands found{x, w, bias, {}, {}, {}, {}, false};
    if (!view_of(x, &found.x) || !is_unobserved() || !view_of(w, &found.w)) return {};
    const DType dtype = dtype_of(found.x.dtype);
    if (dtype > DType::F16 || found.x.ndim < 2 || found.w.ndim != 2 || dtype_of(found.w.dtype) != dtype) return {};
    int64_t rows = 1;
    for (int i = 0; i + 1 < found.x.ndim; ++i) rows *= found.x.shape[i];
    found.shape = {dtype, rows, found.w.shape[0], found.w.shape[1]};
    if (found.shape.is_empty() || found.x.shape[found.x.ndim - 1] != found.shape.K) return {};
    if (bias != Py_None && !found.take_bias()) return {};
    found.recorded = records_gradient(x) || records_gradient(w) || (bias != Py_None && records_gradient(bias));
    return found;
  }

  bool take_bias() {
    return view_of(bias_object, &bias) && bias.ndim == 1 && bias.shape[0] == shape.N &&
           dtype_of(bias.dtype) == shape.dtype && is_contiguous(bias);
  }
  bool fit_gemv() const { return is_contiguous(x) && (shape.K == 1 || w.strides[1] == 1); }
  size_t numel() const { return static_cast<size_t>(shape.M * shape.N); }
};

// Between hosts the op sends large products in chunks.
bool is_chunked(const Communicator& comm, const Wire& wire, const GemmShape& y) {
  return comm.has_thread() &&
         chunks_of_sum(comm, wire, static_cast<size_t>(y.M), static_cast<size_t>(y.N), 2).ends.size() > 1;
}

// y[..., N]: memory of its own, or an object of torch; and where its values are.
struct Product {
  std::optional<NewTensor> memory;
  py::object object;
  void* data = nullptr;

  PyObject* release() { return memory.has_value() ? memory->release() : object.release().ptr(); }
};

void multiply(const Communicator& comm, const Operands& from, bool add_bias, Product& y) {
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
    return;
  }
  // torch's own function is the quickest way to ATen, but makes a view of more than two dims. Where operands do not fit
  // the gemv above, the op's own product packs them, so that all ops give the same bits.
  if (engine == Engine::Aten && from.x.ndim == 2) {
    y.object = py::reinterpret_steal<py::object>(
        torch_linear(from.x_object, from.w_object, add_bias ? from.bias_object : Py_None));
    dlpack::View view;
    if (view_of(y.object.ptr(), &view) && is_contiguous(view)) {
      y.data = data_of(view);
      return;
    }
  }
  const Tensor x = tensor_of(from.x_object), w = tensor_of(from.w_object);
  const OptionalTensor bias = add_bias ? OptionalTensor(tensor_of(from.bias_object)) : OptionalTensor();
  std::optional<Tensor> made;
  {
    py::gil_scoped_release no_gil;
    made = linear(comm, x, w, bias);
  }
  y.data = made->mutable_data_ptr();
  y.object = objects_of({*made})[0];
}

// The arguments x, w, bias, address and codec of both ops.
struct Call {
  static constexpr size_t kArguments = 5;
  Communicator* comm;
  const Wire* wire;
  Operands from;

  static std::optional<Call> of(Arguments args) {
    auto* const comm = static_cast<Communicator*>(PyLong_AsVoidPtr(args[3]));
    if (comm == nullptr || !comm->is_open()) return {};
    std::optional<Operands> from = Operands::of(args[0], args[1], args[2]);
    if (!from.has_value()) return {};
    const Wire* const wire = find_wire(from->shape.dtype, codec_named(args[4]), ReduceOp::Sum);
    return wire == nullptr ? std::nullopt : std::optional<Call>({comm, wire, *from});
  }
};

// The autograd.Functions of the two ops: `apply`, and the backward of what is none for this file. Strong references,
// never released.
struct Recorder {
  PyObject *apply = nullptr, *backward = nullptr;
};
Recorder of_linear, of_gemm_all_reduce;

py::tuple tuple_of(PyObject* object, PyObject* name) {
  return py::reinterpret_steal<py::tuple>(steal(PyObject_GetAttr(object, name)).release());
}
bool is_true(const py::tuple& flags, size_t i) { return PyTuple_GET_ITEM(flags.ptr(), i) == Py_True; }

PyObject* applied(PyObject* apply, Arguments args, Py_ssize_t count) {
  return steal(PyObject_Vectorcall(apply, args, static_cast<size_t>(count), nullptr)).release().ptr();
}

// The call of which `apply` is now calling the forward.
thread_local const Call* recorded_call = nullptr;

PyObject* recorded(PyObject* apply, const Call& call, Arguments args) {
  const Call* const outer = std::exchange(recorded_call, &call);
  PyObject* const y = PyObject_Vectorcall(apply, args, Call::kArguments, nullptr);
  recorded_call = outer;
  return steal(y).release().ptr();
}

PyObject* linear_of(const Call& call) {
  Product y;
  multiply(*call.comm, call.from, call.from.bias_object != Py_None, y);
  return y.release();
}

PyObject* gemm_all_reduce_of(const Call& call) {
  const auto& [comm, wire, from] = call;
  Product y;
  multiply(*comm, from, from.bias_object != Py_None && comm->rank() == 0, y);
  // As the op's own: ranks whose tensors are not plain make the same call.
  Shape shape(from.x.shape, from.x.shape + from.x.ndim);
  shape.back() = from.shape.N;
  const CallSpec spec{
      Op::GemmAllReduce, wire->dtype, wire->op, wire->codec, from.numel(), hash_of(shape.data(), shape.size()), 0};
  {
    py::gil_scoped_release no_gil;
    comm->all_reduce(spec, *wire, y.data, y.data, from.numel());
  }
  return y.release();
}

// (x, w, bias, address, codec) -> x @ w.T + bias, or None where the call is one for the op
PyObject* fast_linear(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, Call::kArguments, [&]() -> PyObject* {
    const std::optional<Call> call = Call::of(args);
    if (!call.has_value()) return none();
    return call->from.recorded ? recorded(of_linear.apply, *call, args) : linear_of(*call);
  });
}

// (x, w, bias, address, codec) -> the sum over the ranks, or None
PyObject* fast_gemm_all_reduce(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, Call::kArguments, [&]() -> PyObject* {
    const std::optional<Call> call = Call::of(args);
    if (!call.has_value() || is_chunked(*call->comm, *call->wire, call->from.shape)) return none();
    return call->from.recorded ? recorded(of_gemm_all_reduce.apply, *call, args) : gemm_all_reduce_of(*call);
  });
}

// What the backward needs, in the context of the autograd.Function: as save_linear of tpkernels/ops/linear.py.
void save(PyObject* context, const Call& call) {
  const py::tuple needs = tuple_of(context, names().needs_input_grad);
  PyObject* const x_for_dw = is_true(needs, 1) ? call.from.x_object : Py_None;
  PyObject* const w_for_dx = is_true(needs, 0) ? call.from.w_object : Py_None;
  const auto set = [context](PyObject* name, const py::object& value) {
    if (PyObject_SetAttr(context, name, value.ptr()) != 0) throw py::error_already_set();
  };
  set(names().to_save, steal(PyTuple_Pack(2, x_for_dw, w_for_dx)));  // as save_for_backward does
  set(names().call, py::make_tuple(call.comm->name(), call.comm->world_size(), name_of(call.wire->codec)));
}

// (context, x, w, bias, address, codec): the forward of an autograd.Function, inside `recorded`.
template <PyObject* (*compute)(const Call&)>
PyObject* forward(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 6, [&] {
    const Call* const call = recorded_call;
    TPK_CHECK(call != nullptr && call->from.x_object == args[1] && call->from.w_object == args[2],
              "the forward of a fused GEMM: called from elsewhere");
    py::object y = py::reinterpret_steal<py::object>(compute(*call));
    save(args[0], *call);
    return y.release().ptr();
  });
}

// The gradients of y = x @ w.T + bias from rows dy[M, N], those of linear_backward, by torch's own functions.
struct Backward {
  py::tuple needs, saved, call;  // call: name of the group, world_size, codec
  PyObject* dy;
  std::shared_ptr<Communicator> comm;
  GemmShape dx_shape;
  bool by_aten;  // dx

  bool need(size_t i) const { return is_true(needs, i); }
  PyObject* x() const { return PyTuple_GET_ITEM(saved.ptr(), 0); }
  PyObject* w() const { return PyTuple_GET_ITEM(saved.ptr(), 1); }

  static std::optional<Backward> of(PyObject* context, PyObject* dy) {
    dlpack::View dy_view, x, w;
    if (grad_is_enabled() || !view_of(dy, &dy_view) || !is_unobserved() || dy_view.ndim != 2) return {};
    Backward found{tuple_of(context, names().needs_input_grad),
                   tuple_of(context, names().saved_tensors),
                   tuple_of(context, names().call),
                   dy,
                   {},
                   {},
                   true};
    if (found.need(1) && !(view_of(found.x(), &x) && x.ndim == 2)) return {};
    found.comm = find_communicator(found.call[0].cast<std::string>(), "backward");
    return !found.need(0) || (view_of(found.w(), &w) && found.take_weight(dy_view, w))
               ? std::optional<Backward>(std::move(found))
               : std::nullopt;
  }

  bool take_weight(const dlpack::View& dy_view, const dlpack::View& w) {
    dx_shape = {dtype_of(w.dtype), dy_view.shape[0], w.shape[1], w.shape[0]};
    const Engine engine = choose_engine(comm->measured_engines(), dx_shape).engine;
    const bool has_dense_columns = w.shape[0] <= 1 || w.strides[0] == 1;  // engine_for asks the rows of w.T
    by_aten = engine == Engine::Aten || (engine == Engine::Gemv && !has_dense_columns);
    return !dx_shape.is_empty();
  }

  py::object dx() const {
    if (by_aten) return torch_mm(dy, w());
    const Tensor incoming = tensor_of(dy), weight = tensor_of(w());
    std::optional<Tensor> made;
    {
      py::gil_scoped_release no_gil;
      made = grad_input(*comm, incoming, weight);
    }
    return objects_of({*made})[0];
  }
  py::object dw() const { return torch_mm(steal(PyObject_CallMethodNoArgs(dy, names().t)).ptr(), x()); }
  py::object db() const { return py::handle(dy).attr("sum")(0); }

  // dx (none where it is not needed) and the others, one for each argument of the forward.
  PyObject* gradients(const py::object& dx, const py::object& dw, const py::object& db) const {
    const std::array<const py::object*, 3> found{&dx, &dw, &db};
    py::tuple all(needs.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i < 3 && *found[i] ? *found[i] : py::object(py::none());
    return all.release().ptr();
  }
  PyObject* local() const {
    return gradients(need(0) ? dx() : py::object(), need(1) ? dw() : py::object(), need(2) ? db() : py::object());
  }
};

// (context, dy) -> the gradients of all arguments
PyObject* backward_gemm_all_reduce(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 2, [&] {
    const std::optional<Backward> from = Backward::of(args[0], args[1]);
    return from.has_value() ? from->local() : applied(of_gemm_all_reduce.backward, args, count);
  });
}

// The same; dx is summed over the ranks, under way while the others are computed.
PyObject* backward_linear(PyObject*, Arguments args, Py_ssize_t count) {
  return guarded(count, 2, [&]() -> PyObject* {
    const std::optional<Backward> from = Backward::of(args[0], args[1]);
    if (!from.has_value()) return applied(of_linear.backward, args, count);
    if (!from->need(0)) return from->local();
    const GemmShape& shape = from->dx_shape;
    const size_t numel = static_cast<size_t>(shape.M * shape.N);
    const Wire* const wire = find_wire(shape.dtype, codec_of(from->call[2].cast<std::string>()), ReduceOp::Sum);
    if (wire == nullptr || is_for_thread(*from->comm, *wire, numel) || is_chunked(*from->comm, *wire, shape)) {
      return applied(of_linear.backward, args, count);
    }
    const py::object dx = from->dx();
    py::object dw, db;
    dlpack::View sum;
    TPK_CHECK(view_of(dx.ptr(), &sum) && is_contiguous(sum), "replicated_gemm_backward: no dense gradient of x");
    const CallSpec spec{
        Op::ReplicatedGemmBackward, wire->dtype, wire->op, wire->codec, numel, hash_of(sum.shape, 2), 0};
    {
      py::gil_scoped_release no_gil;
      from->comm->all_reduce_beside(spec, *wire, data_of(sum), numel, [&] {
        py::gil_scoped_acquire gil;
        if (from->need(1)) dw = from->dw();
        if (from->need(2)) db = from->db();
      });
    }
    return from->gradients(dx, dw, db);
  });
}

// Of each op `apply` of its autograd.Function, and the backward in Python.
void set_recorders(const py::object& linear_apply, const py::object& linear_backward,
                   const py::object& gemm_all_reduce_apply, const py::object& gemm_all_reduce_backward) {
  const auto kept = [](const py::object& x) { return py::object(x).release().ptr(); };
  of_linear = {kept(linear_apply), kept(linear_backward)};
  of_gemm_all_reduce = {kept(gemm_all_reduce_apply), kept(gemm_all_reduce_backward)};
}

PyMethodDef gemm_methods[] = {
    {"fast_linear", fast(fast_linear), METH_FASTCALL, "replicated_gemm of plain tensors, or None."},
    {"fast_gemm_all_reduce", fast(fast_gemm_all_reduce), METH_FASTCALL, "gemm_all_reduce of plain tensors, or None."},
    {"forward_linear", fast(forward<linear_of>), METH_FASTCALL, "The forward of an autograd.Function."},
    {"forward_gemm_all_reduce", fast(forward<gemm_all_reduce_of>), METH_FASTCALL, "The same of gemm_all_reduce."},
    {"backward_linear", fast(backward_linear), METH_FASTCALL, "Its backward."},
    {"backward_gemm_all_reduce", fast(backward_gemm_all_reduce), METH_FASTCALL, "The same of gemm_all_reduce."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_fast_gemm(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), gemm_methods) != 0) throw py::error_already_set();
  m.def("set_recorders", &set_recorders);
}

}  // namespace tpk
