// Two kinds of failure at the edge of the CUDA extension: an argument that no call could take, and
// a call of the CUDA runtime that did not succeed. Both become typed Python errors in kv/bind.cpp.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace nodeserve {

// The message begins with the argument's name and says what would be right.
class BadArgument : public std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

class CudaFailure : public std::runtime_error {
  public:
    CudaFailure(const std::string& message, int number, std::string name)
        : std::runtime_error(message), number(number), name(std::move(name)) {}

    const int number;
    const std::string name;  // cudaErrorMemoryAllocation
};

// `call` is the source text of the call; what is named is the function.
inline void check_cuda(cudaError_t result, std::string_view call, const char* file, int line) {
    if (result == cudaSuccess) return;
    cudaGetLastError();  // the error is reported here, and not once more by a later launch
    std::ostringstream message;
    message << file << ':' << line << ' ' << call.substr(0, call.find('(')) << ": " << cudaGetErrorString(result)
            << " (" << cudaGetErrorName(result) << ')';
    throw CudaFailure(message.str(), static_cast<int>(result), cudaGetErrorName(result));
}

}  // namespace nodeserve

#define NS_CUDA(call) ::nodeserve::check_cuda((call), #call, __FILE__, __LINE__)

#define NS_REQUIRE(condition, message)                   \
    do {                                                 \
        if (!(condition)) {                              \
            std::ostringstream text_;                    \
            text_ << message;                            \
            throw ::nodeserve::BadArgument(text_.str()); \
        }                                                \
    } while (false)
