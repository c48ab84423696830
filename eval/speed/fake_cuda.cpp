// For a CPU-only build of PyTorch, loaded before it: a device guard that does nothing and hooks that say that CUDA is there, so that
// autograd runs on fake CUDA tensors. A CUDA build has both.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
const c10::Device first(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return first; }
  c10::Device getDevice() const override { return first; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, first); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, first); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

// PyTorch looks for hooks of this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};
}

namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }

extern "C" bool install() {
  static Guard guard;
  if (!c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  return at::detail::getCUDAHooks().hasCUDA();
}
