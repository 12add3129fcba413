#include "conv.h"
#include "conv_wgrad.h"

template const char* dispatch_conv<hw::Half>(int, const ConvArguments&, Stream);
template const char* dispatch_wgrad<hw::Half>(const WgradArguments&, Stream);
