#pragma once

// Where a kernel is to run: CUDA's stream, and the number of its device.
struct Stream {
  void* handle = nullptr;
  int device = 0;
};
