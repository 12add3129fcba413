// The kernels for one instruction set; build.py compiles this file with its flags.
#define ISA avx512
#define LANES 16
#include "all.h"
