# What llama.cpp's own top-level file would define for its folders, so that single programs are compiled from the pinned
# source distribution and linked with the libraries that the pinned llama-cpp-python installed from that same source:
# minutes less than building ggml once more, and the very kernels that edgetune runs on.
#
#   cmake -S FOLDER -B DIR -DLLAMA_SOURCE=.../vendor/llama.cpp -DLLAMA_LIBRARIES=.../llama_cpp/lib
set(CMAKE_BUILD_TYPE Release)
set(CMAKE_CXX_STANDARD 17)
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_SUBPROCESS OFF)
set(LLAMA_OPENSSL OFF)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_VERSION_BASE 0.0.0)
set(LLAMA_VERSION_MAJOR 0)
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT unknown)

macro(llama_add_compile_flags)
endmacro()
macro(license_add_file)
endmacro()

add_library(llama INTERFACE)
target_include_directories(llama INTERFACE ${LLAMA_SOURCE}/include ${LLAMA_SOURCE}/ggml/include)
foreach(name llama ggml ggml-cpu ggml-base)
  target_link_libraries(llama INTERFACE ${LLAMA_LIBRARIES}/lib${name}.so)
endforeach()
add_library(ggml ALIAS llama)

add_subdirectory(${LLAMA_SOURCE}/vendor vendor)
add_subdirectory(${LLAMA_SOURCE}/common common)
