// A CUDA device that is none: tensors say cuda, lie in the host's memory and are computed by PyTorch's CPU kernels.
// Every operation is checked for tensors of another device, counted, and recorded into a graph; one that waits is told.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::DispatchKey, c10::IValue, c10::Storage, c10::Stream;
using std::optional, std::string;

namespace at::native {
int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) { return 0; }
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &plain_attention)
}  // namespace at::native

namespace {
int64_t number(const char* name, int64_t otherwise) {
  return std::getenv(name) ? std::atoll(std::getenv(name)) : otherwise;
}

const int64_t TOTAL = number("SIMCUDA_MEMORY", int64_t{1} << 34);  // bytes that the device has
const auto COUNT = static_cast<DeviceIndex>(number("SIMCUDA_DEVICES", 1));  // of which each process of a job has its own
const Device CUDA(DeviceType::CUDA, static_cast<DeviceIndex>(COUNT > 1 ? number("LOCAL_RANK", 0) : 0)), CPU(DeviceType::CPU);
thread_local Stream stream(Stream::DEFAULT, CUDA);
std::atomic<int64_t> live{0}, peak{0}, launches{0};  // bytes, bytes, kernels
py::function* listener = nullptr;                    // is told the name of what the host waits for
std::vector<std::function<void()>>* recording = nullptr;

void waits(const string& name) {
  TORCH_CHECK(recording == nullptr, "CUDA error: operation not permitted when stream is capturing (", name, ")");
  if (listener == nullptr || !Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  (*listener)(name);
}

void check(Device device) {
  TORCH_CHECK(device.index() < 0 || device.index() == CUDA.index(), "CUDA error: ", device, " is another process's");
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override { return check(device), CUDA; }
  Device getDevice() const override { return CUDA; }
  void setDevice(Device device) const override { check(device); }
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream; }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, CUDA); }
  Stream exchangeStream(Stream next) const override { return std::exchange(stream, next); }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { waits("event"); }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

c10::DataPtr owning(Storage host) {  // the memory of a CUDA storage is that of a CPU's
  TORCH_CHECK_WITH(OutOfMemoryError, live + static_cast<int64_t>(host.nbytes()) <= TOTAL,
                   "CUDA out of memory. Tried to allocate ", host.nbytes(), " bytes. The device has ", TOTAL, ".");
  if ((live += host.nbytes()) > peak) peak = live.load();
  auto gone = [](void* kept) {
    live -= static_cast<Storage*>(kept)->nbytes();
    delete static_cast<Storage*>(kept);
  };
  return {host.mutable_data(), new Storage(host), gone, CUDA};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    return owning(Storage(Storage::use_byte_size_t(), size, c10::GetAllocator(DeviceType::CPU), true));
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} allocator;

struct Generator final : at::CPUGeneratorImpl {
  Generator() { pose(CUDA); }
  void pose(Device as) {
    device_ = as;
    key_set_ = c10::DispatchKeySet(as.is_cpu() ? DispatchKey::CPU : DispatchKey::CUDA);
  }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return COUNT; }
  DeviceIndex current_device() const override { return CUDA.index(); }
  DeviceIndex getCurrentDevice() const override { return CUDA.index(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const auto made = at::make_generator<Generator>();
    return made;
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Generator>(); }
};

Tensor over(const Tensor& like, Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor hosted(const Tensor& t) {
  auto* kept = static_cast<Storage*>(t.storage().data_ptr().get_context());
  auto none = [] { return Storage(Storage::use_byte_size_t(), 0, c10::GetAllocator(DeviceType::CPU), true); };
  return t.is_cuda() ? over(t, kept ? *kept : none(), DispatchKey::CPU) : t;
}

Tensor lifted(const Tensor& t) {
  auto storage = Storage(Storage::use_byte_size_t(), t.storage().nbytes(), owning(t.storage()), &allocator, true);
  return over(t, storage, DispatchKey::CUDA);
}

IValue mapped(const IValue& value, const std::function<Tensor(const Tensor&)>& of_defined) {
  auto change = [&](const Tensor& t) { return t.defined() ? of_defined(t) : t; };
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(change(t));
    return list;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
    c10::List<optional<Tensor>> list;
    for (const IValue& item : value.toListRef())
      list.push_back(item.isNone() ? std::nullopt : optional<Tensor>(change(item.toTensor())));
    return list;
  }
  return value;
}

std::vector<Tensor> tensors(const IValue& value) {
  std::vector<Tensor> found;
  mapped(value, [&](const Tensor& t) { return found.push_back(t), t; });
  return found;
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  op.callBoxed(stack);
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  static const std::set<string> waiting{"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal"};
  const auto& schema = op.schema();
  const string name = schema.name().substr(schema.name().find("::") + 2);
  const bool indexes = name.rfind("index", 0) == 0 || name.rfind("_index_put", 0) == 0 || name == "_unsafe_index";
  auto given = torch::jit::pop(*stack, schema.arguments().size());
  if (waiting.count(name) || (name == "repeat_interleave" && given.back().isNone())) waits(name);
  std::vector<std::pair<Tensor, Tensor>> aliases;  // on the device, on the host
  std::vector<Generator*> posing;
  for (size_t i = 0; i < given.size(); ++i) {
    const auto& argument = schema.arguments()[i];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    const bool free = indexes && argument.name() == "indices";  // copied to the device for you
    given[i] = mapped(given[i], [&](const Tensor& t) {
      if (!t.is_cuda()) {
        TORCH_CHECK(free || (t.dim() == 0 && !written), "Expected all tensors to be on the same device, but found at ",
                    "least two devices, cuda:0 and ", t.device(), "! (", name, ")");
        if (free) waits(name + " by an index on the host");
        return t;
      }
      for (auto& [device, host] : aliases)
        if (device.is_same(t)) return host;
      return aliases.emplace_back(t, hosted(t)).second;
    });
    if (given[i].isDevice()) given[i] = CPU;
    if (given[i].isNone() && argument.type()->str() == "Generator?")
      given[i] = at::globalContext().defaultGenerator(CUDA);
    if (given[i].isGenerator()) {
      posing.push_back(dynamic_cast<Generator*>(given[i].toGenerator().unsafeGetGeneratorImpl()));
      TORCH_CHECK(posing.back(), "Expected a 'cuda' device type for generator but found 'cpu'");
    }
  }
  for (auto* generator : posing) generator->pose(CPU);
  stack->insert(stack->end(), given.begin(), given.end());
  run(op, stack);
  for (auto* generator : posing) generator->pose(CUDA);
  const auto first = stack->end() - schema.returns().size();
  const auto* alias = schema.returns().empty() ? nullptr : schema.returns()[0].alias_info();
  const bool views = alias != nullptr && !alias->isWrite();
  launches += !views;
  if (recording != nullptr && !views)
    recording->push_back([op, given, made = torch::jit::Stack(first, stack->end())] {
      torch::jit::Stack again(given);
      run(op, &again);
      for (size_t i = 0; i < made.size(); ++i)
        for (size_t n = 0; n < tensors(made[i]).size(); ++n) tensors(made[i])[n].copy_(tensors(again[i])[n]);
    });
  for (auto& [device, host] : aliases) {  // one that was resized
    if (host.storage().data() != device.storage().data()) {
      device.storage().set_data_ptr_noswap(owning(host.storage()));
      device.storage().set_nbytes(host.storage().nbytes());
    }
    if (host.sizes() != device.sizes())
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
  for (auto place = first; place != stack->end(); ++place)
    *place = mapped(*place, [&](const Tensor& t) {
      for (auto& [device, host] : aliases)
        if (host.is_same(t)) return device;
      for (auto& [device, host] : aliases)
        if (t.storage().is_alias_of(host.storage())) return over(t, device.storage(), DispatchKey::CUDA);
      return t.is_cpu() ? lifted(t) : t;
    });
}

Tensor empty(c10::SymIntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device> device,
             optional<bool>, optional<at::MemoryFormat> format) {
  check(device.value_or(CUDA));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, optional<at::ScalarType> dtype,
                     optional<at::Layout>, optional<Device> device, optional<bool>) {
  check(device.value_or(CUDA));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& set_at(Tensor& self, Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device() == CUDA, "Attempted to set the storage of a tensor on CUDA to one on the CPU");
  auto* made = self.unsafeGetTensorImpl();
  made->set_storage_keep_dtype(std::move(source));
  made->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole(Tensor& self, Storage source) {
  const c10::SymInt one = 1, length = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_at(self, std::move(source), 0, c10::SymIntArrayRef(&length, 1), c10::SymIntArrayRef(&one, 1));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && to.numel() > 0 && !non_blocking)
    waits(to.is_cuda() ? "copy to device" : "copy to host");
  auto step = [to = hosted(to), from = hosted(from)] {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    to.copy_(from);
  };
  step();
  if (recording != nullptr) recording->push_back(step);
  return ++launches, to;
}

at::Scalar local_scalar_dense(const Tensor& self) { return waits("item"), at::_local_scalar_dense(hosted(self)); }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_at);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
}

struct Graph {
  std::vector<std::function<void()>> steps;
};
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  // PyTorch has looked for hooks already: ours take the place of those that do nothing, and have as little data.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  if (COUNT > 1) {  // what processes send each other, they send by the CPU's backend
    static torch::Library sent(torch::Library::IMPL, "c10d", DispatchKey::CUDA, __FILE__, __LINE__);
    for (auto name : {"allreduce_", "allreduce_coalesced_", "broadcast_", "_allgather_base_", "_reduce_scatter_base_",
                      "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "barrier"})
      sent.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
  m.def("listen", [](py::function heard) { listener = new py::function(std::move(heard)); });
  m.def("generator", [] { return at::globalContext().defaultGenerator(CUDA); });
  m.def("launches", [] { return launches.load(); });
  m.def("memory", [] { return std::make_pair(live.load(), peak.load()); });
  m.def("reset_peak", [] { peak = live.load(); });
  m.def("resize", [](Storage storage, size_t size) {
    Storage host(Storage::use_byte_size_t(), size, c10::GetAllocator(DeviceType::CPU), true);
    if (const size_t kept = std::min(size, storage.nbytes())) std::memcpy(host.mutable_data(), storage.data(), kept);
    storage.set_data_ptr_noswap(owning(host));
    storage.set_nbytes(size);
  });
  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("record", [](Graph& graph, bool on) { recording = on ? &graph.steps : nullptr; })
      .def("replay", [](Graph& graph) { for (auto& step : graph.steps) step(); });
}
