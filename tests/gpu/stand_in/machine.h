// What stands behind the stand-in's functions: streams and the work they hold, memory, captures, devices.
// driver.cpp alone includes it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>

#include "emulate.h"

#define ERRORS(X)                                                                                             \
  X(INVALID_VALUE, 1, "invalid argument") X(OUT_OF_MEMORY, 2, "out of memory")                                \
  X(NOT_INITIALIZED, 3, "initialization error") X(NO_DEVICE, 100, "no CUDA-capable device is detected")       \
  X(INVALID_DEVICE, 101, "invalid device ordinal") X(INVALID_IMAGE, 200, "device kernel image is invalid")    \
  X(INVALID_CONTEXT, 201, "invalid device context")                                                           \
  X(NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device")                       \
  X(INVALID_HANDLE, 400, "invalid resource handle")                                                           \
  X(ILLEGAL_STATE, 401, "the operation cannot be performed in the present state")                             \
  X(NOT_FOUND, 500, "named symbol not found") X(NOT_READY, 600, "device not ready")                           \
  X(ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                         \
  X(CONTEXT_IS_DESTROYED, 709, "context is destroyed") X(MISALIGNED_ADDRESS, 716, "misaligned address")       \
  X(LAUNCH_FAILED, 719, "unspecified launch failure") X(NOT_PERMITTED, 800, "operation not permitted")        \
  X(NOT_SUPPORTED, 801, "operation not supported")                                                            \
  X(SYSTEM_DRIVER_MISMATCH, 803, "system has unsupported display driver / cuda driver combination")           \
  X(STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")                      \
  X(STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")               \
  X(STREAM_CAPTURE_MERGE, 902, "operation would merge two captures")                                          \
  X(STREAM_CAPTURE_UNMATCHED, 903, "capture was not begun in this stream")                                    \
  X(STREAM_CAPTURE_UNJOINED, 904, "capturing stream has unjoined work")                                       \
  X(STREAM_CAPTURE_ISOLATION, 905, "dependency on uncaptured work in another stream")                         \
  X(STREAM_CAPTURE_IMPLICIT, 906, "the legacy stream would depend on a capturing stream")                     \
  X(CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capture")                    \
  X(STREAM_CAPTURE_WRONG_THREAD, 908, "capture was begun in another thread") X(UNKNOWN, 999, "unknown error")

namespace {

#define ENUMERATOR(name, code, text) name = code,
enum : int { SUCCESS = 0, ERRORS(ENUMERATOR) };

#define TRY(expression) \
  if (const int error_ = (expression)) return error_
#define FIND_STREAM(handle)       \
  std::shared_ptr<Stream> stream; \
  TRY(find_stream(handle, stream))

using stand_in::Kernel;
using stand_in::Launch;
using Lock = std::unique_lock<std::mutex>;
using Work = std::function<void()>;
using DevicePtr = unsigned long long;
using Handle = void*;  // the address of what it names

struct Stream;
struct Device {
  int number;        // among all, the hidden ones too
  int retained = 0;  // of its primary context, which has this Device's address
  std::size_t used = 0;
  std::shared_ptr<Stream> legacy = {};
};

struct Mark {  // a place in a stream's order: the first `ticket` pieces of its work
  std::shared_ptr<Stream> stream;
  long long ticket = 0;
};
struct Task {
  Work work;
  std::vector<Mark> after;
};

enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };
using Clock = std::map<Stream*, long long>;  // how many nodes of each stream
struct Capture {
  Stream* origin;
  int mode;
  Clock given;
  bool invalid = false;
  std::vector<Work> nodes = {};  // in the order given, which is one of those that the real graph allows
  std::thread::id thread = std::this_thread::get_id();
};
struct Stream {
  Device* device;
  bool blocking;  // ordered with the legacy stream
  std::deque<Task> queue = {};
  long long given = 0, done = 0;
  bool running = false;
  int polls = 0;
  std::shared_ptr<Capture> capture = {};
  Clock seen = {};  // the captured nodes that its next one comes after
};
struct Event {
  Device* device;
  bool timed;
  Mark mark = {};
  long long records = 0;
  std::chrono::steady_clock::time_point when = {};
  std::shared_ptr<Capture> capture = {};  // where it was recorded last, if in a capture
  Clock seen = {};
};
struct Graph {
  std::vector<Work> nodes;
  Mark last = {};  // of an executable one: a launch comes after the one before it, whatever the streams
};
struct Module {
  std::map<std::string, const Kernel*> functions = {};  // a function's handle is the address of its entry
};
struct Block {
  std::size_t size, alignment;
  Device* device;
};
using Blocks = std::map<char*, Block>;

template <class T>
struct Table : std::map<Handle, std::shared_ptr<T>> {
  Handle add(T thing) {
    auto owned = std::make_shared<T>(std::move(thing));
    (*this)[owned.get()] = owned;
    return owned.get();
  }
  std::shared_ptr<T> get(Handle handle) const {
    const auto found = this->find(handle);
    return found == this->end() ? nullptr : found->second;
  }
};

struct State {
  std::mutex mutex;  // guards all of this, and is not held while a stream's work runs
  std::condition_variable progress;
  bool initialised = false;
  std::deque<Device> devices;
  Table<Stream> streams;
  Table<Event> events;
  Table<Graph> graphs, execs;
  Table<Module> modules;
  Blocks memory, pinned;
  std::vector<std::shared_ptr<Capture>> captures;
  std::atomic<int> broken{0};  // the error of a kernel or copy that ran: every later call returns it
  std::map<std::string, long long> calls, launches;
  std::map<std::string, std::pair<int, int>> failures;  // times, code
};
State& state = *new State;  // never destroyed: threads may still be in here when the process ends

thread_local Device* current = nullptr;
thread_local bool in_host_function = false;
thread_local int exchanged = GLOBAL;  // this thread's mode, beside those of captures
thread_local std::jmp_buf misaligned;

constexpr std::size_t GUARD = 256;  // bytes before and after each allocation, which no kernel may write
constexpr char GUARD_BYTE = '\xA5';
constexpr int POLLS = 1000;  // queries of a stream until it does some work, so that a loop of them ends

long long setting(const char* name, long long otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoll(value) : otherwise;
}
int version() { return static_cast<int>(setting("EPSRT_STAND_IN_DRIVER", 13000)); }
std::size_t total_memory() { return setting("EPSRT_STAND_IN_MEMORY", 1LL << 30); }

enum Need { NOTHING, INIT, CONTEXT };
int enter(const char* name, Need need) {
  ++state.calls[name];
  if (in_host_function && need != NOTHING) return NOT_PERMITTED;
  if (auto& [times, code] = state.failures[name]; times > 0) return --times, code;
  if (need != NOTHING && !state.initialised) return NOT_INITIALIZED;
  if (need != CONTEXT) return SUCCESS;
  return !current ? INVALID_CONTEXT : !current->retained ? CONTEXT_IS_DESTROYED : state.broken.load();
}

void fault(int code, const std::string& text) {
  std::fprintf(stderr, "stand-in: %s\n", text.c_str());
  state.broken = code;
}

// ---- running work

void finish(Lock& lock, const Mark& mark) {
  Stream& stream = *mark.stream;
  while (stream.done < mark.ticket) {
    if (stream.running) {  // by another thread
      state.progress.wait(lock);
      continue;
    }
    stream.running = true;
    const Task task = std::move(stream.queue.front());
    stream.queue.pop_front();
    for (const Mark& before : task.after) finish(lock, before);  // all given before this task: no cycles
    if (!state.broken && task.work) {
      lock.unlock();
      task.work();
      lock.lock();
    }
    ++stream.done;
    stream.running = false;
    stream.polls = 0;
    state.progress.notify_all();
  }
}

bool pending(const Mark& mark) { return mark.stream && mark.stream->done < mark.ticket; }

int poll(Lock& lock, const Mark& mark) {
  if (pending(mark) && ++mark.stream->polls < POLLS) return NOT_READY;
  if (pending(mark)) finish(lock, mark);
  return state.broken;
}

void drain(Lock& lock, const Device* device) {
  std::vector<Mark> marks = {{device->legacy, device->legacy->given}};
  for (const auto& [_, stream] : state.streams)
    if (stream->device == device) marks.push_back({stream, stream->given});
  for (const Mark& mark : marks) finish(lock, mark);
}

int invalidate(Capture& capture, int code) { return capture.invalid = true, code; }

// For calls that a capture does not see. The driver forbids them meanwhile: in the thread that captures unless relaxed,
// in every other thread if global, unless that thread has exchanged its own mode. Its manual names few of them; here they
// are all that allocate, free, load, wait or ask.
int unsafe() {
  int code = SUCCESS;
  for (const auto& capture : state.captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool forbidden = own ? capture->mode != RELAXED && exchanged != RELAXED
                               : capture->mode == GLOBAL && exchanged == GLOBAL;
    if (forbidden) code = invalidate(*capture, STREAM_CAPTURE_UNSUPPORTED);
  }
  return code;
}

int uncaptured(const Stream& stream) {
  return stream.capture ? invalidate(*stream.capture, STREAM_CAPTURE_UNSUPPORTED) : SUCCESS;
}

int find_stream(Handle handle, std::shared_ptr<Stream>& stream) {
  const auto legacy = reinterpret_cast<Handle>(1);
  stream = !handle || handle == legacy ? current->legacy : state.streams.get(handle);
  return stream && stream->device == current ? SUCCESS : INVALID_HANDLE;
}

int submit(const std::shared_ptr<Stream>& stream, Work work, std::vector<Mark> after = {}) {
  if (Capture* capture = stream->capture.get()) {
    if (capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    capture->nodes.push_back(std::move(work));
    stream->seen[stream.get()] = ++capture->given[stream.get()];
    return SUCCESS;
  }
  const Device& device = *stream->device;
  if (stream == device.legacy) {
    int code = SUCCESS;
    for (const auto& capture : state.captures)
      for (const auto& [member, _] : capture->given)
        if (member->blocking && member->device == &device) code = invalidate(*capture, STREAM_CAPTURE_IMPLICIT);
    TRY(code);
    for (const auto& [_, other] : state.streams)
      if (other->blocking && other->device == &device) after.push_back({other, other->given});
  } else if (stream->blocking) {
    after.push_back({device.legacy, device.legacy->given});
  }
  after.erase(std::remove_if(after.begin(), after.end(), [](auto& mark) { return !pending(mark); }), after.end());
  stream->queue.push_back({std::move(work), std::move(after)});
  ++stream->given;
  return SUCCESS;
}

// ---- memory

void* pointer(DevicePtr address) { return reinterpret_cast<void*>(address); }

Blocks::value_type* find_block(Blocks& blocks, const void* start, std::size_t size = 1) {
  const auto p = static_cast<char*>(const_cast<void*>(start));
  auto block = blocks.upper_bound(p);
  if (block == blocks.begin()) return nullptr;
  --block;
  return p + size <= block->first + block->second.size ? &*block : nullptr;
}

void check_guards(const Blocks::value_type& block, const std::string& who) {
  const auto whole = [](const char* p) { return std::all_of(p, p + GUARD, [](char c) { return c == GUARD_BYTE; }); };
  const auto& [start, about] = block;
  if (!whole(start - GUARD) || !whole(start + about.size))
    fault(ILLEGAL_ADDRESS, who + " wrote beside an allocation of " + std::to_string(about.size) + " bytes");
}

int allocate(Blocks& blocks, std::size_t size, std::size_t alignment, void** out) {  // alignment >= GUARD
  TRY(unsafe());
  if (!out || !size) return INVALID_VALUE;
  const std::size_t total = total_memory(), whole = (size + 2 * alignment + GUARD) / alignment * alignment;
  if (size > total || (&blocks == &state.memory && current->used > total - size)) return OUT_OF_MEMORY;
  auto* base = static_cast<char*>(std::aligned_alloc(alignment, whole));
  if (!base) return OUT_OF_MEMORY;
  std::memset(base, GUARD_BYTE, whole);
  std::memset(base + alignment, 0xFF, size);
  blocks[base + alignment] = {size, alignment, current};
  if (&blocks == &state.memory) current->used += size;
  *out = base + alignment;
  return SUCCESS;
}

int release(Lock& lock, Blocks& blocks, void* start) {
  TRY(unsafe());
  auto block = blocks.find(static_cast<char*>(start));
  if (block == blocks.end()) return INVALID_VALUE;
  drain(lock, block->second.device);
  block = blocks.find(static_cast<char*>(start));
  if (block == blocks.end()) return INVALID_VALUE;  // another thread freed it meanwhile
  check_guards(*block, "something");
  const auto [size, alignment, device] = block->second;
  std::memset(block->first, 0xFF, size);
  std::free(block->first - alignment);
  if (&blocks == &state.memory) device->used -= size;
  blocks.erase(block);
  return state.broken;
}

struct Range {
  Blocks* blocks;  // where it must lie: &state.memory; or where it may, if it is pinned: &state.pinned
  void* start;
};
Range on_device(DevicePtr address) { return {&state.memory, pointer(address)}; }
Range on_host(void* address) { return {&state.pinned, address}; }

bool live(const std::vector<Range>& ranges, std::size_t size) {
  Lock lock(state.mutex);
  for (const Range& range : ranges)
    if (!find_block(*range.blocks, range.start, size)) return false;
  return true;
}

int copy(Range to, Range from, std::size_t size, Handle handle) {
  FIND_STREAM(handle);
  if (!size) return SUCCESS;
  std::vector<Range> needed;  // still there when it runs, which may be a replay much later
  for (const Range& range : {to, from}) {
    const bool found = find_block(*range.blocks, range.start, size);
    if (!range.start || (range.blocks == &state.memory && !found)) return INVALID_VALUE;
    if (found) needed.push_back(range);
  }
  std::shared_ptr<std::string> staged;  // a pageable source is read at the call, but in a capture
  if (!find_block(*from.blocks, from.start, size) && !stream->capture)
    staged = std::make_shared<std::string>(static_cast<char*>(from.start), size);
  return submit(stream, [=] {
    if (!live(needed, size)) return fault(ILLEGAL_ADDRESS, "a copy uses memory that was freed");
    std::memmove(to.start, staged ? staged->data() : from.start, size);
  });
}

int copy_now(Lock& lock, Range to, Range from, std::size_t size) {
  TRY(unsafe());
  TRY(copy(to, from, size, nullptr));  // on the legacy stream: it does not wait for non-blocking streams
  finish(lock, {current->legacy, current->legacy->given});
  return state.broken;
}

template <class Value>
int fill(DevicePtr to, Value value, std::size_t count, Handle handle) {
  FIND_STREAM(handle);
  auto* start = static_cast<Value*>(pointer(to));
  if (!count) return SUCCESS;
  if (to % sizeof(Value) || !find_block(state.memory, start, count * sizeof(Value))) return INVALID_VALUE;
  return submit(stream, [=] {
    if (!live({on_device(to)}, count * sizeof(Value))) return fault(ILLEGAL_ADDRESS, "a memset of freed memory");
    std::fill_n(start, count, value);
  });
}

// ---- kernels

bool run_aligned(const Launch& launch) {
  if (setjmp(misaligned)) return false;
  launch.run();
  return true;
}

void run_kernel(const Kernel& kernel, const Launch& launch, const std::weak_ptr<Module>& module) {
  const std::string name = std::string("kernel ") + kernel.name;
  Lock lock(state.mutex);
  if (module.expired()) return fault(LAUNCH_FAILED, name + ": its module was unloaded");
  for (const void* p : launch.pointers)
    if (p && !find_block(state.memory, p) && !find_block(state.pinned, p))
      return fault(ILLEGAL_ADDRESS, name + ": a pointer leads to no memory of a GPU");
  lock.unlock();
  const bool aligned = run_aligned(launch);
  lock.lock();
  if (!aligned) return fault(MISALIGNED_ADDRESS, name + ": an access is not aligned to its type");
  ++state.launches[kernel.name];
  for (const void* p : launch.pointers)
    for (Blocks* blocks : {&state.memory, &state.pinned})
      if (const auto* block = find_block(*blocks, p)) check_guards(*block, name);
}

std::pair<std::shared_ptr<Module>, const Kernel*> find_function(Handle handle) {
  for (const auto& [_, module] : state.modules)
    for (const auto& entry : module->functions)
      if (&entry == handle) return {module, entry.second};
  return {};
}

int load_module(Handle* module, const void* image) {
  TRY(unsafe());
  return module && image ? (*module = state.modules.add({}), SUCCESS) : INVALID_VALUE;
}

// ---- captures and events

int wait_event(const std::shared_ptr<Stream>& stream, const Event& event) {
  const auto& capture = event.capture;
  if (!capture && !event.mark.stream) return SUCCESS;  // never recorded
  if (!capture && stream->capture) return invalidate(*stream->capture, STREAM_CAPTURE_ISOLATION);
  if (!capture) return submit(stream, nullptr, {event.mark});
  if (stream->capture && stream->capture != capture)
    return invalidate(*capture, 0), invalidate(*stream->capture, STREAM_CAPTURE_MERGE);
  if (!std::count(state.captures.begin(), state.captures.end(), capture)) return CAPTURED_EVENT;  // that capture ended
  if (capture->invalid) return STREAM_CAPTURE_INVALIDATED;
  if (stream == stream->device->legacy) return invalidate(*capture, STREAM_CAPTURE_IMPLICIT);
  stream->capture = capture;
  capture->given.emplace(stream.get(), 0);
  for (const auto& [other, ticket] : event.seen) stream->seen[other] = std::max(stream->seen[other], ticket);
  return SUCCESS;
}

int end_capture(Stream& stream, std::vector<Work>& nodes) {
  const auto capture = stream.capture;
  if (!capture) return ILLEGAL_STATE;
  if (capture->origin != &stream) return STREAM_CAPTURE_UNMATCHED;
  if (capture->mode != RELAXED && capture->thread != std::this_thread::get_id()) return STREAM_CAPTURE_WRONG_THREAD;
  bool joined = true;
  for (const auto& [member, given] : capture->given) joined = joined && stream.seen[member] >= given;
  for (const auto& [member, _] : capture->given) member->capture.reset(), member->seen.clear();
  state.captures.erase(std::find(state.captures.begin(), state.captures.end(), capture));
  nodes = std::move(capture->nodes);
  return capture->invalid ? STREAM_CAPTURE_INVALIDATED : joined ? SUCCESS : STREAM_CAPTURE_UNJOINED;
}

int elapsed(float* milliseconds, Handle start, Handle end) {
  const auto first = state.events.get(start), last = state.events.get(end);
  for (const auto& event : {first, last})
    if (!event || !event->timed || !event->mark.stream || event->capture) return INVALID_HANDLE;
  if (pending(first->mark) || pending(last->mark)) return NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(last->when - first->when).count();
  return SUCCESS;
}

// ---- devices

Device* find_device(int ordinal) {
  return ordinal >= 0 && ordinal < static_cast<int>(state.devices.size()) ? &state.devices[ordinal] : nullptr;
}

int capability() {  // 89 of "8.9"
  int major = 8, minor = 9;
  if (const char* value = std::getenv("EPSRT_STAND_IN_CAPABILITY")) std::sscanf(value, "%d.%d", &major, &minor);
  return 10 * major + minor;
}

void find_devices() {
  const int gpus = static_cast<int>(setting("EPSRT_STAND_IN_GPUS", 1));
  std::vector<int> visible;
  if (const char* value = std::getenv("CUDA_VISIBLE_DEVICES")) {
    std::istringstream list(value);  // read up to the first that is no GPU, as the driver does
    for (int number; list >> number && number >= 0 && number < gpus; list.ignore(1)) visible.push_back(number);
  } else {
    for (int i = 0; i < gpus; ++i) visible.push_back(i);
  }
  for (const int number : visible) {
    Device& device = state.devices.emplace_back(Device{number});
    device.legacy = std::make_shared<Stream>(Stream{&device, true});
  }
}

}  // namespace
