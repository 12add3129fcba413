#include "conv.h"
#include "conv_wgrad.h"

template const char* dispatch_conv<hw::BFloat16>(int, const ConvArguments&, Stream);
template const char* dispatch_wgrad<hw::BFloat16>(const WgradArguments&, Stream);
