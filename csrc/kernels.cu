// The kernels by precision. Each precision is a separate source (half.cu, bfloat16.cu, tf32.cu): they compile in parallel.
#include "kernels.h"

#include "hardware.h"

template <typename T>
const char* dispatch_conv(int, const ConvArguments&, Stream);
template <typename T>
const char* dispatch_wgrad(const WgradArguments&, Stream);

#define BY_PRECISION(CALL)         \
  switch (precision) {             \
    case 0:                        \
      return CALL(hw::Half);       \
    case 1:                        \
      return CALL(hw::BFloat16);   \
    case 2:                        \
      return CALL(float);          \
  }                                \
  return "no such precision";

extern template const char* dispatch_conv<hw::Half>(int, const ConvArguments&, Stream);
extern template const char* dispatch_conv<hw::BFloat16>(int, const ConvArguments&, Stream);
extern template const char* dispatch_conv<float>(int, const ConvArguments&, Stream);
extern template const char* dispatch_wgrad<hw::Half>(const WgradArguments&, Stream);
extern template const char* dispatch_wgrad<hw::BFloat16>(const WgradArguments&, Stream);
extern template const char* dispatch_wgrad<float>(const WgradArguments&, Stream);

const char* run_conv(int precision, int config, const ConvArguments& arguments, Stream stream) {
#define CALL(T) dispatch_conv<T>(config, arguments, stream)
  BY_PRECISION(CALL)
#undef CALL
}

const char* run_wgrad(int precision, const WgradArguments& arguments, Stream stream) {
#define CALL(T) dispatch_wgrad<T>(arguments, stream)
  BY_PRECISION(CALL)
#undef CALL
}
