// Runs a fuzz target without a fuzzer: on the files of the folders given, then on as many edits of
// them as the first argument says, the same on every machine.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s EDITS FOLDER...\n", argv[0]);
    return 2;
  }
  std::vector<std::vector<uint8_t>> inputs;
  for (int i = 2; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      std::ifstream file(entry.path(), std::ios::binary);
      inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
  }
  for (const auto& input : inputs) {
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  inputs.emplace_back(64, uint8_t{0});
  std::mt19937 generator(0);
  const long edits = std::strtol(argv[1], nullptr, 10);
  for (long i = 0; i < edits; ++i) {
    std::vector<uint8_t> input = inputs[generator() % inputs.size()];
    input.resize(8 + generator() % 64);
    for (uint32_t changes = 1 + generator() % 8; changes > 0; --changes) {
      input[generator() % input.size()] = static_cast<uint8_t>(generator());
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%zu inputs, %ld edits: no finding\n", inputs.size() - 1, edits);
  return 0;
}
