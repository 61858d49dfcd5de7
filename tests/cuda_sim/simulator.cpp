#include "simulator.h"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef EFFNET_FAST_OS_THREADS
#include <barrier>
#include <memory>
#include <thread>
#else
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#endif

namespace simulator {

EFFNET_FAST_PER_THREAD Index thread_index{};
EFFNET_FAST_PER_THREAD Index block_index{};
Index block_size{};
float* shared_memory = nullptr;
Order order = kForward;
long last_blocks = LONG_MAX;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 99 << 10;  // what a block may have on every GPU from compute capability 8.0 on

std::string skipped_file;
int skipped_line = 0;

bool is_skipped(const char* file, int line) {
  if (line != skipped_line) return false;
  const char* slash = std::strrchr(file, '/');
  return skipped_file == (slash ? slash + 1 : file);
}

// Shared memory of exactly the size asked for, so that AddressSanitizer sees its end.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : floats_(bytes / sizeof(float)) { shared_memory = floats_.data(); }
  void poison() { std::fill(floats_.begin(), floats_.end(), NAN); }

 private:
  std::vector<float> floats_;
};

void check(long blocks, int threads, size_t shared_bytes) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes)
    throw std::runtime_error("launch: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads with " + std::to_string(shared_bytes) + " bytes of shared memory");
}

}  // namespace

void skip_barrier(const char* file, int line) {
  skipped_file = file;
  skipped_line = line;
}

#ifdef EFFNET_FAST_OS_THREADS

namespace {
std::unique_ptr<std::barrier<>> block_barrier;
}

void barrier(const char* file, int line) {
  if (!is_skipped(file, line)) block_barrier->arrive_and_wait();
}

void run(long blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  check(blocks, threads, shared_bytes);
  SharedMemory memory(shared_bytes);
  block_size = {(unsigned)threads};
  block_barrier = std::make_unique<std::barrier<>>(threads);
  for (long block = std::max(0L, blocks - last_blocks); block < blocks; ++block) {
    memory.poison();
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back([&, t] {
        thread_index = {(unsigned)t};
        block_index = {(unsigned)block};
        kernel();
      });
    for (auto& thread : running) thread.join();
  }
}

#else

namespace {

// Fibers live as long as the process and are used again by every block: makecontext once, then jumps, which need no
// system call.
struct Fiber {
  ucontext_t context;
  jmp_buf state;
  bool started = false, done = true;
  const char* file = nullptr;  // of the barrier that it waits at
  int line = 0;
};

constexpr size_t kStackBytes = 64 << 10;
std::vector<Fiber> fibers(kMaxThreads);
jmp_buf scheduler;
int current;
const std::function<void()>* body;

void yield() {
  if (!_setjmp(fibers[current].state)) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*body)();
    fibers[current].done = true;
    yield();
  }
}

void resume(int t) {
  static char* stacks = (char*)mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  Fiber& fiber = fibers[t];
  current = t;
  thread_index = {(unsigned)t};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + kStackBytes * t;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

// Runs every fiber up to its next barrier. Returns whether any is left.
bool run_to_barrier(const std::vector<int>& turns) {
  for (int t : turns) resume(t);
  const Fiber& first = fibers[turns[0]];
  for (int t : turns) {
    const Fiber& fiber = fibers[t];
    if (fiber.done != first.done || (!fiber.done && (fiber.line != first.line || std::strcmp(fiber.file, first.file)))) {
      for (int other : turns) fibers[other].started = false;  // the block is given up
      throw std::runtime_error(std::string("__syncthreads: threads of a block part at ") + first.file + ":" +
                               std::to_string(first.line));
    }
  }
  return !first.done;
}

}  // namespace

void barrier(const char* file, int line) {
  if (is_skipped(file, line)) return;
  fibers[current].file = file;
  fibers[current].line = line;
  yield();
}

void run(long blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  check(blocks, threads, shared_bytes);
  SharedMemory memory(shared_bytes);
  block_size = {(unsigned)threads};
  body = &kernel;
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == kReverse) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(threads);
  for (long block = std::max(0L, blocks - last_blocks); block < blocks; ++block) {
    block_index = {(unsigned)block};
    memory.poison();
    for (int t = 0; t < threads; ++t) fibers[t].done = false;
    do {
      if (order == kRandom) std::shuffle(turns.begin(), turns.end(), random);
    } while (run_to_barrier(turns));
  }
}

#endif

}  // namespace simulator
