#include "conv.h"
#include "conv_wgrad.h"

template const char* dispatch_conv<float>(int, const ConvArguments&, Stream);
template const char* dispatch_wgrad<float>(const WgradArguments&, Stream);
