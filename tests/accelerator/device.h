// The stand-in's memory, streams and random numbers.
#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <cstdlib>

namespace accel {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

constexpr auto OURS = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
constexpr int DEVICES = 2;
constexpr int64_t PAGE = 512;  // allocations are rounded up to it, as CUDA's are

bool ours(const Tensor& t) { return t.defined() && t.device().type() == OURS; }
bool on_host(const Tensor& t) { return t.defined() && t.device().type() == c10::kCPU; }

// ---- what happens is told to a listener in Python -------------------------------------------------------------------
enum Kind { LAUNCH, WAIT, TO_HOST, TO_DEVICE };
using Listener = void (*)(int kind, const char* operation, int64_t bytes);
std::atomic<Listener> listener{nullptr};

void tell(Kind kind, const std::string& operation, int64_t bytes) {
  if (Listener told = listener.load()) told(kind, operation.c_str(), bytes);
}

// ---- memory: counted for each device, with a limit ------------------------------------------------------------------
struct Memory {
  std::atomic<int64_t> used{0}, peak{0}, limit{0}, count{0};
};
std::array<Memory, DEVICES> memory;
// What a device that compiles graphs may lack: shapes that depend on values, float64.
enum Refused { REFUSED_SHAPES = 1, REFUSED_DOUBLES = 2 };
std::atomic<int> refused{0};
std::atomic<int> visible{0};  // devices; none while no test wants them
thread_local DeviceIndex current = 0;

struct Piece {
  void* data;
  int64_t size;
  DeviceIndex device;
};

void release(void* context) {
  auto* piece = static_cast<Piece*>(context);
  memory[piece->device].used -= piece->size;
  std::free(piece->data);
  delete piece;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const Device device(OURS, current);
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    auto& here = memory[current];
    const int64_t size = (bytes + PAGE - 1) / PAGE * PAGE, limit = here.limit;
    TORCH_CHECK_WITH(OutOfMemoryError, !limit || here.used + size <= limit, "accel out of memory. Tried to allocate ",
                     size, " bytes; ", here.used.load(), " of ", limit, " are in use");
    void* data = std::aligned_alloc(PAGE, size);
    TORCH_CHECK(data, "the host has no memory for the stand-in");
    const int64_t used = here.used += size;
    for (int64_t peak = here.peak; used > peak && !here.peak.compare_exchange_weak(peak, used);) {}
    ++here.count;
    return {data, new Piece{data, size, current}, &release, device};
  }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};
Allocator allocator;

// ---- devices, streams (of which there is one), random numbers -------------------------------------------------------
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return OURS; }
  Device exchangeDevice(Device wanted) const override {
    const Device before(OURS, current);
    uncheckedSetDevice(wanted);
    return before;
  }
  Device getDevice() const override { return {OURS, current}; }
  void setDevice(Device wanted) const override { uncheckedSetDevice(wanted); }
  void uncheckedSetDevice(Device wanted) const noexcept override {
    if (wanted.index() >= 0) current = wanted.index();
  }
  c10::Stream getStream(Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(OURS, d.index() < 0 ? current : d.index()));
  }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override { *event = &visible; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell(WAIT, "synchronize", 0); }
  void synchronizeEvent(void*) const override { tell(WAIT, "synchronize", 0); }
  void synchronizeDevice(DeviceIndex) const override { tell(WAIT, "synchronize", 0); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, DeviceIndex) const override { return 0; }
  // Of all there may be: the autograd engine asks once, at the first backward pass of the process.
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex index) : c10::GeneratorImpl({OURS, index}, KEYS) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* made = new Generator(device().index());
    made->inner = inner.clone();
    return made;
  }
};

at::Generator& generator(DeviceIndex index) {
  static std::array<at::Generator, DEVICES> all{at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return all.at(index < 0 ? current : index);
}
at::Generator& inner(const at::Generator& g) { return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->inner; }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return visible > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return visible; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index < 0 ? current : index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  Device getDeviceFromPtr(void*) const override { return {OURS, current}; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};
}  // namespace accel
