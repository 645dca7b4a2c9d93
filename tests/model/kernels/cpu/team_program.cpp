// Runs programs of many small stages and checks that every chunk is done once, after all chunks of
// the stage before. Arguments: own or openmp or alone, threads, programs, stages of each.

#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

namespace {

std::atomic<int64_t> failures{0}, helped{0};

struct Work {
  const Work* before;
  int64_t count, threads;
  int plain;  // written by chunk 0 alone: a race with the next stage would be one of this
  std::vector<std::atomic<int>> times;

  Work(const Work* before, int64_t count, int64_t threads)
      : before(before), count(count), threads(threads), plain(0), times(count) {}
  int64_t chunks() const { return count; }
};

void work(const Work& args, Chunks chunks, int64_t thread) {
  if (thread < 0 || thread >= args.threads) failures++;
  if (thread > 0) helped++;
  if (args.before) {
    for (auto& times : args.before->times) failures += times.load(std::memory_order_relaxed) != 1;
    failures += args.before->plain != 1;
  }
  Work& changed = const_cast<Work&>(args);
  if (chunks.first == 0) changed.plain = 1;
  for (int64_t chunk = chunks.first; chunk < chunks.stop; chunk++)
    changed.times[chunk].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

int main(int, char** argv) {
  const int64_t size = std::atoi(argv[2]), programs = std::atoi(argv[3]), stages = std::atoi(argv[4]);
  Threads* threads = std::strcmp(argv[1], "own") == 0      ? (Threads*)new Team(size)
                     : std::strcmp(argv[1], "openmp") == 0 ? (Threads*)new OpenMP(GOMP_parallel, size)
                                                           : (Threads*)new Alone;
  for (int64_t program = 0; program < programs; program++) {
    std::deque<Work> works;
    std::vector<Stage> list;
    for (int64_t stage = 0; stage < stages; stage++) {
      works.emplace_back(stage ? &works.back() : nullptr, 1 + (program + stage * 7) % 13, size);
      list.push_back(stage_of<Work, work>(works.back()));
    }
    threads->run(list.data(), list.data() + list.size());
    for (auto& times : works.back().times) failures += times.load() != 1;
    // Long enough, now and then, for the others to fall asleep.
    if (program % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
  delete threads;
  std::printf("%ld failures, %ld chunks done by others\n", long(failures), long(helped));
  return failures != 0;
}
