// The kernels for one instruction set; build.py compiles this file with its flags.
#define ISA plain
#define LANES 4
#include "all.h"
