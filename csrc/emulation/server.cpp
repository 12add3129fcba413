// Runs kernels for the tests: requests on standard input, results on standard output, until the input ends.
//
// A request is int64 numbers, preceded by their count: the op, its precision, configuration, order of threads, fault, the
// number of storages and the size of each in bytes, and then what the op takes; the storages' bytes follow. A pointer is
// (storage or -1, offset in bytes). The answer is `emulation::seen`, the length (0: none) and text of an error, and the
// bytes of all storages.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../hardware.h"
#include "../kernels.h"

namespace {

void receive(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(1);
}

void send(const void* from, size_t bytes) {
  if (bytes) fwrite(from, 1, bytes, stdout);
}

// Each storage is a separate allocation of exactly its size, so that the sanitizer sees every stray access.
struct Request {
  std::vector<int64_t> numbers;
  size_t next = 0;
  std::vector<std::unique_ptr<char[]>> storages;
  std::vector<size_t> sizes;

  int64_t number() { return numbers.at(next++); }
  int small() { return static_cast<int>(number()); }
  float real() { return hw::as_float(static_cast<uint32_t>(number())); }

  template <typename V>
  V* pointer() {
    const int64_t storage = number(), offset = number();
    return storage < 0 ? nullptr : reinterpret_cast<V*>(storages.at(storage).get() + offset);
  }

  Map map() {
    Map map;
    map.data = pointer<char>();
    map.image_stride = number();
    map.pixel_stride = small();
    map.depth = small(), map.height = small(), map.width = small(), map.channels = small();
    map.scale = pointer<float>(), map.shift = pointer<float>();
    map.affine_stride = small();
    return map;
  }

  ConvArguments conv() {
    ConvArguments p;
    p.a = map(), p.b = map();
    p.weights_a = pointer<char>(), p.weights_b = pointer<char>();
    p.bias = pointer<float>(), p.border = pointer<float>(), p.stats = pointer<float>();
    p.out = pointer<char>();
    p.out_image_stride = number();
    p.out_pixel_stride = small();
    p.images = small(), p.depth = small(), p.height = small(), p.width = small(), p.channels = small();
    p.deep = small(), p.phased = small(), p.act = small(), p.add = small();
    p.slope = real();
    return p;
  }

  WgradArguments wgrad() {
    WgradArguments p;
    p.a = map(), p.dy = map();
    p.partial = pointer<float>(), p.result = pointer<float>();
    p.images = small(), p.parts = small();
    p.deep = small(), p.phased = small();
    p.slope = real();
    return p;
  }
};

bool receive(Request& request) {
  int64_t count;
  if (fread(&count, sizeof(count), 1, stdin) != 1) return false;
  request.numbers.resize(count);
  receive(request.numbers.data(), count * sizeof(int64_t));
  return true;
}

}  // namespace

int main() {
  for (Request request; receive(request); request = {}) {
    const int op = request.small(), precision = request.small(), config = request.small();
    emulation::order = request.small();
    emulation::fault = request.small();
    for (int64_t left = request.number(); left; --left) {
      const size_t size = request.number();
      request.sizes.push_back(size);
      request.storages.emplace_back(new char[size]);
    }
    for (size_t k = 0; k < request.sizes.size(); ++k) receive(request.storages[k].get(), request.sizes[k]);
    const char* error =
        op == 0 ? run_conv(precision, config, request.conv(), {}) : run_wgrad(precision, request.wgrad(), {});
    const std::string text = error ? error : "";
    const int64_t length = text.size();
    send(&emulation::seen, sizeof(emulation::seen));
    emulation::seen = {};
    send(&length, sizeof(length));
    send(text.data(), text.size());
    for (size_t k = 0; k < request.sizes.size(); ++k) send(request.storages[k].get(), request.sizes[k]);
    fflush(stdout);
  }
}
