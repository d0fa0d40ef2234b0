// A stand-in for the CUDA driver, with which GPU code runs on a machine without a GPU. build.py makes it libcuda.so.1.
//
// It is meant as a strict judge. Work given to a stream runs as late as the driver's rules allow, in the thread that
// synchronises; new and freed memory holds NaNs; ranges, handles and captures are checked. Device memory is host
// memory.
//
// Variables: EPSRT_STAND_IN_DRIVER (its CUDA version, 13000), _GPUS (1), _MEMORY (bytes of a GPU, 1 GiB), _NAME,
// _CAPABILITY ("8.9"), _INIT (what cuInit returns, 0); CUDA_VISIBLE_DEVICES as ever. For the tests, by ctypes: the
// functions stand_in_* at the end.
//
// cuda.bindings looks up cuGetProcAddress_v2 and asks that for everything else, at the first call. The default stream
// is the legacy one, whatever the flags given there.
#include <dlfcn.h>

#include "machine.h"

#define API extern "C" __attribute__((visibility("default")))
#define ENTER(need)        \
  Lock lock(state.mutex); \
  TRY(enter(__func__, need))
#define ENTER_STREAM(handle) \
  ENTER(CONTEXT);            \
  FIND_STREAM(handle)

std::vector<Kernel>& stand_in::kernels() {
  static std::vector<Kernel> all;
  return all;
}

// What a kernel's code calls before a misaligned access: build.py's -fsanitize=alignment.
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void*, void*) { std::longjmp(misaligned, 1); }

// ---- the driver's functions

API int cuGetProcAddress_v2(const char* symbol, void** function, int asked, unsigned long long, int* status) {
  ENTER(NOTHING);
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&cuGetProcAddress_v2), &here);
  static void* const self = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  const std::string name = symbol;
  // A second form is older than any CUDA of today, but for one; of two functions, CUDA 13 has second forms with other
  // arguments, which are not here: then no function, rather than the first form.
  const bool second = name != "cuEventElapsedTime" || std::min(asked, version()) >= 12080;
  const bool other = asked >= 13000 && (name == "cuCtxSynchronize" || name == "cuLaunchHostFunc");
  *function = second ? dlsym(self, (name + "_v2").c_str()) : nullptr;
  if (!*function && !other && name.rfind("cu", 0) == 0) *function = dlsym(self, symbol);
  if (status) *status = !*function;
  return *function ? SUCCESS : NOT_FOUND;
}

// NVRTC loads libcuda.so.1 too, and crashes without this one; told that the driver's private tables are not here, it
// compiles as it does without a driver.
API int cuGetExportTable(const void** table, const void*) { ENTER(NOTHING); return *table = nullptr, NOT_FOUND; }

API int cuGetErrorName(int code, const char** text) {
#define NAME(name, value, _) code == value ? "CUDA_ERROR_" #name :
  *text = code == 0 ? "CUDA_SUCCESS" : ERRORS(NAME) nullptr;
  return *text ? SUCCESS : INVALID_VALUE;
}
API int cuGetErrorString(int code, const char** text) {
#define TEXT(_, value, words) code == value ? words :
  *text = code == 0 ? "no error" : ERRORS(TEXT) nullptr;
  return *text ? SUCCESS : INVALID_VALUE;
}

API int cuInit(unsigned flags) {
  ENTER(NOTHING);
  if (flags) return INVALID_VALUE;
  TRY(setting("EPSRT_STAND_IN_INIT", 0));
  if (state.devices.empty()) find_devices();
  state.initialised = !state.devices.empty();
  return state.initialised ? SUCCESS : NO_DEVICE;
}
API int cuDriverGetVersion(int* out) { ENTER(NOTHING); return *out = version(), SUCCESS; }
API int cuDeviceGetCount(int* count) { ENTER(INIT); return *count = static_cast<int>(state.devices.size()), SUCCESS; }
API int cuDeviceGet(int* device, int ordinal) {
  ENTER(INIT); return find_device(ordinal) ? (*device = ordinal, SUCCESS) : INVALID_DEVICE;
}
API int cuDeviceGetName(char* name, int length, int device) {
  ENTER(INIT);
  const char* value = std::getenv("EPSRT_STAND_IN_NAME");
  if (!find_device(device)) return INVALID_DEVICE;
  return std::snprintf(name, length, "%s", value ? value : "Stand-in GPU"), SUCCESS;
}
API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  static const std::map<int, int> attributes = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535},  // threads, block and grid
      {8, 49152}, {10, 32}, {12, 65536}, {39, 1536}, {81, 102400}, {82, 65536},  // shared memory, warp, registers
      {13, 1500000}, {36, 5000000}, {37, 128}, {38, 4 << 20},  // clocks in kHz, the bus's bits, L2's bytes
      {16, 16}, {19, 1}, {31, 1}, {40, 2}, {41, 1}, {78, 1},   // multiprocessors; and what it can do
  };
  ENTER(INIT);
  if (!find_device(device)) return INVALID_DEVICE;
  if (attribute < 1 || attribute > 200) return INVALID_VALUE;
  const auto found = attributes.find(attribute);
  *value = attribute == 75   ? capability() / 10
           : attribute == 76 ? capability() % 10
                             : (found == attributes.end() ? 0 : found->second);
  return SUCCESS;
}
API int cuDeviceTotalMem_v2(std::size_t* bytes, int device) {
  ENTER(INIT); return find_device(device) ? (*bytes = total_memory(), SUCCESS) : INVALID_DEVICE;
}
API int cuDeviceGetUuid_v2(char* uuid, int device) {
  ENTER(INIT);
  if (!find_device(device)) return INVALID_DEVICE;
  std::memcpy(uuid, "stand-in gpu   ", 16);
  uuid[15] = static_cast<char>(find_device(device)->number);
  return SUCCESS;
}

API int cuDevicePrimaryCtxRetain(Handle* context, int device) {
  ENTER(INIT);
  Device* found = find_device(device);
  return found ? (++found->retained, *context = found, SUCCESS) : INVALID_DEVICE;
}
API int cuDevicePrimaryCtxRelease_v2(int device) {
  // The real one frees what the context holds at the last release; here it stays, so that a test sees what leaks.
  ENTER(INIT);
  Device* found = find_device(device);
  if (!found) return INVALID_DEVICE;
  if (!found->retained) return INVALID_CONTEXT;
  if (found->retained == 1) drain(lock, found);
  return --found->retained, SUCCESS;
}
API int cuCtxSetCurrent(Handle context) {
  ENTER(INIT);
  Device* chosen = nullptr;
  for (Device& device : state.devices)
    if (&device == context) chosen = &device;
  if (context && !chosen) return INVALID_CONTEXT;
  if (chosen && !chosen->retained) return CONTEXT_IS_DESTROYED;
  return current = chosen, SUCCESS;
}
API int cuCtxGetCurrent(Handle* context) { ENTER(INIT); return *context = current, SUCCESS; }
API int cuCtxSynchronize() {
  ENTER(CONTEXT);
  int code = SUCCESS;
  for (const auto& capture : state.captures)  // whatever the mode and the thread
    if (capture->origin->device == current) code = invalidate(*capture, STREAM_CAPTURE_UNSUPPORTED);
  TRY(code);
  drain(lock, current);
  return state.broken;
}

API int cuStreamCreate(Handle* stream, unsigned flags) {
  ENTER(CONTEXT); return flags < 2 ? (*stream = state.streams.add({current, !flags}), SUCCESS) : INVALID_VALUE;
}
API int cuStreamCreateWithPriority(Handle* stream, unsigned flags, int) {
  ENTER(CONTEXT); return flags < 2 ? (*stream = state.streams.add({current, !flags}), SUCCESS) : INVALID_VALUE;
}
API int cuStreamDestroy_v2(Handle handle) {
  ENTER(CONTEXT);
  const auto stream = state.streams.get(handle);
  if (!stream) return INVALID_HANDLE;
  TRY(uncaptured(*stream));
  finish(lock, {stream, stream->given});
  return state.streams.erase(handle) ? SUCCESS : INVALID_HANDLE;
}
API int cuStreamSynchronize(Handle handle) {
  ENTER_STREAM(handle);
  TRY(uncaptured(*stream));
  TRY(unsafe());
  finish(lock, {stream, stream->given});
  return state.broken;
}
API int cuStreamQuery(Handle handle) {
  ENTER_STREAM(handle);
  TRY(uncaptured(*stream));
  TRY(unsafe());
  return poll(lock, {stream, stream->given});
}
API int cuStreamWaitEvent(Handle handle, Handle event, unsigned flags) {
  ENTER_STREAM(handle);
  const auto found = state.events.get(event);
  return !found ? INVALID_HANDLE : flags ? INVALID_VALUE : wait_event(stream, *found);
}
API int cuStreamBeginCapture_v2(Handle handle, int mode) {
  ENTER_STREAM(handle);
  if (mode < GLOBAL || mode > RELAXED) return INVALID_VALUE;
  if (stream == current->legacy) return STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return ILLEGAL_STATE;
  stream->capture = std::make_shared<Capture>(Capture{stream.get(), mode, {{stream.get(), 0}}});
  return state.captures.push_back(stream->capture), SUCCESS;
}
API int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER(INIT);
  if (!mode || *mode < GLOBAL || *mode > RELAXED) return INVALID_VALUE;
  return std::swap(*mode, exchanged), SUCCESS;
}
API int cuStreamEndCapture(Handle handle, Handle* graph) {
  ENTER_STREAM(handle);
  std::vector<Work> nodes;
  *graph = nullptr;
  TRY(end_capture(*stream, nodes));
  return *graph = state.graphs.add({std::move(nodes)}), SUCCESS;
}
API int cuStreamIsCapturing(Handle handle, int* status) {
  ENTER_STREAM(handle); return *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1, SUCCESS;
}

API int cuEventCreate(Handle* event, unsigned flags) {
  ENTER(CONTEXT);
  const bool untimed = flags & 2, between_processes = flags & 4;
  if (flags > 7 || (between_processes && !untimed)) return INVALID_VALUE;
  return *event = state.events.add({current, !untimed}), SUCCESS;
}
API int cuEventDestroy_v2(Handle event) { ENTER(CONTEXT); return state.events.erase(event) ? SUCCESS : INVALID_HANDLE; }
API int cuEventRecord(Handle handle, Handle on) {
  ENTER_STREAM(on);
  const auto event = state.events.get(handle);
  if (!event || event->device != current) return INVALID_HANDLE;
  if (stream->capture && stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
  if (stream->capture) return event->capture = stream->capture, event->seen = stream->seen, SUCCESS;
  TRY(submit(stream, [event, record = event->records + 1] {
    Lock lock(state.mutex);
    if (event->records == record) event->when = std::chrono::steady_clock::now();
  }));
  ++event->records;
  event->capture.reset();
  return event->mark = {stream, stream->given}, SUCCESS;
}
API int cuEventSynchronize(Handle handle) {
  ENTER(CONTEXT);
  const auto event = state.events.get(handle);
  if (!event) return INVALID_HANDLE;
  if (event->capture) return invalidate(*event->capture, CAPTURED_EVENT);
  TRY(unsafe());
  if (pending(event->mark)) finish(lock, Mark(event->mark));  // a copy: it may be recorded anew meanwhile
  return state.broken;
}
API int cuEventQuery(Handle handle) {
  ENTER(CONTEXT);
  const auto event = state.events.get(handle);
  if (!event) return INVALID_HANDLE;
  if (event->capture) return invalidate(*event->capture, CAPTURED_EVENT);
  TRY(unsafe());
  return poll(lock, Mark(event->mark));
}
API int cuEventElapsedTime(float* milliseconds, Handle start, Handle end) {
  ENTER(CONTEXT); return elapsed(milliseconds, start, end);
}
API int cuEventElapsedTime_v2(float* milliseconds, Handle start, Handle end) {
  ENTER(CONTEXT); return elapsed(milliseconds, start, end);
}

API int cuMemAlloc_v2(DevicePtr* address, std::size_t size) {
  ENTER(CONTEXT);
  void* start = nullptr;
  TRY(allocate(state.memory, size, 256, &start));
  return *address = reinterpret_cast<DevicePtr>(start), SUCCESS;
}
API int cuMemFree_v2(DevicePtr address) { ENTER(CONTEXT); return release(lock, state.memory, pointer(address)); }
API int cuMemGetInfo_v2(std::size_t* left, std::size_t* total) {
  ENTER(CONTEXT); return *total = total_memory(), *left = *total - std::min(*total, current->used), SUCCESS;
}
API int cuMemHostAlloc(void** address, std::size_t size, unsigned flags) {
  ENTER(CONTEXT); return flags < 8 ? allocate(state.pinned, size, 4096, address) : INVALID_VALUE;
}
API int cuMemAllocHost_v2(void** address, std::size_t size) {
  ENTER(CONTEXT); return allocate(state.pinned, size, 4096, address);
}
API int cuMemFreeHost(void* address) { ENTER(CONTEXT); return release(lock, state.pinned, address); }
API int cuMemcpyHtoDAsync_v2(DevicePtr to, void* from, std::size_t size, Handle stream) {
  ENTER(CONTEXT); return copy(on_device(to), on_host(from), size, stream);
}
API int cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, std::size_t size, Handle stream) {
  ENTER(CONTEXT); return copy(on_host(to), on_device(from), size, stream);
}
API int cuMemcpyDtoDAsync_v2(DevicePtr to, DevicePtr from, std::size_t size, Handle stream) {
  ENTER(CONTEXT); return copy(on_device(to), on_device(from), size, stream);
}
API int cuMemcpyHtoD_v2(DevicePtr to, void* from, std::size_t size) {
  ENTER(CONTEXT); return copy_now(lock, on_device(to), on_host(from), size);
}
API int cuMemcpyDtoH_v2(void* to, DevicePtr from, std::size_t size) {
  ENTER(CONTEXT); return copy_now(lock, on_host(to), on_device(from), size);
}
API int cuMemsetD8Async(DevicePtr to, unsigned char value, std::size_t count, Handle stream) {
  ENTER(CONTEXT); return fill(to, value, count, stream);
}
API int cuMemsetD32Async(DevicePtr to, unsigned value, std::size_t count, Handle stream) {
  ENTER(CONTEXT); return fill(to, value, count, stream);
}

API int cuModuleLoadData(Handle* module, const void* image) { ENTER(CONTEXT); return load_module(module, image); }
API int cuModuleLoadDataEx(Handle* module, const void* image, unsigned, int*, void**) {
  ENTER(CONTEXT); return load_module(module, image);
}
API int cuModuleUnload(Handle module) {
  ENTER(CONTEXT);
  TRY(unsafe());
  drain(lock, current);
  return state.modules.erase(module) ? SUCCESS : INVALID_HANDLE;
}
API int cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  ENTER(CONTEXT);
  const auto found = state.modules.get(module);
  if (!found) return INVALID_HANDLE;
  for (const Kernel& kernel : stand_in::kernels())
    if (std::string(kernel.name) == name) return *function = &*found->functions.emplace(name, &kernel).first, SUCCESS;
  return NOT_FOUND;
}
API int cuFuncGetAttribute(int* value, int attribute, Handle function) {
  ENTER(CONTEXT);
  const Kernel* kernel = find_function(function).second;
  if (!kernel) return INVALID_HANDLE;
  if (attribute < 0 || attribute > 20) return INVALID_VALUE;
  const bool version_of_code = attribute == 5 || attribute == 6;
  return *value = attribute == 0 ? kernel->max_threads : version_of_code ? capability() : 0, SUCCESS;
}
API int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, Handle handle, void** params, void** extra) {
  ENTER_STREAM(handle);
  const auto [module, kernel] = find_function(function);
  if (!kernel) return INVALID_HANDLE;
  if (extra) return NOT_SUPPORTED;
  if (!gx || !gy || !gz || gx > 2147483647u || gy > 65535 || gz > 65535 || shared > 49152) return INVALID_VALUE;
  if (!bx || !by || !bz || bx > 1024 || by > 1024 || bz > 64) return INVALID_VALUE;
  if (bx * by * bz > static_cast<unsigned>(kernel->max_threads)) return INVALID_VALUE;
  if (kernel->parameters && !params) return INVALID_VALUE;
  const Launch launch = kernel->prepare({gx, gy, gz}, {bx, by, bz}, params);
  const std::weak_ptr<Module> weak = module;
  return submit(stream, [launch, weak, kernel = kernel] { run_kernel(*kernel, launch, weak); });
}
API int cuLaunchHostFunc(Handle handle, void (*function)(void*), void* data) {
  ENTER_STREAM(handle);
  if (!function) return INVALID_VALUE;
  return submit(stream, [=] {  // in another thread, as the driver's: who waits with Python's lock held waits for ever
    std::thread([=] { in_host_function = true, function(data); }).join();
  });
}

API int cuGraphInstantiateWithFlags(Handle* exec, Handle graph, unsigned long long flags) {
  ENTER(CONTEXT);
  const auto found = state.graphs.get(graph);
  return found && flags < 16 ? (*exec = state.execs.add({found->nodes}), SUCCESS) : INVALID_VALUE;
}
API int cuGraphGetNodes(Handle graph, Handle* nodes, std::size_t* count) {
  ENTER(CONTEXT);
  const auto found = state.graphs.get(graph);
  if (!found) return INVALID_VALUE;
  const std::size_t all = found->nodes.size();
  for (std::size_t i = 0; nodes && i < *count; ++i) nodes[i] = i < all ? &found->nodes[i] : nullptr;
  return *count = nodes ? std::min(*count, all) : all, SUCCESS;
}
API int cuGraphUpload(Handle exec, Handle on) {
  ENTER_STREAM(on); return state.execs.get(exec) ? uncaptured(*stream) : INVALID_VALUE;
}
API int cuGraphLaunch(Handle handle, Handle on) {
  ENTER_STREAM(on);
  const auto exec = state.execs.get(handle);
  if (!exec) return INVALID_VALUE;
  TRY(uncaptured(*stream));
  const auto work = [exec] {
    for (const Work& node : exec->nodes)
      if (!state.broken) node();
  };
  TRY(submit(stream, work, {exec->last}));
  return exec->last = {stream, stream->given}, SUCCESS;
}
API int cuGraphDestroy(Handle graph) { ENTER(CONTEXT); return state.graphs.erase(graph) ? SUCCESS : INVALID_VALUE; }
API int cuGraphExecDestroy(Handle exec) { ENTER(CONTEXT); return state.execs.erase(exec) ? SUCCESS : INVALID_VALUE; }

// ---- for the tests

API long long stand_in_launches(const char* kernel) {  // how often it has run, replays included
  Lock lock(state.mutex);
  return state.launches[kernel];
}
API long long stand_in_count(const char* function) {  // how often it was called; its whole name: "cuMemAlloc_v2"
  Lock lock(state.mutex);
  return state.calls[function];
}
API long long stand_in_live_bytes() {
  Lock lock(state.mutex);
  long long bytes = 0;
  for (const Device& device : state.devices) bytes += static_cast<long long>(device.used);
  return bytes;
}
API long long stand_in_live(const char* kind) {  // -1 of an unknown kind; "host" and "device" count allocations
  Lock lock(state.mutex);
  const std::map<std::string, std::size_t> live = {
      {"streams", state.streams.size()}, {"events", state.events.size()}, {"graphs", state.graphs.size()},
      {"execs", state.execs.size()},     {"modules", state.modules.size()}, {"host", state.pinned.size()},
      {"device", state.memory.size()}};
  const auto found = live.find(kind);
  return found == live.end() ? -1 : static_cast<long long>(found->second);
}
API void stand_in_fail(const char* function, int times, int code) {  // its next calls return `code` and do nothing
  Lock lock(state.mutex);
  state.failures[function] = {times, code};
}
