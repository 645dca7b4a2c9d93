// The threads that work through a program: stages in order, each cut into chunks.
//
// Rules: a stage begins when every chunk of the one before is done, whoever did it. Who calls is one
// of the threads, and one thread at a time may call. Must not know: what a chunk is.

#pragma once

#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "stage.h"

namespace {

class Threads {
 public:
  virtual ~Threads() {}
  // Returns when all is done; every stage has at least one chunk.
  virtual void run(const Stage* first, const Stage* end) = 0;
};

// The calling thread.
class Alone : public Threads {
 public:
  void run(const Stage* first, const Stage* end) override {
    for (; first != end; first++)
      first->work(first->args, Chunks{0, first->chunks}, 0);
  }
};

// The threads of an OpenMP runtime, by its entry point GOMP_parallel: where products are computed in
// them, others would only take their cores.
class OpenMP : public Threads {
 public:
  typedef void Parallel(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

  OpenMP(Parallel* parallel, int64_t size) : parallel_(parallel), size_(size) {}

  void run(const Stage* first, const Stage* end) override {
    for (; first != end; first++) {
      Shared shared{*first, {0}, {0}};
      if (first->chunks == 1)
        share(&shared);
      else
        parallel_(share, &shared, unsigned(size_), 0);
    }
  }

 private:
  struct Shared {
    Stage stage;
    std::atomic<int64_t> chunks, threads;
  };

  static void share(void* argument) {
    Shared& shared = *(Shared*)argument;
    const int64_t thread = shared.threads.fetch_add(1, std::memory_order_relaxed);
    for (int64_t chunk; (chunk = shared.chunks.fetch_add(1, std::memory_order_relaxed)) <
                        shared.stage.chunks;)
      shared.stage.work(shared.stage.args, Chunks{chunk, chunk + 1}, thread);
  }

  Parallel* const parallel_;
  const int64_t size_;
};

inline void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Threads of our own. Chunks are handed out as threads ask, and what counts is that they are done, not
// that threads arrive: one that has lost its core holds up nobody, unless in the middle of a chunk. If
// another process took its core there, it stays away for as long as that took, and twice as long each
// time it happens soon again: who calls is sooner done alone than with somebody who is gone half of
// the time. A thread without a chunk spins for some tens of microseconds, as long as stages of a step
// take, then gives way to whoever wants its core, then sleeps.
class Team : public Threads {
 public:
  explicit Team(int64_t size) : size_(size) {
    for (int64_t thread = 1; thread < size; thread++)
      threads_.emplace_back([this, thread] { serve(thread); });
  }

  ~Team() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closing_.store(true);
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(const Stage* first, const Stage* end) override {
    if (first == end) return;
    stage_ = first;
    end_ = end;
    is_running_.store(true, std::memory_order_relaxed);
    open();
    while (is_running_.load(std::memory_order_acquire))
      if (!work(0, [] { return false; })) wait([this] { return !is_running_.load(); });
  }

 private:
  // How long threads that have nothing to do keep their core, and how long they only offer it.
  static constexpr std::chrono::microseconds SPINNING{50}, YIELDING{50};
  // A chunk that takes so long may have been interrupted.
  static constexpr std::chrono::microseconds SUSPICIOUS{400};
  // How many times as long to stay away at most, and how many times that means soon.
  static constexpr int MOST_AWAY = 32, SOON = 4;
  static constexpr int64_t MOST_AT_ONCE = 4;  // chunks: few, so that threads end together
  static constexpr int CHUNK_BITS = 24;
  static constexpr uint64_t CHUNKS = (uint64_t(1) << CHUNK_BITS) - 1;

  void serve(int64_t thread) {
    int64_t times_lost = count_lost();
    int away = 1;
    auto started = std::chrono::steady_clock::now(), forgiven = started;
    auto lost = started - started;
    auto is_interrupted = [&] {
      const auto now = std::chrono::steady_clock::now();
      const auto taken = now - started;
      started = now;
      if (taken < SUSPICIOUS) return false;
      const int64_t before = times_lost;
      times_lost = count_lost();
      if (times_lost != before) lost = taken;
      return times_lost != before;
    };
    while (!is_closing_.load(std::memory_order_acquire)) {
      lost = lost.zero();
      if (!work(thread, is_interrupted)) {
        // To give way counts as losing the core.
        if (wait([this] { return is_closing_.load(); })) times_lost = count_lost();
      } else if (lost > lost.zero()) {
        away = started > forgiven ? 1 : away < MOST_AWAY ? 2 * away : MOST_AWAY;
        stay_away(away * lost);
        forgiven = std::chrono::steady_clock::now() + SOON * away * lost;
      }
      started = std::chrono::steady_clock::now();
    }
  }

  // How often another thread has been given the core of this one.
  static int64_t count_lost() {
#ifdef RUSAGE_THREAD
    rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_nivcsw;
#endif
    return 0;
  }

  void stay_away(std::chrono::nanoseconds time) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, time, [this] { return is_closing_.load(); });
  }

  // Does chunks of the open stage until none is left or it is interrupted; false where none was. At
  // first several at a time: to be handed one costs as much as to multiply a small one.
  template <typename Interrupted>
  bool work(int64_t thread, Interrupted is_interrupted) {
    int64_t done = 0;
    uint64_t tickets = tickets_.load(std::memory_order_acquire);
    while (const int64_t left = int64_t(tickets & CHUNKS)) {
      // Nobody opens another stage before these chunks are done: what follows is of this stage.
      const int64_t share = left / (2 * size_), most = most_at_once_.load(std::memory_order_relaxed);
      const int64_t taken = share < 1 ? 1 : share < most ? share : most;
      if (!tickets_.compare_exchange_weak(tickets, tickets - uint64_t(taken))) continue;
      const Stage& stage = *stage_;
      const int64_t first = stage.chunks - left;
      stage.work(stage.args, Chunks{first, first + taken}, thread);
      done += taken;
      if (is_interrupted()) break;
      tickets = tickets_.load(std::memory_order_acquire);
    }
    if (done == 0) return false;
    if (unfinished_.fetch_sub(done) == done) {
      stage_++;
      if (stage_ != end_)
        open();
      else
        close(thread);
    }
    return true;
  }

  void open() {
    const int64_t chunks = stage_->chunks;
    most_at_once_.store(stage_->is_even ? MOST_AT_ONCE : 1, std::memory_order_relaxed);
    unfinished_.store(chunks, std::memory_order_relaxed);
    const uint64_t stage = (tickets_.load(std::memory_order_relaxed) >> CHUNK_BITS) + 1;
    tickets_.store(stage << CHUNK_BITS | uint64_t(chunks));
    if (chunks > 1) wake();
  }

  void close(int64_t thread) {
    is_running_.store(false);
    if (thread != 0) wake();  // the caller, if it sleeps
  }

  void wake() {
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
  }

  // Returns whether it gave way or slept.
  template <typename Condition>
  bool wait(Condition is_over) {
    auto is_awaited = [&] { return (tickets_.load() & CHUNKS) || is_over(); };
    const auto started = std::chrono::steady_clock::now();
    bool has_yielded = false;
    for (auto waited = started - started; waited < SPINNING + YIELDING;
         waited = std::chrono::steady_clock::now() - started) {
      if (waited >= SPINNING) {
        std::this_thread::yield();
        has_yielded = true;
      }
      for (int turn = 0; turn < 16; turn++) {
        if (is_awaited()) return has_yielded;
        pause_thread();
      }
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, is_awaited);
    sleepers_.fetch_sub(1);
    return true;
  }

  const int64_t size_;
  // The number of stages opened so far, then the chunks of the open one that nobody has taken: one
  // word, so that a thread that comes late can take nothing of a stage that it has not seen.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};  // chunks of the open stage that are not done
  std::atomic<int64_t> most_at_once_{1};            // chunks of the open stage that one may take
  alignas(64) std::atomic<bool> is_running_{false};
  std::atomic<bool> is_closing_{false};
  std::atomic<int64_t> sleepers_{0};
  const Stage* stage_ = nullptr;  // the open one; whoever does its last chunk goes on to the next
  const Stage* end_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
};

}  // namespace
