#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/element_type.h"
#include "kernels/cuda/launch.cuh"

namespace fips::cuda {
namespace {

constexpr int kThreads = 256;

struct ActivationTask {
  void* up;
  void* gate;          // or null
  const void* grad_h;  // backward only
  void* h;             // backward: or null
  int64_t count;
  Activation activation;
  bool wide;  // 16-byte accesses are aligned
};

template <class T>
FIPS_DEVICE Chunk<T> load_at(const void* base, int64_t first, int count, bool wide) {
  const T* source = static_cast<const T*>(base) + first;
  return wide && count == Chunk<T>::kSize ? *reinterpret_cast<const Chunk<T>*>(source)
                                          : load_chunk_narrow(source, count);
}

template <class T>
FIPS_DEVICE void store_at(void* base, int64_t first, const Chunk<T>& chunk, int count, bool wide) {
  T* target = static_cast<T*>(base) + first;
  if (wide && count == Chunk<T>::kSize) {
    *reinterpret_cast<Chunk<T>*>(target) = chunk;
    return;
  }
  FIPS_UNROLL
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    if (i < count) {
      target[i] = chunk.element[i];
    }
  }
}

// One chunk of elements a thread.
struct Share {
  int64_t first;
  int count;
};

template <class T>
FIPS_DEVICE Share share_of(const ActivationTask& task) {
  const int64_t first = (block_index() * kThreads + thread_index()) * Chunk<T>::kSize;
  return {first, static_cast<int>(max_of(0, min_of(Chunk<T>::kSize, task.count - first)))};
}

template <class T>
FIPS_KERNEL(kThreads, 4)
activation_forward_kernel(const ActivationTask task) {
  const Share share = share_of<T>(task);
  Chunk<T> h = load_at<T>(task.up, share.first, share.count, task.wide);
  if (task.gate != nullptr) {
    const Chunk<T> gate = load_at<T>(task.gate, share.first, share.count, task.wide);
    FIPS_UNROLL
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      h.element[i] = from_float<T>(activate<T>(task.activation, to_float(gate.element[i])) *
                                   to_float(h.element[i]));
    }
  } else {
    FIPS_UNROLL
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      h.element[i] = from_float<T>(activate<T>(task.activation, to_float(h.element[i])));
    }
  }
  store_at(task.h, share.first, h, share.count, task.wide);
}

template <class T>
FIPS_KERNEL(kThreads, 4)
activation_backward_kernel(const ActivationTask task) {
  constexpr bool kFast = sizeof(T) == 2;
  const Share share = share_of<T>(task);
  const Chunk<T> grad_h = load_at<T>(task.grad_h, share.first, share.count, task.wide);
  Chunk<T> up = load_at<T>(task.up, share.first, share.count, task.wide), gate{}, h{};
  if (task.gate != nullptr) {
    gate = load_at<T>(task.gate, share.first, share.count, task.wide);
  }
  FIPS_UNROLL
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    const float dh = to_float(grad_h.element[i]), u = to_float(up.element[i]);
    if (task.gate != nullptr) {
      const ActivationValue act =
          activate_with_slope<kFast>(task.activation, to_float(gate.element[i]));
      h.element[i] = from_float<T>(act.value * u);
      up.element[i] = from_float<T>(dh * act.value);
      gate.element[i] = from_float<T>(dh * u * act.slope);
    } else {
      const ActivationValue act = activate_with_slope<kFast>(task.activation, u);
      h.element[i] = from_float<T>(act.value);
      up.element[i] = from_float<T>(dh * act.slope);
    }
  }
  store_at(task.up, share.first, up, share.count, task.wide);
  if (task.gate != nullptr) {
    store_at(task.gate, share.first, gate, share.count, task.wide);
  }
  if (task.h != nullptr) {
    store_at(task.h, share.first, h, share.count, task.wide);
  }
}

ActivationTask make_task(const ActivationParams& p) {
  const bool wide = is_aligned(p.up, 16) && is_aligned(p.gate, 16) && is_aligned(p.grad_h, 16) &&
                    is_aligned(p.h, 16);
  return {p.up, p.gate, p.grad_h, p.h, p.count, p.activation, wide};
}

template <class T>
LaunchShape launch_shape(const ActivationParams& p) {
  return {ceil_div(p.count, int64_t{kThreads} * Chunk<T>::kSize), kThreads};
}

}  // namespace

void activation_forward(const ActivationParams& params, Stream stream) {
  with_element_type("activation", params.dtype, [&](auto element) {
    using T = decltype(element);
    launch<activation_forward_kernel<T>>("activation", launch_shape<T>(params), make_task(params),
                                         stream);
  });
}

void activation_backward(const ActivationParams& params, Stream stream) {
  with_element_type("activation", params.dtype, [&](auto element) {
    using T = decltype(element);
    launch<activation_backward_kernel<T>>("activation", launch_shape<T>(params), make_task(params),
                                          stream);
  });
}

}  // namespace fips::cuda
