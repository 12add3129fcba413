#pragma once

// Where a kernel runs: a CUDA stream and the number of its device.
struct Stream {
  void* handle = nullptr;
  int device = 0;
};
