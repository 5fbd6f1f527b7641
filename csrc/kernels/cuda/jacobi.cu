#include <cmath>

#include "kernels/cuda/jacobi.h"
#include "kernels/cuda/jacobi_finish.cuh"
#include "kernels/cuda/jacobi_load.cuh"
#include "kernels/cuda/jacobi_rotate.cuh"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {
namespace {

constexpr const char* kOp = "jacobi_svd";

void check(const JacobiParams& params) {
  FIPS_CHECK(params.dtype == DType::kFloat32 || params.dtype == DType::kFloat64, kOp, ": dtype is ",
             dtype_name(params.dtype), "; expected float32 or float64");
  FIPS_CHECK(params.batch >= 0 && params.vectors >= 1 && params.vectors <= kJacobiMaxVectors &&
                 params.length >= params.vectors && params.length <= (1 << 20),
             kOp, ": got ", params.batch, " matrices of ", params.vectors, " x ", params.length,
             "; rows may be 1 to ", kJacobiMaxVectors, ", and no more than columns");
}

JacobiPlan plan_of(const JacobiParams& params) {
  const DeviceInfo device = current_device();
  const JacobiPlan plan =
      plan_jacobi(params.batch, static_cast<int>(params.vectors), static_cast<int>(params.length),
                  params.left != nullptr, params.dtype, device);
  FIPS_CHECK(plan.groups > 0, kOp, ": rows of ", params.length, " ", dtype_name(params.dtype),
             " elements are too long; two rows with their left vectors must fit in ",
             device.max_shared_bytes, " bytes of shared memory");
  return plan;
}

int64_t row_bytes(const JacobiParams& params, const JacobiPlan& plan) {
  return params.batch * params.vectors * plan.stride * element_size(params.dtype);
}

template <class T>
JacobiTask<T> make_task(const JacobiParams& params, const JacobiPlan& plan, void* workspace) {
  char* const memory = static_cast<char*>(workspace);
  JacobiTask<T> task{};
  task.matrices = static_cast<const T*>(params.matrices);
  task.left = static_cast<T*>(params.left);
  task.values = static_cast<T*>(params.values);
  task.right = static_cast<T*>(params.right);
  task.rows = static_cast<T*>(workspace);
  task.states = reinterpret_cast<JacobiState*>(memory + row_bytes(params, plan));
  task.rotated = reinterpret_cast<int32_t*>(task.states + params.batch);
  task.vectors = static_cast<int>(params.vectors);
  task.length = static_cast<int>(params.length);
  // What rounding leaves of a product of orthogonal rows is of this size.
  const double epsilon = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
  task.tolerance =
      static_cast<T>(epsilon * std::fmax(4.0, std::sqrt(static_cast<double>(params.length))));
  task.plan = plan;
  return task;
}

template <class T>
void run_rounds(JacobiTask<T> task, int64_t batch, Stream stream) {
  const LaunchShape shape{batch * (task.plan.groups / 2), task.plan.warps * kWarpSize,
                          task.plan.shared_bytes};
  const int rounds = task.plan.groups - 1;
  for (int i = 0; i < task.plan.sweeps * rounds; ++i) {
    task.sweep = i / rounds;
    task.round = i % rounds;
    launch<jacobi_round_kernel<T>>(kOp, shape, task, stream);
  }
}

template <class T>
void run(const JacobiParams& params, const JacobiPlan& plan, void* workspace, Stream stream) {
  const JacobiTask<T> task = make_task<T>(params, plan, workspace);
  const int finish_bytes = FinishMemory<T>::bytes(task.vectors, task.length);
  FIPS_CHECK(finish_bytes <= current_device().max_shared_bytes, kOp, ": rows of ", params.length,
             " elements are too long");
  launch<jacobi_load_kernel<T>>(
      kOp, {params.batch, kJacobiLoadThreads, kJacobiLoadThreads * int{sizeof(double)}}, task,
      stream);
  if (plan.groups == 2) {
    launch<jacobi_resident_kernel<T>>(
        kOp, {params.batch, plan.warps * kWarpSize, plan.shared_bytes}, task, stream);
  } else {
    run_rounds(task, params.batch, stream);
  }
  launch<jacobi_finish_kernel<T>>(kOp, {params.batch, kJacobiFinishThreads, finish_bytes}, task,
                                  stream);
}

}  // namespace

int64_t jacobi_workspace_bytes(const JacobiParams& params) {
  check(params);
  const JacobiPlan plan = plan_of(params);
  return row_bytes(params, plan) +
         params.batch * (int64_t{sizeof(JacobiState)} + plan.sweeps * int64_t{sizeof(int32_t)});
}

void jacobi_svd(const JacobiParams& params, void* workspace, Stream stream) {
  check(params);
  if (params.batch == 0) {
    return;
  }
  const JacobiPlan plan = plan_of(params);
  if (params.dtype == DType::kFloat64) {
    run<double>(params, plan, workspace, stream);
  } else {
    run<float>(params, plan, workspace, stream);
  }
}

}  // namespace fips::cuda
