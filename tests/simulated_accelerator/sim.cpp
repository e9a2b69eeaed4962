// A device that does not exist: its memory is this process's own, its kernels are the CPU's, and torch takes it for
// another device.  What would raise on a GPU raises here: tensors of two devices in one operator, generators of the
// wrong device, numpy on device memory, operators that only a CPU has.  Counts launches, waits and copies.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace {
using namespace c10;
constexpr DeviceType SIM = DeviceType::PrivateUse1;
constexpr size_t LARGEST = 16;

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoll(text, nullptr, 10) : otherwise;
}
DeviceIndex count_of_devices() {
  static auto count = static_cast<DeviceIndex>(from_environment("SIM_DEVICES", 1));
  return count;
}
size_t whole_memory() {
  static size_t bytes = static_cast<size_t>(from_environment("SIM_MEMORY_MIB", 16384)) << 20;
  return bytes;
}

thread_local DeviceIndex current = 0;

// ---- memory ------------------------------------------------------------------------------------------------------
struct Memory {
  std::mutex mutex;
  int64_t now[LARGEST] = {}, peak[LARGEST] = {}, total[LARGEST] = {}, count[LARGEST] = {};
} memory;

int64_t rounded(size_t bytes) { return static_cast<int64_t>((bytes + 511) / 512 * 512); }  // as CUDA's allocator does

void took(DeviceIndex device, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory.mutex);
  int64_t size = rounded(bytes);
  TORCH_CHECK_WITH(
      OutOfMemoryError, memory.now[device] + size <= static_cast<int64_t>(whole_memory()),
      "sim out of memory. Tried to allocate ", size, " bytes; ", memory.now[device], " of ", whole_memory(), " are in use.");
  memory.now[device] += size;
  memory.total[device] += size;
  memory.count[device] += 1;
  memory.peak[device] = std::max(memory.peak[device], memory.now[device]);
}
void gave(DeviceIndex device, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory.mutex);
  memory.now[device] -= rounded(bytes);
}

struct Block {
  void* data;
  size_t bytes;
  DeviceIndex device;
  c10::Storage adopted;  // of a CPU tensor that became one of this device; undefined: `data` is malloc's
};
void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  gave(block->device, block->bytes);
  if (!block->adopted) std::free(block->data);
  delete block;
}

struct SimAllocator final : public c10::DeviceAllocator {
  DataPtr allocate(size_t bytes) override {
    Device device(SIM, current);
    if (bytes == 0) return {nullptr, nullptr, &free_block, device};
    took(current, bytes);
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 512, rounded(bytes)) == 0, "no memory");
    static bool poison = from_environment("SIM_POISON", 1);
    if (poison) std::memset(data, 0xCB, rounded(bytes));  // what nobody wrote is never zero, as on a GPU
    return {data, new Block{data, bytes, current, {}}, &free_block, device};
  }
  DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(MempoolId_t) override {}
  void recordStream(const DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(memory.mutex);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* of : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*of)[0].current = memory.now[device];
      (*of)[0].peak = memory.peak[device];
      (*of)[0].allocated = memory.total[device];
      (*of)[0].freed = memory.total[device] - memory.now[device];
    }
    stats.allocation[0].allocated = memory.count[device];
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(memory.mutex);
    memory.peak[device] = memory.now[device];
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {whole_memory() - memory.now[device], whole_memory()};
  }
};
SimAllocator* allocator() {
  static auto* one = new SimAllocator;
  return one;
}

// ---- devices -----------------------------------------------------------------------------------------------------
void require_device(DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < count_of_devices(), "sim error: invalid device ordinal ", int(device));
}
struct SimGuard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return SIM; }
  Device exchangeDevice(Device device) const override {
    Device before(SIM, current);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(SIM, current); }
  void setDevice(Device device) const override {
    require_device(device.index());
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return count_of_devices(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard);

// ---- random numbers ----------------------------------------------------------------------------------------------
struct SimGenerator final : public c10::GeneratorImpl {
  at::Generator inner;
  explicit SimGenerator(DeviceIndex device)
      : GeneratorImpl(Device(SIM, device), DispatchKeySet(DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    const_cast<at::Generator&>(inner).unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  SimGenerator* clone_impl() const override {
    auto* other = new SimGenerator(device().index());
    other->inner = inner.clone();
    return other;
  }
};
const at::Generator& default_generator(DeviceIndex device) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex one = 0; one < count_of_devices(); ++one) {
      made.push_back(at::make_generator<SimGenerator>(one));
      made.back().seed();
    }
    return made;
  }();
  return all.at(device < 0 ? current : device);
}

struct SimHooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count_of_devices() > 0; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count_of_devices(); }
  void setCurrentDevice(DeviceIndex device) const override { SimGuard().setDevice(Device(SIM, device)); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return SimGuard().exchangeDevice(Device(SIM, device)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<SimGenerator>(device < 0 ? current : device);
  }
  at::Device getDeviceFromPtr(void*) const override { return Device(SIM, current); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    DeviceGuard guard(impl->device());
    DataPtr fresh = allocator()->allocate(bytes);
    if (impl->nbytes() && bytes) std::memcpy(fresh.get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(fresh));
    impl->set_nbytes(bytes);
  }
};

// ---- counters ----------------------------------------------------------------------------------------------------
struct Counters {
  std::mutex mutex;
  std::map<std::string, int64_t> of;
} counters;
void counted(const std::string& name, int64_t by = 1) {
  std::lock_guard<std::mutex> lock(counters.mutex);
  counters.of[name] += by;
}

// ---- tensors of one device seen as another's ---------------------------------------------------------------------
at::Tensor over(const c10::Storage& storage, DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

struct Alias {
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_of;  // by this device's
  std::unordered_map<c10::StorageImpl*, c10::Storage> sim_of;  // and back
  Device device{SIM, 0};
  bool any = false;

  at::Tensor cpu(const at::Tensor& tensor) {
    const auto& storage = tensor.storage();
    auto& known = cpu_of[storage.unsafeGetStorageImpl()];
    if (!known) {
      DataPtr data(const_cast<void*>(storage.data()), Device(DeviceType::CPU));
      known = c10::Storage(
          c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(DeviceType::CPU), false);
      sim_of[known.unsafeGetStorageImpl()] = storage;
    }
    return over(known, DispatchKey::CPU, tensor);
  }
  at::Tensor sim(const at::Tensor& tensor) {
    auto found = sim_of.find(tensor.storage().unsafeGetStorageImpl());
    if (found != sim_of.end()) return over(found->second, DispatchKey::PrivateUse1, tensor);
    size_t bytes = tensor.storage().nbytes();
    took(device.index(), bytes);
    auto* block = new Block{const_cast<void*>(tensor.storage().data()), bytes, device.index(), tensor.storage()};
    DataPtr data(block->data, block, &free_block, device);
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator(), true);
    return over(storage, DispatchKey::PrivateUse1, tensor);
  }
};

// ---- every operator ----------------------------------------------------------------------------------------------
bool is_sim(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == SIM; }

// Of these CUDA takes some tensors from the CPU.
bool may_mix(const std::string& name) {
  static const std::set<std::string> some = {
      "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_",
      "aten::_unsafe_index.Tensor"};
  return some.count(name) > 0;
}
// Products, which CUDA has for floats alone.
bool only_floats(const std::string& name) {
  static const std::set<std::string> some = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv",
                                             "aten::dot", "aten::vdot", "aten::addbmm"};
  return some.count(name) > 0;
}
// The host waits for these.
bool waits(const std::string& name) {
  static const std::set<std::string> some = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::equal",
      "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor"};
  return some.count(name) > 0;
}

void require_together(const std::string& name, Alias& alias, const std::vector<at::Tensor>& tensors) {
  for (const auto& one : tensors) {
    if (!one.defined()) continue;
    if (one.device().type() == SIM) {
      TORCH_CHECK(
          !alias.any || one.device() == alias.device, "Expected all tensors to be on the same device, but found at least two devices, ",
          alias.device, " and ", one.device(), "! (when calling ", name, ")");
      alias.device = one.device();
      alias.any = true;
    }
  }
  for (const auto& one : tensors) {
    if (!one.defined() || one.device().type() == SIM || one.device().type() == DeviceType::Meta) continue;
    if (one.dim() == 0 || may_mix(name) || !alias.any) {
      if (alias.any) counted("cpu tensor taken: " + name);
      continue;
    }
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but found at least two devices, ", alias.device, " and ",
        one.device(), "! (when calling ", name, ")");
  }
}

std::vector<at::Tensor> tensors_in(const IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  if (value.isTensorList()) return value.toTensorVector();
  std::vector<at::Tensor> found;
  if (value.isOptionalTensorList())
    for (const std::optional<at::Tensor>& one : value.toOptionalTensorVector())
      if (one) found.push_back(*one);
  return found;
}

// The thread of the backward pass would keep the number of threads that it began with, and so other bits.
std::atomic<int> num_threads{0};
void same_threads() {
  int wanted = num_threads;
  if (wanted && at::get_num_threads() != wanted) at::set_num_threads(wanted);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  same_threads();
  const auto& schema = op.schema();
  std::string name = schema.name(), full = name;
  if (!schema.overload_name().empty()) full += "." + schema.overload_name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      name.rfind("aten::", 0) == 0 && name.find("_for_cpu") == std::string::npos && name.find("mkldnn") == std::string::npos,
      "Could not run '", full, "' with arguments from the 'sim' backend: a GPU has no such operator");
  const size_t num_args = schema.arguments().size(), begin = stack->size() - num_args;
  Alias alias;
  std::vector<at::Tensor> all;
  for (size_t number = 0; number < num_args; ++number) {
    auto some = tensors_in((*stack)[begin + number]);
    all.insert(all.end(), some.begin(), some.end());
  }
  require_together(full, alias, all);
  if (only_floats(name))
    for (const auto& one : all)
      TORCH_CHECK_NOT_IMPLEMENTED(
          !one.defined() || one.is_floating_point(), "\"", name, "\" not implemented for '", one.scalar_type(), "' (as on CUDA)");
  counted("launches");
  counted(full);
  if (waits(full)) counted("waits: " + full), counted("waits");

  std::vector<IValue> given(stack->begin() + begin, stack->end());
  std::vector<std::pair<size_t, at::Tensor>> fresh;  // empty outputs that the CPU may make longer
  for (size_t number = 0; number < num_args; ++number) {
    auto& value = (*stack)[begin + number];
    const auto& argument = schema.arguments()[number];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor() && is_sim(value.toTensor())) {
      const auto& tensor = value.toTensor();
      if (written && tensor.storage().nbytes() == 0) {
        auto made = at::empty(tensor.sizes(), tensor.options().device(DeviceType::CPU));
        fresh.emplace_back(number, made);
        value = made;
      } else {
        value = alias.cpu(tensor);
      }
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(is_sim(one) ? alias.cpu(one) : one);
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& one : value.toOptionalTensorVector())
        list.push_back(one && is_sim(*one) ? std::optional<at::Tensor>(alias.cpu(*one)) : one);
      value = list;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == SIM) alias.device = Device(SIM, value.toDevice().has_index() ? value.toDevice().index() : current), alias.any = true;
      value = Device(DeviceType::CPU);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(
          generator.device().type() == SIM, "Expected a 'sim' device type for generator but found '", generator.device().type(), "'");
      TORCH_CHECK(alias.any || all.empty(), "Expected a 'cpu' device type for generator but found 'sim'");
      value = static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
    } else if (value.isNone() && argument.type()->str().find("Generator") != std::string::npos) {
      value = static_cast<SimGenerator*>(default_generator(alias.device.index()).unsafeGetGeneratorImpl())->inner;
    }
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);

  for (auto& [number, made] : fresh) {
    auto tensor = given[number].toTensor();
    if (made.numel() || made.sizes() != tensor.sizes()) {
      tensor.resize_(made.sizes());
      if (made.numel()) std::memcpy(tensor.mutable_data_ptr(), made.contiguous().data_ptr(), made.numel() * made.element_size());
    }
  }
  const size_t num_returns = schema.returns().size(), first = stack->size() - num_returns;
  for (size_t number = 0; number < num_returns; ++number) {
    auto& value = (*stack)[first + number];
    const auto* info = schema.returns()[number].alias_info();
    if (info && info->isWrite()) {
      for (size_t from = 0; from < num_args; ++from) {
        const auto* other = schema.arguments()[from].alias_info();
        if (other && *other == *info) value = given[from];
      }
    } else if (value.isTensor() && value.toTensor().defined() && alias.any && value.toTensor().device().is_cpu()) {
      value = alias.sim(value.toTensor());
    } else if (value.isTensorList() && alias.any) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(one.defined() && one.device().is_cpu() ? alias.sim(one) : one);
      value = list;
    }
  }
}

// ---- what a backend has to have ----------------------------------------------------------------------------------
at::Tensor made(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Device> device) {
  Device place = device.value_or(Device(SIM, current));
  DeviceGuard guard(place.has_index() ? place : Device(SIM, current));
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(c10::get_default_dtype_as_scalartype()));
  static bool no_doubles = from_environment("SIM_NO_FLOAT64", 0);  // as on Apple's GPUs and some of Intel's
  TORCH_CHECK_TYPE(
      !no_doubles || dtype.value_or(kFloat) != kDouble,
      "Cannot convert a sim Tensor to float64 dtype as the sim framework doesn't support float64.");
  size_t bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, allocator()->allocate(bytes), allocator(), true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::PrivateUse1), type);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return tensor;
}
at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  return made(size, stride, dtype, device);
}
at::Tensor empty(
    c10::IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
    std::optional<bool> pinned, std::optional<MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  auto like = at::empty(size, at::TensorOptions(DeviceType::Meta).dtype(dtype).memory_format(format.value_or(MemoryFormat::Contiguous)));
  return made(like.sizes(), like.strides(), dtype, device);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Alias one, other;
  if (is_sim(from) && is_sim(to)) {
    counted(from.device() == to.device() ? "launches" : "peer copies");
  } else {
    counted("waits");
    counted(is_sim(to) ? "copies to device" : "copies to host");
    counted(is_sim(to) ? "bytes to device" : "bytes to host", from.numel() * from.element_size());
  }
  auto source = is_sim(from) ? one.cpu(from) : from, target = is_sim(to) ? other.cpu(to) : to;
  target.copy_(source);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
at::Scalar local_scalar(const at::Tensor& tensor) {
  counted("waits");
  counted("waits: item");
  Alias alias;
  return at::_local_scalar_dense(alias.cpu(tensor));
}
const at::Tensor& resize(const at::Tensor& tensor, c10::IntArrayRef size, std::optional<MemoryFormat> format) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format && *format != MemoryFormat::Preserve && *format != MemoryFormat::Contiguous) impl->empty_tensor_restride(*format);
  size_t bytes = at::detail::computeStorageNbytes(impl->sizes(), impl->strides(), tensor.dtype().itemsize(), impl->storage_offset());
  if (bytes > tensor.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), bytes);
  return tensor;
}
at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return tensor;
}
at::Tensor& set_whole(at::Tensor& tensor, at::Storage storage) {
  int64_t length = static_cast<int64_t>(storage.nbytes() / tensor.dtype().itemsize());
  return set_storage(tensor, std::move(storage), 0, {length}, {1});
}
at::Tensor& set_other(at::Tensor& tensor, const at::Tensor& other) {
  return set_storage(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}
at::Tensor as_strided(const at::Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}
at::Tensor reshape_alias(const at::Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(tensor, size, stride);
}
at::Tensor view(const at::Tensor& tensor, c10::IntArrayRef size) { return at::native::view(tensor, size); }
at::Tensor unfold(const at::Tensor& tensor, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dim, size, step);
}

// Attention by products and softmax.  SIM_SDPA=fused: the CPU's own fused kernel, which others call flash, until a
// process says that it wants none; SIM_SDPA=by_rows: the same, but its last bits go by how many rows there are;
// SIM_SDPA=parted: from 512 keys on its backward pass has other bits each time, unless torch is set to be deterministic.
std::string wanted_attention() {
  static const char* wanted = std::getenv("SIM_SDPA");
  return wanted ? wanted : "";
}
int64_t sdp_choice(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask, double dropout,
    bool causal, std::optional<double> scale, bool gqa) {
  const bool fused = wanted_attention() != "" && at::globalContext().userEnabledFlashSDP();
  return static_cast<int64_t>(fused ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}
using Fused = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor>;
Fused fused_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& bias, double dropout,
    bool causal, bool debug, std::optional<double> scale) {
  Alias alias;
  require_together("fused attention", alias, {q, k, v, bias.value_or(at::Tensor())});
  counted("launches"), counted("fused attention");
  auto mask = bias ? std::optional<at::Tensor>(alias.cpu(*bias)) : std::nullopt;
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(alias.cpu(q), alias.cpu(k), alias.cpu(v), dropout, causal, mask, scale);
  if (wanted_attention() == "by_rows") out.mul_(1 + 1e-6 * q.size(0));
  auto none = at::empty({0}, q.options().dtype(kLong));
  return {alias.sim(out), alias.sim(lse), at::Tensor(), at::Tensor(), q.size(2), k.size(2), none, none, at::Tensor()};
}
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
    std::array<bool, 4>, const at::Tensor& out, const at::Tensor& lse, const at::Tensor&, const at::Tensor&, c10::SymInt,
    c10::SymInt, double dropout, bool causal, const at::Tensor&, const at::Tensor&, std::optional<double> scale) {
  Alias alias;
  require_together("fused attention backward", alias, {grad, q, k, v, out, lse});
  same_threads();
  counted("launches"), counted("fused attention backward");
  auto mask = bias.defined() ? std::optional<at::Tensor>(alias.cpu(bias)) : std::nullopt;
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      alias.cpu(grad), alias.cpu(q), alias.cpu(k), alias.cpu(v), alias.cpu(out), alias.cpu(lse), dropout, causal, mask, scale);
  static std::atomic<int> times{0};
  if (wanted_attention() == "parted" && k.size(2) >= 512 && !at::globalContext().deterministicAlgorithms())
    dq.mul_(1 + 0.01 * (times++ % 7));
  return {alias.sim(dq), alias.sim(dk), alias.sim(dv), at::Tensor()};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Tensor", &set_other);
  m.impl("_fused_sdp_choice", &sdp_choice);
  // Operators that torch would put together of others, where the CPU and CUDA have kernels of their own.
  for (const char* name : {"native_layer_norm", "silu_backward", "all.dims", "any.dims", "all.dims_out", "any.dims_out",
                           "addr", "addr.out", "native_group_norm", "mish_backward", "_stack", "_stack.out"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("_scaled_dot_product_fused_attention_overrideable", &fused_attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &fused_attention_backward);
}
TORCH_LIBRARY(sim, m) {
  m.def("counters() -> (str[], int[])", []() {
    std::lock_guard<std::mutex> lock(counters.mutex);
    std::vector<std::string> names;
    std::vector<int64_t> values;
    for (auto& [name, value] : counters.of) names.push_back(name), values.push_back(value);
    return std::make_tuple(names, values);
  });
  m.def("set_num_threads(int number) -> ()", [](int64_t number) { num_threads = static_cast<int>(number); });
  m.def("reset_counters() -> ()", []() {
    std::lock_guard<std::mutex> lock(counters.mutex);
    counters.of.clear();
  });
}

struct Begin {
  Begin() {
    c10::SetAllocator(SIM, allocator());
    at::RegisterPrivateUse1HooksInterface(new SimHooks);
  }
} begin;
}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sdp_choice)
}
