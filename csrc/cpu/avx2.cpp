// The kernels for one instruction set; build.py compiles this file with its flags.
#define ISA avx2
#define LANES 8
#include "all.h"
