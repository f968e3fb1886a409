#include "decode_step.h"

#include <initializer_list>

#include "core/check.h"
#include "cpu/decoder.h"
#include "cpu/parallel.h"
#include "fast_path.h"

namespace py = pybind11;

namespace tpk {
namespace {

// The tensors of a call. What one of them does not fit is a reason to compute in another way, not an error.
class Tensors {
 public:
  explicit Tensors(DType dtype) : dtype_(dtype) {}

  bool fit() const { return fit_; }

  // The values of a dense tensor of these sizes, where -1 is any, which is returned in `size`.
  const void* of(py::handle x, std::initializer_list<int64_t> sizes, size_t* size = nullptr) {
    return of(x, sizes, dtype_, size);
  }
  const void* of(py::handle x, std::initializer_list<int64_t> sizes, DType dtype, size_t* size = nullptr) {
    dlpack::View view;
    if (!fit_ || !view_of(x.ptr(), &view) || dtype_of(view.dtype) != dtype || !is_contiguous(view) ||
        static_cast<size_t>(view.ndim) != sizes.size()) {
      fit_ = false;
      return nullptr;
    }
    const int64_t* found = view.shape;
    for (int64_t wanted : sizes) {
      if (wanted == kAny && size != nullptr) *size = static_cast<size_t>(*found);
      fit_ = fit_ && (wanted == kAny || wanted == *found);
      ++found;
    }
    return static_cast<const char*>(view.data) + view.byte_offset;
  }
  const void* if_any(py::handle x, std::initializer_list<int64_t> sizes) {
    return x.is_none() ? nullptr : of(x, sizes);
  }

  static constexpr int64_t kAny = -1;

 private:
  DType dtype_;
  bool fit_ = true;
};

// (input_norm, q, q_bias, k, k_bias, v, v_bias, o, post_norm, gate, up, down, keys, values, input_eps, post_eps, scale)
constexpr size_t kPartsOfLayer = 17;

DecoderLayer layer_of(const py::tuple& parts, const DecoderStep& step, Tensors& tensors) {
  TPK_CHECK(parts.size() == kPartsOfLayer, "decode_step: a layer must have ", kPartsOfLayer, " parts, got ",
            parts.size());
  const auto size = [](size_t n) { return static_cast<int64_t>(n); };
  const int64_t width = size(step.width), d = size(step.head_dim), length = size(step.max_length), any = Tensors::kAny;
  DecoderLayer layer{};
  size_t queries = 0, kvs = 0;
  layer.input_norm = tensors.of(parts[0], {width});
  layer.q = tensors.of(parts[1], {any, width}, &queries);
  layer.q_bias = tensors.if_any(parts[2], {size(queries)});
  layer.k = tensors.of(parts[3], {any, width}, &kvs);
  layer.k_bias = tensors.if_any(parts[4], {size(kvs)});
  layer.v = tensors.of(parts[5], {size(kvs), width});
  layer.v_bias = tensors.if_any(parts[6], {size(kvs)});
  layer.o = tensors.of(parts[7], {width, size(queries)});
  layer.post_norm = tensors.of(parts[8], {width});
  layer.gate = tensors.of(parts[9], {any, width}, &layer.inner);
  layer.up = tensors.of(parts[10], {size(layer.inner), width});
  layer.down = tensors.of(parts[11], {width, size(layer.inner)});
  layer.query_heads = queries / step.head_dim;
  layer.kv_heads = kvs / step.head_dim;
  layer.keys = const_cast<void*>(tensors.of(parts[12], {size(step.slots), size(layer.kv_heads), length, d}));
  layer.values = const_cast<void*>(tensors.of(parts[13], {size(step.slots), size(layer.kv_heads), length, d}));
  TPK_CHECK(!tensors.fit() || (layer.kv_heads > 0 && layer.query_heads % layer.kv_heads == 0),
            "decode_step: needs query heads in groups, got ", layer.query_heads, " heads and ", layer.kv_heads,
            " of keys");
  layer.input_eps = parts[14].cast<float>();
  layer.post_eps = parts[15].cast<float>();
  layer.scale = parts[16].cast<float>();
  return layer;
}

// Whether the step was made: y[rows, width] then holds its result. Otherwise nothing was changed or sent.
bool decode_step_of(const py::object& y, const py::object& x, const py::list& layers, const py::object& last_norm,
                    double last_eps, const py::object& cos, const py::object& sin, const py::object& row_slots,
                    const py::object& positions, size_t slots, size_t max_length, const py::object& address) {
  auto* const comm = static_cast<Communicator*>(PyLong_AsVoidPtr(address.ptr()));
  dlpack::View view;
  if (comm == nullptr || !view_of(x.ptr(), &view) || view.ndim != 2) return false;
  const DType dtype = dtype_of(view.dtype);
  if (dtype != DType::F32 && dtype != DType::BF16 && dtype != DType::F16) return false;
  Tensors tensors(dtype);
  const int64_t rows = view.shape[0], width = view.shape[1];
  DecoderStep step{};
  step.dtype = dtype;
  step.rows = static_cast<size_t>(rows);
  step.width = static_cast<size_t>(width);
  step.slots = slots;
  step.max_length = max_length;
  step.x = tensors.of(x, {rows, width});
  step.y = const_cast<void*>(tensors.of(y, {rows, width}));
  step.cos = tensors.of(cos, {rows, Tensors::kAny}, &step.head_dim);
  step.sin = tensors.of(sin, {rows, static_cast<int64_t>(step.head_dim)});
  step.row_slots = static_cast<const int64_t*>(tensors.of(row_slots, {rows}, DType::I64));
  step.positions = static_cast<const int64_t*>(tensors.of(positions, {rows}, DType::I64));
  step.last_norm = tensors.of(last_norm, {width});
  step.last_eps = static_cast<float>(last_eps);
  if (!tensors.fit() || step.head_dim == 0 || step.head_dim % 2 != 0) return false;
  std::vector<DecoderLayer> found;
  found.reserve(layers.size());
  for (const py::handle& layer : layers) found.push_back(layer_of(py::cast<py::tuple>(layer), step, tensors));
  if (!tensors.fit()) return false;
  py::gil_scoped_release no_gil;
  decode_step(*comm, step, found, [](size_t n, size_t grain, const std::function<void(size_t, size_t)>& body) {
    in_parallel(n, grain, body);
  });
  return true;
}

}  // namespace

void add_decode_step(py::module_& m) {
  m.def("decode_step", &decode_step_of, py::arg("y"), py::arg("x"), py::arg("layers"), py::arg("last_norm"),
        py::arg("last_eps"), py::arg("cos"), py::arg("sin"), py::arg("row_slots"), py::arg("positions"),
        py::arg("slots"), py::arg("max_length"), py::arg("address"));
}

}  // namespace tpk
