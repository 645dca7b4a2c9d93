// AMX's tiles on a processor without them: their instructions trap, and are done here.
//
// To be linked to a program, or loaded before it (LD_PRELOAD). Follows the operation sections of
// Intel's Software Developer's Manual for LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE and
// TDPBF16PS, with their faults: what a processor would refuse ends the process with a line. Not
// emulated: instructions that the kernels do not have, flushing of denormal numbers.

#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

std::atomic<int64_t> num_products{0};

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t bytes[16][64];
};

// A thread that traps first takes its own of these: a trap may not allocate.
Tile memory[64][8];
std::atomic<int> num_threads{0};
#define OF_THREAD thread_local __attribute__((tls_model("initial-exec")))
OF_THREAD Tile* tiles;
OF_THREAD bool is_configured;

[[noreturn]] void fail(const char* reason) {
  dprintf(2, "tile_emulator: %s\n", reason);
  _exit(70);
}

void require(bool condition, const char* reason) {
  if (!condition) fail(reason);
}

// An instruction C4 RXBmmmmm WvvvvLpp opcode modrm [sib] [displacement], and the registers it finds.
struct Instruction {
  const uint8_t* code;
  greg_t* registers;

  int prefix() const { return code[2] & 3; }
  int opcode() const { return code[3]; }
  int mode() const { return code[4] >> 6; }
  int reg() const { return code[4] >> 3 & 7; }
  int rm() const { return code[4] & 7; }
  int second() const { return ~code[2] >> 3 & 15; }
  bool is_known() const { return code[0] == 0xc4 && (code[1] & 31) == 2 && !(code[2] & 0x84); }
  bool has_sib() const { return mode() != 3 && rm() == 4; }
  int64_t length() const {
    const int displacement = mode() == 1 ? 1 : mode() == 2 ? 4 : 0;
    return 5 + has_sib() + displacement;
  }

  int64_t value(int number) const {
    static constexpr int PLACES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[PLACES[number]];
  }
  uint8_t* base() const {
    const int low = has_sib() ? code[5] & 7 : rm(), high = code[1] & 0x20 ? 0 : 8;
    require(mode() != 0 || low != 5, "an address without a base");
    const uint8_t* after = code + 5 + has_sib();
    int32_t displacement = 0;
    if (mode() == 1) displacement = int8_t(*after);
    if (mode() == 2) std::memcpy(&displacement, after, 4);
    return (uint8_t*)value(low + high) + displacement;
  }
  int64_t stride() const {
    require(has_sib(), "a tile in memory without a stride");
    const int index = (code[5] >> 3 & 7) + (code[1] & 0x40 ? 0 : 8);
    require(index != 4, "a tile in memory without a stride");
    return value(index) << (code[5] >> 6);
  }
};

void configure(const uint8_t* layout) {
  require(layout[0] == 1 && layout[1] == 0, "another palette, or a first row");
  for (int i = 2; i < 16; i++) require(layout[i] == 0, "reserved bytes are used");
  for (int tile = 0; tile < 16; tile++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, layout + 16 + 2 * tile, 2);
    const int rows = layout[48 + tile];
    require(tile < 8 || (rows == 0 && row_bytes == 0), "more than eight tiles");
    require(row_bytes <= 64 && rows <= 16 && (rows == 0) == (row_bytes == 0), "a tile's size");
    if (tile < 8) tiles[tile].rows = rows, tiles[tile].row_bytes = row_bytes;
  }
  for (int tile = 0; tile < 8; tile++) std::memset(tiles[tile].bytes, 0, 1024);
  is_configured = true;
}

Tile& tile_of(int number) {
  require(is_configured, "no tiles are configured");
  require(number < 8 && tiles[number].rows > 0, "a tile that is not there");
  require(tiles[number].row_bytes % 4 == 0, "a row of broken lanes");
  return tiles[number];
}

float number(const uint8_t* bfloat16) {
  float number = 0;
  std::memcpy((uint8_t*)&number + 2, bfloat16, 2);
  return number;
}

void multiply(Tile& out, const Tile& a, const Tile& b) {
  require(&out != &a && &out != &b && &a != &b, "a product of one tile twice");
  require(out.rows == a.rows && out.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows,
          "a product of tiles that do not fit");
  for (int row = 0; row < out.rows; row++) {
    float sums[32] = {};
    for (int k = 0; k < b.rows; k++)
      for (int i = 0; i < out.row_bytes / 2; i++)
        sums[i] = __builtin_fmaf(number(a.bytes[row] + 4 * k + i % 2 * 2),
                                 number(b.bytes[k] + 2 * i), sums[i]);
    for (int column = 0; column < out.row_bytes / 4; column++) {
      float sum;
      std::memcpy(&sum, out.bytes[row] + 4 * column, 4);
      sum += sums[2 * column] + sums[2 * column + 1];
      std::memcpy(out.bytes[row] + 4 * column, &sum, 4);
    }
  }
  num_products++;
}

void execute(const Instruction& instruction) {
  enum { NONE, X66, XF3, XF2 };
  const int prefix = instruction.prefix();
  if (instruction.opcode() == 0x49 && prefix == NONE && instruction.mode() != 3) {
    configure(instruction.base());
  } else if (instruction.opcode() == 0x49 && prefix == NONE) {
    is_configured = false;
  } else if (instruction.opcode() == 0x49 && prefix == XF2) {
    std::memset(tile_of(instruction.reg()).bytes, 0, 1024);
  } else if (instruction.opcode() == 0x4b && prefix == XF2) {
    Tile& tile = tile_of(instruction.reg());
    std::memset(tile.bytes, 0, 1024);
    for (int row = 0; row < tile.rows; row++)
      std::memcpy(tile.bytes[row], instruction.base() + row * instruction.stride(), tile.row_bytes);
  } else if (instruction.opcode() == 0x4b && prefix == XF3) {
    const Tile& tile = tile_of(instruction.reg());
    for (int row = 0; row < tile.rows; row++)
      std::memcpy(instruction.base() + row * instruction.stride(), tile.bytes[row], tile.row_bytes);
  } else if (instruction.opcode() == 0x5c && prefix == XF3) {
    multiply(tile_of(instruction.reg()), tile_of(instruction.rm()), tile_of(instruction.second()));
  } else {
    fail("another instruction of AMX");
  }
}

void trap(int, siginfo_t*, void* context) {
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const Instruction instruction{(const uint8_t*)registers[REG_RIP], registers};
  require(instruction.is_known(), "an instruction that is not of AMX");
  if (tiles == nullptr) {
    const int thread = num_threads++;
    require(thread < 64, "more threads than are kept tiles for");
    tiles = memory[thread];
  }
  execute(instruction);
  registers[REG_RIP] += instruction.length();
}

// Says what was done, so that nobody takes for a test of tiles what has used none.
__attribute__((destructor)) void report() {
  if (num_products > 0) dprintf(2, "tile_emulator: %ld products\n", long(num_products));
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = trap;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// Grants tiles, which the system of such a processor does not know.
extern "C" long syscall(long number, ...) noexcept {
  va_list list;
  va_start(list, number);
  long arguments[6];
  for (long& argument : arguments) argument = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && arguments[0] == 0x1023) return 0;
  register long r10 asm("r10") = arguments[3];
  register long r8 asm("r8") = arguments[4];
  register long r9 asm("r9") = arguments[5];
  long result;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(r10),
                 "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  if (result >= 0 || result < -4095) return result;
  errno = int(-result);
  return -1;
}
