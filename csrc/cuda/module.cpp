// The Python module of the CUDA backend. Importing it adds kernels for CUDA tensors to torch.ops.tpkernels, whose
// schemas come with the CPU module.
#include "python_device.h"
#include "scoped_op.h"
#include "torch_side/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(tpkernels, CUDA, m) { tpk::register_kernels<tpk::cuda::ScopedOp>(m); }

STABLE_TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("device_arena_empty", TORCH_BOX(&tpk::device_arena_empty));
}

PYBIND11_MODULE(_C_cuda, m) {
  using namespace tpk;
  m.doc() = "CUDA groups of tpkernels; importing this module gives torch.ops.tpkernels its CUDA kernels.";
  add_basics(m);
  cuda::add_device_groups(m);
  m.def("limits", [] {
    py::dict limits;
    cuda::add_device_limits(limits);
    return limits;
  });
}
