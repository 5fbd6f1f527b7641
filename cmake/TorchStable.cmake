# torch_stable: the LibTorch Stable ABI of whatever torch the building Python has. Not find_package(Torch):
# that drags in ATen's flags and overrides CMAKE_CUDA_ARCHITECTURES.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import torch, torch.utils.cpp_extension as e; print(torch.__version__); print(e.include_paths()[0]); print(e.library_paths()[0])"
  OUTPUT_VARIABLE torch_facts RESULT_VARIABLE torch_missing ERROR_VARIABLE torch_error
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_missing)
  message(FATAL_ERROR "fips_ext needs torch >= 2.11 in ${Python_EXECUTABLE}: pip install torch==2.13.0\n${torch_error}")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 torch_version)
list(GET torch_facts 1 torch_include)
list(GET torch_facts 2 torch_lib)
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "fips_ext needs torch >= 2.11 (stable ABI); found ${torch_version}")
endif()
message(STATUS "torch ${torch_version}: ${torch_include}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_include})
target_compile_options(torch_stable INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${torch_include}/=>)  # as for our own sources
# 2.11 is the oldest ABI we ask for; the binary then runs on every later torch.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# libtorch.so (not only libtorch_cpu.so) must stay a dependency: a CUDA torch provides the current stream
# through it, and --as-needed would silently drop it.
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed)
target_link_libraries(torch_stable INTERFACE ${torch_lib}/libtorch.so ${torch_lib}/libtorch_cpu.so)
